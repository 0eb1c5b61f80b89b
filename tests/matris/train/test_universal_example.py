"""`examples/universal_mini.yaml`: its files are where it says, and a run of it can start."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path

import pytest

from matris.cli.train import main, parse

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "universal_mini.yaml"
FRAMES = 12


def test_dry_run_with_a_link_to_the_data(
    shared_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = parse(["--config", str(EXAMPLE)]).data.tasks
    assert [task.name for task in tasks] == ["acac", "mlearn", "tio2", "s66x8", "water", "mp_crystals"]
    for name in (name for task in tasks for name in (*task.train, *task.valid, *task.test)):
        inside = Path(name).relative_to("data")
        (tmp_path / "elsewhere" / inside).parent.mkdir(parents=True, exist_ok=True)
        _copy_start(shared_directory / "data" / inside, tmp_path / "elsewhere" / inside)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    arguments = ["--config", str(EXAMPLE), "--preset", "moe-tiny", "--dry_run", "--data.cache_dir", str(tmp_path / "c")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert all(f"{task.name}: fit" in table for task in tasks)
    assert not (tmp_path / "runs").exists()


def _copy_start(source: Path, target: Path) -> None:
    """The first structures of a file: all of them take minutes."""
    with gzip.open(source, "rt") as lines, gzip.open(target, "wt") as copy:
        for count in islice(lines, FRAMES):
            copy.write(count)
            copy.writelines(islice(lines, int(count) + 1))
