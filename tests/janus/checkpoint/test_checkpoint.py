"""Checkpoints are whole or refused, by file and reason."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from janus.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    capture_rng,
    open_checkpoint,
    read_directory,
    restore_rng,
    verify_directory,
    write_directory,
)
from janus.checkpoint.directory import write_pieces
from janus.checkpoint.shards import Piece, Shards, blocks

TENSORS = {
    "a/b": torch.arange(6.0).reshape(2, 3).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.arange(4.0).bfloat16(),
    "counts": torch.arange(3),
}
FORMAT_1 = Path(__file__).parent / "format_1" / "step_00000008"


def save(store: CheckpointStore, step: int, best_step: int | None = None) -> None:
    store.save(
        step, {name: Shards.whole(value) for name, value in TENSORS.items()}, {"step": step}, best_step=best_step
    )


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        checkpoint.read(name)


def assert_same(tensors: Mapping[str, Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_round_trip(tmp_path: Path) -> None:
    write_directory(tmp_path / "c", TENSORS.items(), {"x": [2, None, 0.1]})
    tensors, state = read_directory(tmp_path / "c")
    assert state == {"x": [2, None, 0.1]}
    assert_same(tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(FileExistsError, match="exists: choose another"):
        write_directory(tmp_path / "c", TENSORS.items(), {})


def test_many_tensors_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus.checkpoint.directory._FILE_BYTES", 25)
    write_directory(tmp_path / "c", TENSORS.items(), {})
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3
    assert_same(read_directory(tmp_path / "c")[0])


def test_nothing_to_write(tmp_path: Path) -> None:
    write_directory(tmp_path / "c", [], {"x": 1})
    assert read_directory(tmp_path / "c") == ({}, {"x": 1})


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    def tensors():
        yield "a", torch.zeros(3)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_directory(tmp_path / "c", tensors(), {})
    assert not list(tmp_path.iterdir())


# Damage --------------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    manifest = path / "manifest.json"
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "state":
        (path / "state.json").write_text("{}")
    elif how == "manifest":
        manifest.write_text("{")
    elif how == "digit":
        manifest.write_text(manifest.read_text().replace('"start": [0, 0]', '"start": [0, 1]'))
    elif how == "version":
        manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": "old"'))
    else:
        manifest.write_text(json.dumps({"weight_map": {}}))


DAMAGES = {
    "truncated": r"rank_00000.safetensors is damaged: it has \d+ bytes and should have \d+",
    "changed": "rank_00000.safetensors is damaged: the crc32 checksum of the piece at byte",
    "missing": "rank_00000.safetensors is missing",
    "state": r"state.json is damaged: it has 2 bytes",
    "manifest": "manifest.json cannot be used: Expecting property name",
    "digit": "manifest.json cannot be used: its checksum is not that of its content",
    "version": "manifest.json cannot be used: it is of an unknown format, 'old'",
    "foreign": "manifest.json cannot be used: it is not that of a training checkpoint",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_refused_and_resume_falls_back_with_a_line(tmp_path: Path, how: str) -> None:
    store = CheckpointStore(tmp_path, keep_last=5)
    for step in (10, 20):
        save(store, step)
    store.wait()
    damage(store.path(20), how)
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        read_directory(store.path(20))
    said: list[str] = []
    found = store.latest(said.append, read_all)
    assert found is not None
    assert found.path == store.path(10)
    (line,) = said
    assert f"moved to {tmp_path / 'damaged_step_00000020'}, falling back to {store.path(10)}" in line
    assert store.steps() == [10]
    damage(store.path(10), how)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.latest(said.append, read_all)


@pytest.mark.parametrize("reason", ["newer", "forbidden"])
def test_what_may_be_whole_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """By an older installation, say, or as another user."""
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        save(store, step)
    store.wait()
    manifest = store.path(20) / "manifest.json"
    if reason == "newer":
        text = "is of format 3, and this version reads up to 2: update"
        manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    else:
        text, read_text = "must not be read", Path.read_text

        def forbidden(path: Path) -> str:
            if path == manifest:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return read_text(path)

        monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(CheckpointError, match=f"step_00000020/manifest.json {text}"):
        store.latest(print, read_all)
    assert store.steps() == [10, 20]


def test_flush_that_failed_behind_the_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of a failure once, to whichever flush comes first."""
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("janus.checkpoint.directory.os.fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_pieces(tmp_path / "file", [("a", Piece(start=(0,), values=torch.ones(4)))])


def test_older_format(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FORMAT_1)
    assert checkpoint.state["step"] == 8
    assert checkpoint.tensors["model/0.weight"].shape == (8, 3)
    assert checkpoint.read("ema/2.weight").dtype == torch.float64
    assert not [name for name in checkpoint.tensors if name.startswith("optimizer/step")]
    for name in ("tensors.safetensors", "state.json"):
        copy = tmp_path / name
        shutil.copytree(FORMAT_1, copy)
        content = bytearray((copy / name).read_bytes())
        content[-3] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: its sha256 checksum"):
            verify_directory(copy)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        verify_directory(tmp_path / "nothing")


# The store -----------------------------------------------------------------------------------------------------------


def test_a_save_goes_on_while_its_tensors_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def wait_and_write(*arguments: object, **options: object) -> None:
        assert gate.wait(30)
        write_shards(*arguments, **options)  # type: ignore[arg-type]

    from janus.checkpoint.sharded import write_shards

    monkeypatch.setattr("janus.checkpoint.store.write_shards", wait_and_write)
    store = CheckpointStore(tmp_path)
    value = torch.ones(3)
    store.save(1, {"x": Shards.whole(value)}, {}, best_step=None)
    value.zero_()
    assert store.steps() == []
    gate.set()
    store.wait()
    assert torch.equal(open_checkpoint(store.path(1)).read("x"), torch.ones(3))


@pytest.mark.parametrize("background", [True, False])
def test_crash_while_writing_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    store = CheckpointStore(tmp_path, background=background)
    assert store.latest(print, read_all) is None
    save(store, 1)
    store.wait()

    def fail(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("janus.checkpoint.directory.flush", fail)
        if background:
            save(store, 2)
        with pytest.raises(CheckpointError, match=r"step_00000002 could not be written, OSError on rank 0: power cut"):
            store.wait() if background else save(store, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    save(store, 2)
    store.wait()
    assert store.steps() == [1, 2]


def test_the_rest_of_a_kill_is_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.wait()
    for name in (".writing-step_00000002", ".deleting-step_00000000"):
        shutil.copytree(store.path(1), tmp_path / name)
    said: list[str] = []
    found = store.latest(said.append, read_all)
    assert found is not None
    assert found.path == store.path(1)
    assert len(said) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_keeps_the_last_the_best_and_milestones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        save(store, step, best_step=min(step, 2))
    store.wait()
    assert store.steps() == [2, 3, 6, 7, 8]


# Pieces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_blocks_are_the_elements_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for first in range(numbers.numel() + 1):
        for last in range(first, numbers.numel() + 1):
            found = []
            for start, size in blocks(shape, first, last):
                block = numbers[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]
                assert block.shape == size
                found += block.reshape(-1).tolist()
            assert found == list(range(first, last))


def cut(value: Tensor, cuts: list[int]) -> Shards:
    """`value` in runs of elements that end at `cuts`."""
    flat, pieces = value.reshape(-1), []
    for first, last in zip([0, *cuts], [*cuts, value.numel()], strict=True):
        position = first
        for start, size in blocks(tuple(value.shape), first, last):
            count = torch.Size(size).numel()
            pieces.append(Piece(start=start, values=flat[position : position + count].view(size)))
            position += count
    return Shards(shape=value.shape, pieces=tuple(pieces))


def test_pieces_are_read_however_they_were_cut(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    store = CheckpointStore(tmp_path)
    for step, shape in enumerate([(30,), (5, 6), (4, 3, 5)], start=1):
        value = torch.randn(shape)
        cuts = [sorted(generator.integers(0, value.numel(), 3).tolist()) for _ in range(2)]
        store.save(step, {"x": cut(value, cuts[0])}, {}, best_step=None)
        store.wait()
        target = torch.full(shape, -1.0, dtype=torch.float64)
        checkpoint = open_checkpoint(store.path(step))
        checkpoint.load({"x": cut(target, cuts[1])})
        assert torch.equal(target, value.double())
        some = Shards(shape=value.shape, pieces=cut(torch.zeros(shape), cuts[1]).pieces[:1])
        checkpoint.load({"x": some})
        (piece,) = some.pieces
        ends = zip(piece.start, piece.values.shape, strict=True)
        assert torch.equal(piece.values, value[tuple(slice(start, start + length) for start, length in ends)])


def test_large_pieces_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus.checkpoint.shards._PIECE", 4)
    tensors = {"matrix": torch.arange(30.0).reshape(5, 6), "one": torch.tensor(1.0), "none": torch.zeros(0, 3)}
    store = CheckpointStore(tmp_path)
    store.save(1, {name: Shards.whole(value) for name, value in tensors.items() if len(name) > 3}, {}, best_step=None)
    store.wait()
    write_directory(tmp_path / "whole", tensors.items(), {})
    for path, names in ((store.path(1), ["matrix"]), (tmp_path / "whole", list(tensors))):
        checkpoint = open_checkpoint(path)
        assert max(torch.Size(piece.shape).numel() for piece in checkpoint.tensors["matrix"].pieces) == 4
        for name in names:
            assert torch.equal(checkpoint.read(name), tensors[name])


def test_what_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path / "c", TENSORS.items(), {})
    checkpoint = open_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match="tensor other is missing"):
        checkpoint.load({"other": Shards.whole(torch.zeros(2))})
    with pytest.raises(CheckpointError, match=r"tensor half is of shape \(4,\), and should have shape \(5,\)"):
        checkpoint.load({"half": Shards.whole(torch.zeros(5))})


def test_elements_that_no_rank_wrote_are_noticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    value = torch.zeros(4, 5)
    store.save(1, {"x": Shards(shape=value.shape, pieces=cut(value, [7]).pieces[1:])}, {}, best_step=None)
    with pytest.raises(CheckpointError, match="15 of 20 elements of x were written"):
        store.wait()
    assert not list(tmp_path.iterdir())


def test_random_states_survive_json() -> None:
    state = json.loads(json.dumps(capture_rng()))

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    first = draw()
    assert draw() != first
    restore_rng(state)
    assert draw() == first
