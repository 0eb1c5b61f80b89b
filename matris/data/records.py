"""A labelled structure, and how it lies in a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus.data.store import Field
from matris.graph.build import GraphSize
from matris.graph.structure import Labels, Structure

LABEL_NAMES = ("energy", "forces", "stress", "magmoms")
MAX_TASK_BYTES = 32

FIELDS = (
    Field(name="numbers", dtype="uint8", axis="atoms"),
    Field(name="positions", dtype="float64", shape=(3,), axis="atoms"),
    Field(name="cell", dtype="float64", shape=(3, 3)),
    Field(name="pbc", dtype="uint8", shape=(3,)),
    Field(name="energy", dtype="float64", optional=True),
    Field(name="forces", dtype="float64", shape=(3,), axis="atoms", optional=True),
    Field(name="stress", dtype="float64", shape=(3, 3), optional=True),
    Field(name="magmoms", dtype="float64", axis="atoms", optional=True),
    Field(name="charge", dtype="float64"),
    Field(name="spin", dtype="float64"),
    Field(name="task", dtype=f"S{MAX_TASK_BYTES}"),
    Field(name="identifier", dtype="uint8", axis="identifier"),
    Field(name="size", dtype="int64", shape=(3,)),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A labelled structure.

    Attributes:
        identifier: where it comes from, `file:frame` with frames counted from 0.
        structure, labels: see there; eV, Angstrom.
        task: name of the level of theory whose reference energies and metrics apply.
        charge: total charge, e.
        spin: spin multiplicity 2S+1; 0 where the data do not say.
    """

    identifier: str
    structure: Structure
    labels: Labels
    task: str = "default"
    charge: float = 0.0
    spin: float = 0.0


def to_record(sample: Sample, size: GraphSize) -> dict[str, Any]:
    """Values of `FIELDS`."""
    task = sample.task.encode()
    if not 0 < len(task) <= MAX_TASK_BYTES:
        raise ValueError(f"task name {sample.task!r} has {len(task)} bytes: allowed are 1 to {MAX_TASK_BYTES}")
    structure, labels = sample.structure, sample.labels
    return {
        "numbers": structure.numbers,
        "positions": structure.positions,
        "cell": structure.cell,
        "pbc": structure.pbc,
        **{name: getattr(labels, name) for name in LABEL_NAMES},
        "charge": sample.charge,
        "spin": sample.spin,
        "task": task,
        "identifier": np.frombuffer(sample.identifier.encode(), np.uint8),
        "size": (size.num_atoms, size.num_edges, size.num_angles),
    }


def from_record(record: Mapping[str, Any]) -> Sample:
    """The sample that `to_record` was given."""
    energy = record["energy"]
    return Sample(
        identifier=record["identifier"].tobytes().decode(),
        structure=Structure(
            numbers=record["numbers"].astype(np.int64),
            positions=record["positions"],
            cell=record["cell"],
            pbc=record["pbc"].astype(bool),
        ),
        labels=Labels(
            energy=None if energy is None else float(energy),
            forces=record["forces"],
            stress=record["stress"],
            magmoms=record["magmoms"],
        ),
        task=bytes(record["task"]).decode(),
        charge=float(record["charge"]),
        spin=float(record["spin"]),
    )
