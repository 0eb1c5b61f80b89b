"""A directory that exists whole or not at all: tensors, a JSON state, and a manifest of sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.safetensors"
TEMPORARY = ".writing-"
"""Prefix of directories that are not finished; whoever finds one may delete it."""


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message names the file and the reason."""


def write_directory(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, flushes it to the disk and renames it to `path`.

    A crash at any moment leaves either no `path` or a whole one. An existing `path` is replaced.

    Args:
        tensors: name -> tensor, on any device.
        state: JSON-ready values.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS)
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    manifest = {name: _fingerprint(temporary / name) for name in (TENSORS, STATE)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (TENSORS, STATE, MANIFEST, "."):
        _flush(temporary / name)
    if path.exists():
        # A directory cannot be renamed onto a full one. The old one has the same step, hence the same content.
        shutil.rmtree(path)
    temporary.rename(path)
    _flush(path.parent)


def verify_directory(path: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} is no directory: give one that training wrote, such as step_00001000")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint file {path / MANIFEST} cannot be read: {error}") from error
    for name in (TENSORS, STATE):
        file = path / name
        if name not in entries or not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing, or its manifest does not list it")
        num_bytes, checksum = entries[name]
        if file.stat().st_size != num_bytes:
            raise CheckpointError(
                f"checkpoint file {file} is damaged: it has {file.stat().st_size} bytes and should have {num_bytes}"
            )
        if _fingerprint(file)["sha256"] != checksum:
            raise CheckpointError(f"checkpoint file {file} is damaged: its SHA-256 is not the manifest's")


def read_directory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verifies a checkpoint and returns its tensors (on the CPU) and its state.

    Raises:
        CheckpointError: as `verify_directory`.
    """
    verify_directory(path)
    return load_file(path / TENSORS), json.loads((path / STATE).read_text())


def _fingerprint(file: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
