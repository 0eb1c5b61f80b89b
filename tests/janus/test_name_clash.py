"""The check for PyPI distributions of our names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from janus.name_clash import check_name_clash

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", ["janus-1.0.0.dist-info", "matris-0.1.0.dist-info", "janus-0.4-py3.11.egg-info"])
def test_foreign_distribution_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ImportError, match=f"pip uninstall {name.split('-')[0]}"):
        check_name_clash([str(tmp_path)])


@pytest.mark.parametrize("name", ["janus_matris-0.1.0.dist-info", "janus_core-0.7.dist-info", "janus", "matris.txt"])
def test_others_are_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    check_name_clash([str(tmp_path), str(tmp_path / "missing"), ""])


@pytest.mark.parametrize("package", ["janus", "matris"])
def test_import_fails_with_what_to_do(tmp_path: Path, package: str) -> None:
    (tmp_path / "janus-2.0.0.dist-info").mkdir()
    done = _python(f"import {package}", ROOT, tmp_path)
    assert done.returncode == 1
    assert "pip uninstall janus" in done.stderr


def test_foreign_package_before_ours(tmp_path: Path) -> None:
    (tmp_path / "janus").mkdir()
    (tmp_path / "janus" / "__init__.py").write_text("class Queue: ...\n")
    done = _python("import matris", tmp_path, ROOT)
    assert done.returncode == 1
    assert "pip uninstall janus" in done.stderr


def _python(code: str, *search_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search_path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
