"""Training checkpoints as models, and models as checkpoints to start from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus.checkpoint import Checkpoint, CheckpointError, open_checkpoint, write_directory
from matris.convert.facts import export_facts, stored_model
from matris.exported import CONFIG, StoredModel, read_config

_EXPORTED = ("last", "best")


def open_training(path: Path, *, averaged: bool) -> StoredModel:
    """The model of a training checkpoint of any layout.

    Args:
        averaged: take the averaged weights, which evaluations and exports of a run use.

    Raises:
        CheckpointError: it is damaged.
        ValueError: it has no averaged weights, or does not say what its model is.
    """
    checkpoint = open_checkpoint(path)
    state = checkpoint.state
    names = checkpoint.tensors
    keys = {name.removeprefix("model/"): name for name in names if name.startswith("model/")}
    if averaged:
        if int(state.get("step", 0)) > 0 and not any(name.startswith("ema/") for name in names):
            raise CheckpointError(f"checkpoint {path} has no averaged weights: give --weights raw")
        # Only what is trained is averaged.
        keys |= {name: f"ema/{name}" for name in keys if f"ema/{name}" in names}
    like = {name: _meta(checkpoint, key) for name, key in keys.items()}
    settings = state.get("settings")
    provenance = {
        **(state.get("provenance") or {"settings": settings}),
        "step": state.get("step"),
        "weights": "averaged" if averaged else "raw",
        "validation": state.get("validation"),
    }
    return stored_model(
        settings.get("model") if isinstance(settings, Mapping) else None,
        state.get("export") or _facts_of_run(path),
        like=like,
        read=lambda name: checkpoint.read(keys[name]),
        provenance=provenance,
        origin=f"checkpoint {path}",
    )


def save_training(stored: StoredModel, path: Path) -> None:
    """A checkpoint of no updates, for `train --training.resume PATH` at any layout.

    It has weights alone: the average begins with them, and the optimizer without moments.

    Raises:
        FileExistsError: `path` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    state: dict[str, Any] = {
        "step": 0,
        "best_step": None,
        "best_loss": None,
        "validation": None,
        "settings": {"model": stored.model.hyper.to_dict()},
        "provenance": dict(stored.provenance),
        "export": export_facts(stored.model),
        "rng": [],
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in stored.like:
            yield f"model/{name}", stored.read(name)

    write_directory(path, tensors(), json.loads(json.dumps(state)))


def _meta(checkpoint: Checkpoint, key: str) -> Tensor:
    tensor = checkpoint.tensors[key]
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _facts_of_run(path: Path) -> Mapping[str, Any]:
    """Checkpoints of format 1 do not say which elements they know: a model that their run has exported does."""
    for name in _EXPORTED:
        directory = path.parent.parent / name
        if (directory / CONFIG).is_file():
            config = read_config(directory)
            return {"task_elements": {}, **config}
    raise ValueError(
        f"checkpoint {path} is of an older format, which does not say which elements its model knows, and its run has "
        f"exported no model to ask ({path.parent.parent / _EXPORTED[0]}): continue the run for an update to save anew"
    )
