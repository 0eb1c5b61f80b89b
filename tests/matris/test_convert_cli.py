"""The two command lines of the checkpoint converter; what it converts is tested with `matris.reference`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from matris.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERT = ["convert", "--from", "reference"]


class Malicious:
    """Runs a command when it is unpickled by a loader that trusts it."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.evidence),)


def test_malicious_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = tmp_path / "evidence"
    torch.save({"config": {}, "state_dict": Malicious(evidence)}, tmp_path / "bad.pth.tar")
    assert main([*CONVERT, "--input", str(tmp_path / "bad.pth.tar"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "refused" in error
    assert "mkdir" in error
    assert "weights_only" not in error
    assert not evidence.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    source = tmp_path / "x.pth.tar"
    if content is not None:
        source.write_bytes(content)
    assert main([*CONVERT, "--input", str(source), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "x.pth.tar" in error
    assert error.startswith("janus-matris convert: error: ")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checkpoint(shared_directory: Path) -> Path:
    return shared_directory / "reference" / "default_like_f32" / "reference.pth.tar"


def test_converts_and_describes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT, "--input", str(checkpoint), "--output", str(tmp_path / "model")]) == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert main(["info", "--model", str(tmp_path / "model")]) == 0
    assert "reference package matris" in capsys.readouterr().out


@pytest.mark.parametrize("form", [{"pickle_protocol": 3}, {"_use_new_zipfile_serialization": False}])
def test_old_formats_need_no_remark(
    checkpoint: Path, tmp_path: Path, form: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    source = tmp_path / "old.pth.tar"
    torch.save(torch.load(checkpoint, weights_only=True), source, **form)
    assert main([*CONVERT, "--input", str(source), "--output", str(tmp_path / "model")]) == 0
    assert not recwarn.list


def test_unwritable_output(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*CONVERT, "--input", str(checkpoint), "--output", str(tmp_path / "file" / "model")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    assert main([*CONVERT, "--input", str(checkpoint), "--output", str(tmp_path / "taken")]) == 2
    assert "exists" in capsys.readouterr().err


def test_tool_is_the_verb(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "convert_checkpoint.py"
    command = [sys.executable, str(tool), "--from", "reference", "--input", "none", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("janus-matris convert: error: none")
