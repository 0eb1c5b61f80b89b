"""What a checkpoint directory holds: its files with their checksums, and where each logical tensor lies in them.

A logical tensor is whole and depends on no layout of ranks; it lies in pieces, which are blocks of it, in safetensors
files that the ranks wrote. The manifest is the directory's last file, and says so much of all others that damage to any
is found before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from janus.checkpoint.header import read_header

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 2
_FORMAT = "janus checkpoint"
_BLOCK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that must not be used, or cannot be written; the message names the file and the reason."""


class DamageError(CheckpointError):
    """A checkpoint that is not as it was written, or none at all: the one before it may be whole."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file's size and checksum.

    Attributes:
        checksum: `crc32:` or `sha256:` and hexadecimal digits; None for a file whose pieces have one each.
    """

    bytes: int
    checksum: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoredPiece:
    """A block of a logical tensor.

    Attributes:
        file, offset: where it lies, in bytes; row by row.
        start: of the block within the tensor, an index for each dimension.
        shape: of the block.
        crc32: of its bytes, which finds damage faster than a disk reads; None in a file with a checksum.
    """

    file: str
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A logical tensor.

    Attributes:
        pieces: cover it, without overlap.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of one directory.

    Attributes:
        files: by name, all but the manifest's own.
        tensors: by logical name.
    """

    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]

    def write(self, directory: Path) -> None:
        """As the directory's manifest."""
        content = {
            "format": _FORMAT,
            "format_version": FORMAT_VERSION,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "tensors": {
                name: {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "pieces": [asdict(piece) for piece in tensor.pieces],
                }
                for name, tensor in self.tensors.items()
            },
        }
        (directory / MANIFEST).write_text(json.dumps({**content, "crc32": _crc32_of(content)}))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory; an older format is brought up to date in memory.

    Raises:
        CheckpointError: it is of a newer format, or must not be read: the checkpoint may be whole.
        DamageError: it is missing or damaged.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DamageError(
            f"checkpoint {directory} is no directory: give one that training wrote, such as step_00001000"
        )
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        version = content.get("format_version", 1)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint file {path} is of format {version}, and this version reads up to {FORMAT_VERSION}: update "
                "janus-matris"
            )
        if version != FORMAT_VERSION:
            if version not in _UPGRADES:
                raise ValueError(f"it is of an unknown format, {version!r}")
            content = _UPGRADES[version](content, directory)
        if content.pop("crc32") != _crc32_of(content):
            raise ValueError("its checksum is not that of its content")
        return _parse(content)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"checkpoint file {path} must not be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise DamageError(f"checkpoint file {path} cannot be used: {reason}") from error


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compares the files with the manifest: sizes, and checksums of whole files. Pieces are verified as they are read.

    Raises:
        DamageError: a file is missing, truncated or changed.
    """
    for name, wanted in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DamageError(f"checkpoint file {path} is missing")
        if (size := path.stat().st_size) != wanted.bytes:
            raise DamageError(f"checkpoint file {path} is damaged: it has {size} bytes and should have {wanted.bytes}")
        if wanted.checksum is None:
            continue
        kind = wanted.checksum.partition(":")[0]
        try:
            found = fingerprint(path, kind)
        except OSError as error:
            raise DamageError(f"checkpoint file {path} cannot be read: {error}") from error
        if found != wanted:
            raise DamageError(f"checkpoint file {path} is damaged: its {kind} checksum is not the manifest's")


def fingerprint(path: Path, kind: str = "crc32") -> StoredFile:
    """Size and checksum of a file, as it is read.

    Raises:
        DamageError: an unknown kind of checksum.
    """
    if kind not in ("crc32", "sha256"):
        raise DamageError(f"checkpoint file {path} has a checksum of kind {kind!r}: crc32 and sha256 are known")
    digest, crc, size = hashlib.sha256(), 0, 0
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            block = memoryview(buffer)[:count]
            size += count
            if kind == "crc32":
                crc = zlib.crc32(block, crc)
            else:
                digest.update(block)
    return StoredFile(bytes=size, checksum=f"{kind}:{crc:08x}" if kind == "crc32" else f"{kind}:{digest.hexdigest()}")


def _parse(content: Mapping[str, Any]) -> Manifest:
    files = {str(name): StoredFile(**entry) for name, entry in content["files"].items()}
    tensors = {
        str(name): StoredTensor(
            dtype=getattr(torch, entry["dtype"]),
            shape=torch.Size(entry["shape"]),
            pieces=tuple(
                StoredPiece(**{**piece, "start": tuple(piece["start"]), "shape": tuple(piece["shape"])})
                for piece in entry["pieces"]
            ),
        )
        for name, entry in content["tensors"].items()
    }
    return Manifest(files=files, tensors=tensors)


def _crc32_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _from_1(content: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Format 1 (until November 2026): one file of whole tensors, and SHA-256 checksums; nothing else was said of them.

    The optimizer's step counts, one per parameter, are left out: they are the step of the checkpoint.
    """
    name = "tensors.safetensors"
    if content.keys() != {name, STATE}:
        raise ValueError("it is not that of a training checkpoint")
    files = {
        file: {"bytes": int(entry["bytes"]), "checksum": f"sha256:{entry['sha256']}"} for file, entry in content.items()
    }
    if not (directory / name).is_file():
        raise ValueError(f"{directory / name} is missing")
    tensors = {}
    for key, entry in read_header(directory / name).items():
        if not key.startswith("optimizer/step/"):
            start = [0] * len(entry.shape)
            piece = {"file": name, "offset": entry.offset, "start": start, "shape": entry.shape, "crc32": None}
            tensors[key] = {"dtype": entry.dtype, "shape": entry.shape, "pieces": [piece]}
    upgraded = {"format": _FORMAT, "format_version": FORMAT_VERSION, "files": files, "tensors": tensors}
    return {**upgraded, "crc32": _crc32_of(upgraded)}


_UPGRADES = {1: _from_1}
"""By version: makes the content of the newest format out of it."""
