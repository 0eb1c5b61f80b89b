"""What a file or directory is, told from its content."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path


class Kind(str, Enum):
    """A format of weights."""

    model = "model"
    reference = "reference"
    checkpoint = "checkpoint"
    torch_dist = "torch_dist"


class Target(str, Enum):
    """What can be made: a format, or a model directory with experts (`moe`)."""

    model = "model"
    reference = "reference"
    checkpoint = "checkpoint"
    torch_dist = "torch_dist"
    moe = "moe"


_RUN = "checkpoints"
_ITERATION = "latest_checkpointed_iteration.txt"


def recognise(path: Path) -> tuple[Kind, Path]:
    """The format, and where exactly: of a run directory its newest valid checkpoint, of a directory of Megatron-LM the
    iteration that it names as its latest.

    Raises:
        ValueError: it does not exist, or is nothing that is known.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a model directory, a checkpoint or a run")
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".distcp", ".pt", ".yaml"):
            raise ValueError(f"{path} is one file of several: give the directory that it lies in")
        return Kind.reference, path
    if (path / "config.json").is_file():
        return Kind.model, path
    if (path / "manifest.json").is_file() or re.fullmatch(r"step_\d{8,}", path.name):
        return Kind.checkpoint, path
    if (path / "metadata.json").is_file():
        return Kind.torch_dist, path
    if (path / _ITERATION).is_file():
        return Kind.torch_dist, path / _iteration(path / _ITERATION)
    for folder in (path / _RUN, path):
        if folder.is_dir() and any(re.fullmatch(r"step_\d{8,}", entry.name) for entry in folder.iterdir()):
            return Kind.checkpoint, _newest(folder)
    raise ValueError(
        f"{path} is nothing that is known: a model directory has config.json, a training checkpoint (step_00001000) "
        "manifest.json, a run has checkpoints/, a Megatron checkpoint metadata.json, or its folder "
        f"{_ITERATION}"
    )


def _newest(folder: Path) -> Path:
    """The newest checkpoint that is valid; nothing in the folder is changed, for its run may be going on."""
    from janus.checkpoint import CheckpointError, CheckpointStore, verify_directory

    store, faults = CheckpointStore(folder), []
    for path in map(store.path, reversed(store.steps())):
        try:
            verify_directory(path)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            for fault in faults:
                print(f"passed over: {fault}")
            return path
    raise ValueError(f"{folder} has no valid checkpoint: {'; '.join(faults)}")


def _iteration(path: Path) -> str:
    text = path.read_text().strip()
    if not (text.isdigit() or text == "release"):
        raise ValueError(f"{path} names the iteration {text[:20]!r}: it should be a number")
    return text if text == "release" else f"iter_{int(text):07d}"
