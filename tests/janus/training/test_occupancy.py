"""One run at a time in a directory, and a dead one is none."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from janus.mesh import Mesh
from janus.training.occupancy import LOCK, occupied


def work(directory: Path, told: Connection) -> None:
    with occupied(directory, Mesh()):
        if os.fork() == 0:  # as workers of a loader do, and live on for a while
            time.sleep(10.0)
            os._exit(0)
        told.send(os.getpid())
        time.sleep(60.0)


def test_second_run_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one"
    told, tell = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(directory, tell))
    process.start()
    pid = told.recv()
    with (
        pytest.raises(BlockingIOError, match=f"process {pid} on .* is at work in {directory}"),
        occupied(directory, Mesh()),
    ):
        pass
    assert (directory / LOCK).is_file()
    os.kill(pid, signal.SIGKILL)
    process.join()
    with occupied(directory, Mesh()):
        assert str(os.getpid()) in (directory / LOCK).read_text()
    assert list(directory.iterdir()) == []


def test_refused_run_leaves_nothing(tmp_path: Path) -> None:
    def refuse(directory: Path) -> None:
        with occupied(directory, Mesh()):
            raise ValueError("settings")

    for name in ("new", "old"):
        with pytest.raises(ValueError, match="settings"):
            refuse(tmp_path / name)
        assert not (tmp_path / "new").exists()
        (tmp_path / "old").mkdir(exist_ok=True)
    assert list((tmp_path / "old").iterdir()) == []


def test_says_that_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with occupied(tmp_path, Mesh()):
        pass
    assert "nothing keeps a second run from this directory" in capsys.readouterr().out
