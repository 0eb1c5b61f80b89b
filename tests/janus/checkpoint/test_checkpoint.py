"""Checkpoints are whole or refused, by file and reason."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from janus.checkpoint import (
    CheckpointError,
    CheckpointStore,
    capture_rng,
    read_directory,
    restore_rng,
    verify_directory,
    write_directory,
)

TENSORS = {"a/b": torch.arange(6.0).reshape(2, 3).t(), "scalar": torch.tensor(2.5, dtype=torch.float64)}


def test_round_trip(tmp_path: Path) -> None:
    for value in (1, 2):  # the second replaces the first
        write_directory(tmp_path / "c", TENSORS, {"x": [value, None, 0.1]})
    tensors, state = read_directory(tmp_path / "c")
    assert state == {"x": [2, None, 0.1]}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def damage(path: Path, how: str) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    else:
        (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"tensors.safetensors is damaged: it has \d+ bytes"),
        ("changed", "tensors.safetensors is damaged: its SHA-256"),
        ("missing", "tensors.safetensors is missing"),
        ("manifest", "manifest.json cannot be read"),
    ],
)
def test_damage_is_refused_and_resume_falls_back_with_a_line(tmp_path: Path, how: str, message: str) -> None:
    store = CheckpointStore(directory=tmp_path, keep_last=5)
    for step in (10, 20):
        store.save(step, TENSORS, {"step": step}, best_step=None)
    damage(store.path(20), how)
    with pytest.raises(CheckpointError, match=message):
        read_directory(store.path(20))
    said: list[str] = []
    assert store.latest(said.append) == store.path(10)
    assert len(said) == 1
    assert "falling back" in said[0]
    damage(store.path(10), how)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        store.latest(said.append)


def test_crash_while_writing_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(directory=tmp_path)
    assert store.latest(print) is None
    store.save(1, TENSORS, {}, best_step=None)

    def fail(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("janus.checkpoint.directory._flush", fail)
        with pytest.raises(OSError, match="power cut"):
            store.save(2, TENSORS, {}, best_step=None)
    assert store.steps() == [1]
    said: list[str] = []
    assert store.latest(said.append) == store.path(1)
    assert "removing unfinished" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(directory=tmp_path, keep_last=2)
    for step in range(1, 7):
        store.save(step, TENSORS, {}, best_step=min(step, 2))
    assert store.steps() == [2, 5, 6]


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        verify_directory(tmp_path / "nothing")


def test_random_states_survive_json() -> None:
    state = json.loads(json.dumps(capture_rng()))

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    first = draw()
    assert draw() != first
    restore_rng(state)
    assert draw() == first
