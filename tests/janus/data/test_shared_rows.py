"""Rows that all processes of a machine share."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from janus.data.shared_rows import SHARED_FROM, blocks, mapped_rows, shared_rows

PAIR = np.dtype([("place", "<i8"), ("known", "?")])


def pairs(start: int, stop: int) -> np.ndarray:
    rows = np.empty(stop - start, PAIR)
    rows["place"], rows["known"] = np.arange(start, stop), np.arange(start, stop) % 3 == 0
    return rows


class Made:
    """Rows in parts, and how often they were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.times = count, 0

    def __call__(self):
        self.times += 1
        return (pairs(part.start, part.stop) for part in blocks(self.count, 7000))


def test_blocks():
    assert list(blocks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(blocks(0)) == []


def test_few_rows_need_no_file(tmp_path):
    make = Made(100)
    rows, file = shared_rows(make, PAIR, at_most=100, key=["a"], folder=tmp_path / "none")
    assert file is None
    np.testing.assert_array_equal(rows, pairs(0, 100))
    with pytest.raises(ValueError, match="read-only"):
        rows["place"][0] = 1
    assert not (tmp_path / "none").exists()
    rows, file = shared_rows(make, PAIR, at_most=SHARED_FROM, key=None, folder=tmp_path / "none")
    assert file is None
    assert len(shared_rows(Made(0), PAIR, at_most=0, key=["a"], folder=tmp_path)[0]) == 0


def test_many_rows_are_written_once(tmp_path):
    make = Made(20_000)
    for _ in range(2):
        rows, file = shared_rows(make, PAIR, at_most=SHARED_FROM, key=["a", 1.5], folder=tmp_path / "cache")
        np.testing.assert_array_equal(rows, pairs(0, 20_000))
        assert list((tmp_path / "cache").iterdir()) == [file]
    assert make.times == 1
    with pytest.raises(ValueError, match="read-only"):
        rows["place"][0] = 1
    np.testing.assert_array_equal(mapped_rows(file, PAIR), rows)
    _, other = shared_rows(make, PAIR, at_most=SHARED_FROM, key=["a", 1.6], folder=tmp_path / "cache")
    assert other != file
    assert make.times == 2
    empty, _ = shared_rows(Made(0), PAIR, at_most=SHARED_FROM, key=["b"], folder=tmp_path / "cache")
    assert len(empty) == 0
    assert empty.dtype == PAIR


def test_a_failure_leaves_no_rows(tmp_path):
    def fails():
        yield pairs(0, 5)
        raise ValueError("no more")

    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            shared_rows(fails, PAIR, at_most=SHARED_FROM, key=["a"], folder=tmp_path)
    assert not [*tmp_path.glob("*.rows"), *tmp_path.glob("*.partial")]
    rows, _ = shared_rows(Made(9), PAIR, at_most=SHARED_FROM, key=["a"], folder=tmp_path)
    assert len(rows) == 9


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: .* up to 2\.2 MB, and cannot be written .*choose another cache_dir"):
        shared_rows(Made(5), PAIR, at_most=250_000, key=["a"], folder=tmp_path / "file")


def test_processes_at_once_write_once(tmp_path):
    code = f"""
import time, uuid
from pathlib import Path
from janus.data.shared_rows import SHARED_FROM, shared_rows
from tests.janus.data.test_shared_rows import PAIR, pairs
def make():
    Path({str(tmp_path)!r}, uuid.uuid4().hex + ".made").touch()
    for start in range(0, 50):
        time.sleep(0.01)
        yield pairs(start, start + 1)
rows, _ = shared_rows(make, PAIR, at_most=SHARED_FROM, key=["a"], folder=Path({str(tmp_path / "cache")!r}))
assert (rows == pairs(0, 50)).all()
"""
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.made"))) == 1
