"""A directory that exists whole or not at all: tensors, a JSON state, and a manifest of what there should be."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus.checkpoint.header import make_header
from janus.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    DamageError,
    Manifest,
    StoredFile,
    StoredPiece,
    StoredTensor,
    fingerprint,
    read_manifest,
    verify_files,
)
from janus.checkpoint.shards import Piece, Read, Shards

WRITING, DELETING = ".writing-", ".deleting-"
"""Prefixes of directories that are not finished, or not wanted; whoever finds one may delete it."""
_BLOCK = 1 << 22
_AT_ONCE = 1 << 25
"""Bytes between two requests to the disk to write what it has been given."""
_THREADS = 8
"""That read pieces at once: the disk should always have something to fetch while checksums are computed."""
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
            pieces = [(name, piece) for name, value in group.items() for piece in Shards.whole(value).cut().pieces]
            file = staging / f"tensors_{number:05d}.safetensors"
            files[file.name], stored = write_pieces(file, pieces)
            for name, value in group.items():
                own = tuple(place for (key, _), place in zip(pieces, stored, strict=True) if key == name)
                index[name] = StoredTensor(dtype=value.dtype, shape=value.shape, pieces=own)
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
    new = [parent for parent in path.parents if not parent.exists()]
    staging.mkdir(parents=True)
    for parent in new:
        flush(parent.parent)
    return staging


def staging_of(path: Path) -> Path:
    """Where the checkpoint `path` lies before it is finished."""
    return path.with_name(WRITING + path.name)


def write_pieces(path: Path, pieces: Sequence[tuple[str, Piece]]) -> tuple[StoredFile, list[StoredPiece]]:
    """Writes blocks of tensors, in the host's memory, to a file that survives a power cut.

    Args:
        pieces: each with the name of its tensor.

    Returns:
        The file, and where in it each block lies.
    """
    tensors = {f"{name}@{','.join(map(str, piece.start))}": piece.values.contiguous() for name, piece in pieces}
    head, offsets = make_header(tensors)
    with ThreadPoolExecutor(2) as pool, path.open("wb") as stream:
        sums = pool.submit(lambda: {key: zlib.crc32(_bytes(value)) for key, value in tensors.items()})
        # The disk begins at once, and not when the system's memory is full of what it should write.
        flushed, behind = pool.submit(os.fsync, stream.fileno()), 0
        stream.write(head)
        for key in offsets:
            content = _bytes(tensors[key])
            stream.write(content)
            behind += len(content)
            if behind > _AT_ONCE and flushed.done():
                flushed.result()
                flushed, behind = pool.submit(os.fsync, stream.fileno()), 0
        stream.flush()
        flushed.result()  # the system tells a failure once, and maybe told it to this one
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # nobody reads it soon: the memory is better used for training data
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stored = [
            StoredPiece(
                file=path.name,
                offset=offsets[key],
                start=piece.start,
                shape=tuple(piece.values.shape),
                crc32=sums.result()[key],
            )
            for key, (_, piece) in zip(tensors, pieces, strict=True)
        ]
    return StoredFile(bytes=path.stat().st_size), stored


def _bytes(value: Tensor) -> memoryview:
    """Of a contiguous tensor in the host's memory; the same memory."""
    return value.detach().view(-1).view(torch.uint8).numpy().data


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
            DamageError: what was read is not what was written; pieces may be filled already.
        """
        for name, wanted in shards.items():
            stored = self.tensors.get(name)
            if stored is None or stored.shape != wanted.shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
                raise CheckpointError(
                    f"checkpoint {self.path}: tensor {name} is {found}, and should have shape {tuple(wanted.shape)}"
                )
        jobs: dict[StoredPiece, tuple[StoredPiece, torch.dtype, list[Read]]] = {}
        for name, wanted in shards.items():
            stored = self.tensors[name]
            for read in wanted.reads(name, stored):
                jobs.setdefault(read.piece, (read.piece, stored.dtype, []))[2].append(read)
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda job: self._read(*job), jobs.values()):
                pass

    def verify(self) -> None:
        """Reads all pieces.

        Raises:
            DamageError: one is not as it was written.
        """
        pieces = [(piece, stored.dtype) for stored in self.tensors.values() for piece in stored.pieces]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda job: self._read(job[0], job[1], ()), pieces):
                pass

    def _read(self, piece: StoredPiece, dtype: torch.dtype, reads: Sequence[Read]) -> None:
        """Reads and verifies a piece, and copies from it."""
        path = self.path / piece.file
        first = next((read for read in reads if read.takes_as_it_is(dtype)), None)
        value = torch.empty(piece.shape, dtype=dtype) if first is None else first.target.detach()
        content, crc = _bytes(value), 0
        try:
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), piece.offset, len(content), os.POSIX_FADV_WILLNEED)
                file.seek(piece.offset)
                for begin in range(0, len(content), _BLOCK):
                    block = content[begin : begin + _BLOCK]
                    if file.readinto(block) != len(block):
                        raise DamageError(f"checkpoint file {path} is damaged: it ends before its last piece")
                    crc = zlib.crc32(block, crc)
        except OSError as error:
            raise DamageError(f"checkpoint file {path} cannot be read: {error}") from error
        if piece.crc32 is not None and crc != piece.crc32:
            raise DamageError(
                f"checkpoint file {path} is damaged: the crc32 checksum of the piece at byte {piece.offset} is not "
                "the manifest's"
            )
        with torch.no_grad():
            for read in reads:
                if read is not first:
                    read.target.copy_(value[read.within])


def verify_directory(path: Path) -> None:
    """Compares everything in a checkpoint with its manifest.

    Raises:
        DamageError: a file is missing, truncated or changed.
    """
    open_checkpoint(path).verify()


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint to read from. Its files are verified, the tensors in them as they are read.

    Raises:
        DamageError: a file is missing, truncated or changed.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return Checkpoint(path=path, manifest=manifest, state=json.loads((path / STATE).read_text()))


def read_directory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, whole, in the host's memory; and its state.

    Raises:
        DamageError: as `verify_directory`.
    """
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}, dict(checkpoint.state)
