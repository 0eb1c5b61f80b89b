"""A labelled structure, and how it lies in a store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus.data.store import Columns, Field
from matris.graph.build import GraphSize
from matris.graph.structure import Labels, Structure

LABEL_NAMES = ("energy", "forces", "stress", "magmoms")
MAX_TASK_BYTES = 32
MAX_GROUP_BYTES = 64

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
    Field(name="group", dtype=f"S{MAX_GROUP_BYTES}", optional=True),
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
        charge: total charge, e; NaN where the data do not say.
        spin: spin multiplicity 2S+1; 0 where the data do not say.
        group: value of the key by which data sets are split (a trajectory, a composition); None without such a key.
    """

    identifier: str
    structure: Structure
    labels: Labels
    task: str = "default"
    charge: float = math.nan
    spin: float = 0.0
    group: str | None = None


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
        "group": None if sample.group is None else _group_bytes(sample.group),
        "identifier": np.frombuffer(sample.identifier.encode(), np.uint8),
        "size": (size.num_atoms, size.num_edges, size.num_angles),
    }


def _group_bytes(group: str) -> bytes:
    """The value itself, or of a long one its beginning and a digest: equal exactly where the values are."""
    value = group.encode()
    if len(value) <= MAX_GROUP_BYTES:
        return value
    digest = hashlib.sha256(value).hexdigest()[: MAX_GROUP_BYTES // 2]
    return value[: MAX_GROUP_BYTES // 2 - 1].decode(errors="ignore").encode() + b"~" + digest.encode()


def samples_of(columns: Columns, *, tasks: Sequence[str] | None = None) -> list[Sample]:
    """The samples that `to_record` was given, of these tasks or of their own.

    Made together, because for small structures most of the time of reading is what is done for each of them alone.
    """
    values = columns.values
    atoms = columns.rows("atoms")
    structures = Structure.several(
        numbers=values["numbers"].astype(np.int64),
        positions=values["positions"],
        cells=values["cell"],
        pbc=values["pbc"].astype(bool),
        atoms=atoms,
    )
    groups = columns.present("group", values["group"].tolist())
    own = tasks or [task.decode() for task in values["task"].tolist()]
    text = values["identifier"].tobytes()
    return [
        Sample(
            identifier=text[letters].decode(),
            structure=structure,
            labels=labels,
            task=task,
            charge=charge,
            spin=spin,
            group=None if group is None else group.decode(),
        )
        for letters, structure, labels, task, charge, spin, group in zip(
            columns.rows("identifier"),
            structures,
            _labels_of(columns, atoms),
            own,
            values["charge"].tolist(),
            values["spin"].tolist(),
            groups,
            strict=True,
        )
    ]


def _labels_of(columns: Columns, atoms: Sequence[slice]) -> list[Labels]:
    values = columns.values
    each = {
        "energy": values["energy"].tolist(),
        "forces": (values["forces"][own] for own in atoms),
        "stress": values["stress"],
        "magmoms": (values["magmoms"][own] for own in atoms),
    }
    present = zip(*(columns.present(name, each[name]) for name in LABEL_NAMES), strict=True)
    return [Labels(energy=e, forces=f, stress=s, magmoms=m) for e, f, s, m in present]
