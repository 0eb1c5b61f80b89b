"""Models in Megatron's format `torch_dist`, under the names that `MatRIS.sharded_state_dict` gives their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus.checkpoint.torch_dist import open_torch_dist, write_torch_dist
from matris.convert.facts import export_facts, stored_model
from matris.exported import StoredModel

_FACTS = "janus_matris"
"""Entry of `common.pt`: what Megatron has no place for."""
_PREFIXES = ("", "module.", "model.", "module.model.")
_VERSION = 3.0
"""Of Megatron-LM's checkpoints, which its loader compares."""


def save_megatron(stored: StoredModel, path: Path) -> None:
    """Writes a directory that `megatron.core.dist_checkpointing.load` reads, at any layout.

    Raises:
        FileExistsError: `path` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    facts = {
        "model": stored.model.hyper.to_dict(),
        "export": export_facts(stored.model),
        "provenance": dict(stored.provenance),
    }
    common = {"iteration": 0, "checkpoint_version": _VERSION, _FACTS: facts}
    write_torch_dist(path, stored.like, stored.read, common)


def open_megatron(path: Path, facts: StoredModel | None) -> StoredModel:
    """The weights of a directory of Megatron's; its optimizer is not read.

    Args:
        facts: a model that says what this one is, where the directory does not: one that we have not written.

    Raises:
        CheckpointError: it is damaged, or a pickle in it holds more than it may.
        ValueError: it is not of a MatRIS model.
    """
    content = open_torch_dist(path)
    known = content.common.get(_FACTS)
    if isinstance(known, Mapping):
        said: tuple[Any, Any, Any] = (known.get("model"), known.get("export"), known.get("provenance"))
    elif facts is not None:
        said = (facts.model.hyper.to_dict(), export_facts(facts.model), {"converted_from": "Megatron torch_dist"})
    else:
        raise ValueError(
            f"{path} does not say what its model is, for another program wrote it: give --like DIR, a model directory "
            "with the same hyper-parameters and elements"
        )
    names = [name for name in content.like if not name.startswith(("optimizer.", "chained_"))]
    prefix = next((each for each in _PREFIXES if f"{each}atom_embedding.table" in names), "")
    ours = {name.removeprefix(prefix): content.like[name] for name in names if name.startswith(prefix)}
    provenance = {**(said[2] or {}), "iteration": content.common.get("iteration")}
    return stored_model(
        said[0],
        said[1],
        like=ours,
        read=lambda name: content.read(prefix + name),
        provenance=provenance,
        origin=str(path),
    )
