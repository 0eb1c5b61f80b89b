"""Errors of a model: sums that add up exactly over batches and ranks, and the figures made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from janus.ops.segment import segment_sum
from matris.graph.batch import GraphBatch, LabelBatch
from matris.model import Prediction
from matris.units import GPA, MILLI

QUANTITIES = ("energy", "forces", "stress", "magmoms")
"""Energy per atom; force components; Voigt components of the stress; magnetic moments."""

_NAMES = (
    ("energy", "meV_per_atom", MILLI),
    ("forces", "meV_per_A", MILLI),
    ("stress", "meV_per_A3", MILLI),
    ("stress", "GPa", 1.0 / GPA),
    ("magmoms", "muB", 1.0),
)
METRIC_NAMES = tuple(f"{quantity}_{kind}_{unit}" for quantity, unit, _ in _NAMES for kind in ("mae", "rmse"))

VOIGT = (0, 4, 8, 5, 2, 1)
"""xx yy zz yz xz xy in a flattened 3x3 tensor."""


def error_sums(
    prediction: Prediction,
    labels: LabelBatch,
    batch: GraphBatch,
    task_index: Tensor,
    num_tasks: int,
    *,
    is_first: bool = True,
) -> Tensor:
    """Sums over a batch of G structures, by task.

    Args:
        task_index: (G,) int64.
        is_first: whether this is the first rank of the graph axis: energies and stresses, known to all, count there.

    Returns:
        (num_tasks, 4, 3) float64, detached: per quantity of `QUANTITIES` the number of labelled components, the sum of
        absolute errors and the sum of squared errors, in eV, Angstrom and Bohr magnetons.
    """
    num_atoms = batch.atoms_per_structure
    structures = torch.zeros(batch.num_structures, len(QUANTITIES), 3, dtype=torch.float64, device=num_atoms.device)

    def add(quantity: int, error: Tensor, mask: Tensor, per_atom: bool) -> None:
        """`error` is (G or N, components)."""
        error = error.detach().double()
        sums = torch.stack([torch.ones_like(error), error.abs(), error.square()], dim=2).sum(dim=1)
        if per_atom:
            sums = segment_sum(sums, batch.structure_index, batch.num_structures)
        structures[:, quantity] = torch.where(mask[:, None], sums, 0.0)

    add(0, ((prediction.energy - labels.energy) / num_atoms)[:, None], labels.energy_mask & is_first, per_atom=False)
    if prediction.forces is not None:
        add(1, prediction.forces - labels.forces, labels.forces_mask, per_atom=True)
    if prediction.stress is not None:
        error = (prediction.stress - labels.stress).flatten(1)[:, VOIGT]
        add(2, error, labels.stress_mask & is_first, per_atom=False)
    if prediction.magmoms is not None:
        add(3, (prediction.magmoms - labels.magmoms.abs())[:, None], labels.magmoms_mask, per_atom=True)
    tasks = torch.zeros(num_tasks, len(QUANTITIES), 3, dtype=torch.float64, device=num_atoms.device)
    return tasks.index_add_(0, task_index, structures)


def metrics(sums: np.ndarray) -> dict[str, float]:
    """Named errors of (4, 3) sums, `METRIC_NAMES` in meV, Angstrom, GPa, muB; NaN where there is no label."""
    values = {}
    for quantity, unit, factor in _NAMES:
        count, absolute, squared = sums[QUANTITIES.index(quantity)]
        values[f"{quantity}_mae_{unit}"] = factor * absolute / count if count else math.nan
        values[f"{quantity}_rmse_{unit}"] = factor * math.sqrt(squared / count) if count else math.nan
    return values


def metrics_report(sums: np.ndarray, task_names: Sequence[str]) -> dict[str, object]:
    """JSON-ready errors: overall ones by name, counts of labels, and the same for each task under `tasks`.

    Args:
        sums: (num_tasks, 4, 3).
    """

    def entry(part: np.ndarray) -> dict[str, object]:
        named = {name: value for name, value in metrics(part).items() if not math.isnan(value)}
        counts = {quantity: round(part[index, 0]) for index, quantity in enumerate(QUANTITIES)}
        return {**named, "num_labels": counts}

    return {
        **entry(sums.sum(axis=0)),
        "tasks": {name: entry(part) for name, part in zip(task_names, sums, strict=True) if part[:, 0].any()},
    }


def metrics_line(values: dict[str, float]) -> str:
    """The errors that people look at first."""
    shown = [("E", "energy_mae_meV_per_atom", "meV/atom"), ("F", "forces_mae_meV_per_A", "meV/A")]
    shown += [("S", "stress_mae_meV_per_A3", "meV/A^3"), ("M", "magmoms_mae_muB", "muB")]
    known = [(letter, values.get(name, math.nan), unit) for letter, name, unit in shown]
    return "  ".join(f"{letter} {value:.4g} {unit}" for letter, value, unit in known if not math.isnan(value))
