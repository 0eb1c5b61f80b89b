"""Errors and parity points of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from janus.comm.collectives import gather_objects, reduce_sums
from janus.data.loader import StepLoader
from janus.data.packing import Budget
from janus.data.sampler import SequentialSampler
from janus.mesh import Mesh
from janus.training.task import EvaluationSource
from matris.config import LossConfig
from matris.data.dataset import Collate, MicroBatch, StructureDataset, label_totals
from matris.metrics import QUANTITIES, VOIGT, error_sums, metrics_report
from matris.model import MatRIS, Prediction
from matris.task import MatRISTask

MAX_POINTS = 20_000
"""Parity points kept per quantity, spread evenly over the data."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Errors of a model on a data set.

    Attributes:
        report: JSON-ready, see `metrics_report`, with `num_structures`.
        points: per quantity of `metrics.QUANTITIES` (n, 2) labels and predictions: energy per atom above the model's
            reference energies (eV), force components (eV/A), stress (eV/A^3), magnetic moments (muB).
    """

    report: dict[str, Any]
    points: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Portions:
    """How a data set is cut for evaluation.

    Attributes:
        batch_size: structures over all ranks at a time.
        budget: limits of one micro-batch.
        num_workers: processes per rank that build graphs ahead.
        partitioner: how structures are divided over the graph axis.
    """

    batch_size: int = 16
    budget: Budget | None = None
    num_workers: int = 0
    partitioner: str = "morton"


def evaluation_source(dataset: StructureDataset, model: MatRIS, mesh: Mesh, portions: Portions) -> EvaluationSource:
    """Every structure once, on one rank, or on the ranks of one graph axis.

    Args:
        model: made for the same mesh.
        mesh: ranks to divide the structures among.
    Raises:
        ValueError: structures that exceed the budget on their own.
    """
    sampler = SequentialSampler(len(dataset), global_batch_size=portions.batch_size)
    loader = StepLoader(
        dataset,
        sampler,
        collate_for(model, dataset, portions.partitioner),
        num_steps=sampler.num_steps,
        rank=mesh.batch.rank,
        world_size=mesh.batch.size,
        budget=portions.budget,
        same_count=mesh.in_step,
        num_workers=portions.num_workers,
        pin_memory=mesh.device.type == "cuda",
    )

    def micro_batches() -> Iterator[MicroBatch]:
        for step in loader:
            yield from step.micro_batches

    return EvaluationSource(micro_batches=micro_batches, totals=label_totals(dataset))


def collate_for(model: MatRIS, dataset: StructureDataset, partitioner: str) -> Collate:
    """Samples to micro-batches with the model's cutoffs, divided over its graph axis.

    Raises:
        ValueError: the data set does not count its levels of theory as the model does.
    """
    if model.hyper.tasks and dataset.task_names != model.hyper.tasks:
        raise ValueError(
            f"the data set has the tasks {', '.join(dataset.task_names)}, and the model {', '.join(model.hyper.tasks)}:"
            " say which of them the data are, with `of_task` or `StructureDataset.joined`"
        )
    return Collate(
        pairwise_cutoff=model.hyper.pairwise_cutoff,
        three_body_cutoff=model.hyper.three_body_cutoff,
        task_names=dataset.task_names,
        num_parts=model.mesh.graph.size,
        part=model.mesh.graph.rank,
        partitioner=partitioner,
    )


def evaluate_dataset(model: MatRIS, dataset: StructureDataset, mesh: Mesh, portions: Portions) -> Evaluation:
    """Exact errors over a data set; all-reduces the error sums once and gathers the parity points."""
    source = evaluation_source(dataset, model, mesh, portions)
    task = MatRISTask(model, LossConfig(), dataset.task_names)
    sums = torch.zeros(len(dataset.task_names), len(QUANTITIES), 3, dtype=torch.float64, device=mesh.device)
    points: dict[str, list[np.ndarray]] = {quantity: [] for quantity in QUANTITIES}
    strides = _strides(dataset)
    for micro_batch in source.micro_batches():
        batch = micro_batch.to(mesh.device)
        prediction = task.predict(batch, source.totals, training=False)
        sums += error_sums(
            prediction,
            batch.labels,
            batch.graph,
            batch.graph.task,
            len(dataset.task_names),
            is_first=mesh.graph.rank == 0,
        )
        for quantity, values in _points(prediction, batch, mesh).items():
            points[quantity].append(values[:: strides[quantity]].cpu().numpy())
    table = reduce_sums(sums, mesh).cpu().numpy()
    gathered = gather_objects(
        {name: np.concatenate([np.empty((0, 2)), *parts]) for name, parts in points.items()}, mesh
    )
    return Evaluation(
        report={"num_structures": len(dataset), **metrics_report(table, dataset.task_names)},
        points={name: np.concatenate([part[name] for part in gathered]) for name in QUANTITIES},
    )


def _points(prediction: Prediction, batch: MicroBatch, mesh: Mesh) -> dict[str, Tensor]:
    """(n, 2) labels and predictions of a micro-batch, where there are labels; each on one rank only."""
    if mesh.tensor.rank > 0:
        return {}
    labels, graph = batch.labels, batch.graph
    atoms = graph.structure_index
    reference = prediction.reference_energy
    energies = torch.stack([labels.energy - reference, prediction.interaction_energy], dim=1)
    pairs = {"energy": (energies / graph.atoms_per_structure[:, None])[labels.energy_mask]}
    if prediction.forces is not None:
        forces = torch.stack([labels.forces, prediction.forces], dim=2)
        pairs["forces"] = forces[labels.forces_mask[atoms]].reshape(-1, 2)
    if prediction.stress is not None:
        stress = torch.stack([labels.stress, prediction.stress], dim=3).flatten(1, 2)[:, VOIGT]
        pairs["stress"] = stress[labels.stress_mask].reshape(-1, 2)
    if prediction.magmoms is not None:
        magmoms = torch.stack([labels.magmoms.abs(), prediction.magmoms], dim=1)
        pairs["magmoms"] = magmoms[labels.magmoms_mask[atoms]]
    if mesh.graph.rank > 0:  # what all ranks of the graph axis know
        pairs.pop("energy")
        pairs.pop("stress", None)
    return pairs


def _strides(dataset: StructureDataset) -> dict[str, int]:
    """Which points to keep: every stride-th."""
    totals = label_totals(dataset)
    counts = {
        "energy": totals.energy_structures,
        "forces": 3 * totals.forces_atoms,
        "stress": 6 * totals.stress_structures,
        "magmoms": totals.magmoms_atoms,
    }
    return {name: max(1, int(count) // MAX_POINTS) for name, count in counts.items()}
