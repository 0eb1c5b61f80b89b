"""A directory that exists whole or not at all: tensors, a JSON state, and a manifest of what there should be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from janus.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    Manifest,
    StoredFile,
    StoredPiece,
    StoredTensor,
    fingerprint,
    read_manifest,
    verify_files,
)
from janus.checkpoint.shards import Shards

WRITING, DELETING = ".writing-", ".deleting-"
"""Prefixes of directories that are not finished, or not wanted; whoever finds one may delete it."""
_FILE_BYTES = 2 << 30
"""A process that writes tensor after tensor begins another file when one has this size."""


def write_directory(path: Path, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint of whole tensors from one process, one after the other.

    Args:
        path: does not exist yet. A crash at any moment leaves either no `path` or a whole one.
        tensors: logical name and tensor; no more than 2 GiB of them are held at a time, or a single one.
        state: JSON-ready values.

    Raises:
        FileExistsError: `path` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another directory, or remove it first")
    staging = begin(path)
    try:
        files: dict[str, StoredFile] = {}
        index: dict[str, StoredTensor] = {}
        for number, group in enumerate(_groups(tensors)):
            name = f"tensors_{number:05d}.safetensors"
            files[name] = write_tensors(staging / name, group)
            for key, value in group.items():
                whole = StoredPiece(file=name, key=key, start=(0,) * value.ndim, shape=tuple(value.shape))
                index[key] = StoredTensor(dtype=value.dtype, shape=value.shape, pieces=(whole,))
        finish(path, Manifest(files=files, tensors=index), state)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _groups(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors:
        if group and size + value.nbytes > _FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = value.detach().cpu().contiguous()
        size += value.nbytes
    yield group


# The steps of writing ------------------------------------------------------------------------------------------------


def begin(path: Path) -> Path:
    """Makes the empty directory in which the checkpoint `path` is written."""
    staging = staging_of(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def staging_of(path: Path) -> Path:
    """Where the checkpoint `path` lies before it is finished."""
    return path.with_name(WRITING + path.name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Writes tensors of the host's memory to a file that survives a power cut.

    The checksum is that of what the file gives back, taken while the disk works.
    """
    save_file(dict(tensors), path)
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush, path)
        stored = fingerprint(path)
        flushed.result()
    return stored


def finish(path: Path, manifest: Manifest, state: Mapping[str, Any]) -> None:
    """Adds the state and the manifest to what was written, and makes it the checkpoint `path` by one rename.

    Raises:
        CheckpointError: a file is not there as its writer left it, or a tensor lacks a piece.
    """
    staging = staging_of(path)
    for name, file in manifest.files.items():
        if not (staging / name).is_file() or (staging / name).stat().st_size != file.bytes:
            raise CheckpointError(
                f"checkpoint file {staging / name} was written by another rank and is not here: all ranks must see "
                "the same directory, so choose one on a shared file system"
            )
    for name, tensor in manifest.tensors.items():
        stored = sum(torch.Size(piece.shape).numel() for piece in tensor.pieces)
        if stored != tensor.shape.numel():
            raise CheckpointError(
                f"checkpoint {path}: {stored} of {tensor.shape.numel()} elements of {name} were written"
            )
    (staging / STATE).write_text(json.dumps(state, indent=1))
    flush(staging / STATE)
    Manifest(files={**manifest.files, STATE: fingerprint(staging / STATE)}, tensors=manifest.tensors).write(staging)
    flush(staging / MANIFEST)
    flush(staging)
    staging.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a checkpoint; it is either there whole, or not a checkpoint any more."""
    aside = path.with_name(DELETING + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint to read from.

    Attributes:
        path: its directory.
        manifest: what is in it.
        state: as it was written.
    """

    path: Path
    manifest: Manifest
    state: Mapping[str, Any] = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shape and type of each logical tensor, by name."""
        return self.manifest.tensors

    def read(self, name: str) -> Tensor:
        """A logical tensor, whole, in the host's memory."""
        stored = self.tensors[name]
        value = torch.empty(stored.shape, dtype=stored.dtype)
        self.load({name: Shards.whole(value)})
        return value

    def load(self, shards: Mapping[str, Shards]) -> None:
        """Fills the pieces with the values that belong there, however they were cut when they were written; other
        number formats are converted. Reads nothing that is not asked for.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name, wanted in shards.items():
            stored = self.tensors.get(name)
            if stored is None or stored.shape != wanted.shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
                raise CheckpointError(
                    f"checkpoint {self.path}: tensor {name} is {found}, and should have shape {tuple(wanted.shape)}"
                )
        with _opened(self.path) as file, torch.no_grad():
            for name, wanted in shards.items():
                for item in wanted.reads(name, self.tensors[name]):
                    source = file(item.piece.file).get_slice(item.piece.key)
                    item.target.copy_(source[item.within] if item.within else source[...])


@contextmanager
def _opened(directory: Path) -> Iterator[Any]:
    """Gives a function from a file's name to the open file."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def file(name: str) -> Any:
            if name not in files:
                files[name] = stack.enter_context(safe_open(directory / name, framework="pt"))
            return files[name]

        yield file


def verify_directory(path: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    verify_files(path, read_manifest(path))


def open_checkpoint(path: Path, *, verified: bool = False) -> Checkpoint:
    """A checkpoint to read from, verified unless it is already.

    Raises:
        CheckpointError: as `verify_directory`.
    """
    manifest = read_manifest(path)
    if not verified:
        verify_files(path, manifest)
    return Checkpoint(path=path, manifest=manifest, state=json.loads((path / STATE).read_text()))


def read_directory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, whole, in the host's memory; and its state.

    Raises:
        CheckpointError: as `verify_directory`.
    """
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}, dict(checkpoint.state)
