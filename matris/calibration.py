"""What structures cost a rank, as the packing of micro-batches wants to know it: by formula, or timed on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus.comm.collectives import broadcast_object
from janus.data.cost import CostModel, fit_cost
from janus.data.packing import Budget, plan_micro_batches
from janus.mesh import Mesh
from janus.telemetry import Stopwatch
from janus.training.learner import Learner
from janus.training.step import accumulate_gradients
from matris.config import ModelConfig
from matris.cost import Counts, Derivatives, step_flops
from matris.data.dataset import MicroBatch, StructureDataset, label_totals
from matris.task import MatRISTask

_REPETITIONS = 3
"""Of which the fastest counts, after one that is not timed."""


def formula_cost(hyper: ModelConfig) -> CostModel:
    """FLOPs of matrix products in a training step, for each atom, directed edge and angle."""

    def flops(atoms: int, edges: int, angles: int) -> int:
        counts = Counts(structures=1, atoms=atoms, edges=edges, undirected=edges // 2, angles=angles)
        return step_flops(hyper, counts, Derivatives()).step

    constant = flops(0, 0, 0)
    return CostModel(
        constant=float(constant),
        weights=(
            float(flops(1, 0, 0) - constant),
            (flops(0, 2, 0) - constant) / 2.0,
            float(flops(0, 0, 1) - constant),
        ),
    )


class PackingCost:
    """The cost model of a run, that of the formula until there is a calibrated one.

    Attributes:
        model: by which structures are divided over the ranks.
        wants_times: whether the run asks for a calibrated one and has none yet.
    """

    def __init__(self, hyper: ModelConfig, *, calibrated: bool) -> None:
        self.model = formula_cost(hyper)
        self._calibrated = self.wants_times = calibrated

    def facts(self) -> dict[str, Any] | None:
        """For a checkpoint: the calibrated model, if there is one. A resumed run keeps it, so that no clock has a say
        in which micro-batch a structure is."""
        if not self._calibrated or self.wants_times:
            return None
        return {"constant": self.model.constant, "weights": list(self.model.weights)}

    def restore(self, facts: dict[str, Any] | None) -> None:
        """Takes what `facts` gave; the run's own setting says whether it wants that."""
        if self._calibrated and facts is not None:
            self.use(CostModel(constant=facts["constant"], weights=tuple(facts["weights"])))

    def use(self, model: CostModel) -> None:
        """From now on."""
        self.model, self.wants_times = model, False


def calibrate(
    cost: PackingCost,
    task: MatRISTask,
    learner: Learner,
    dataset: StructureDataset,
    indices: np.ndarray,
    *,
    collate: Callable[[Sequence[Any]], MicroBatch],
    budget: Budget,
    mesh: Mesh,
) -> str:
    """Times forward and backward passes of a few micro-batches, and fits. All ranks call it; all run the same ones.

    Weights stay as they are, and gradients are zero afterwards.

    Args:
        cost: gets the model that was fitted on the first rank.
        indices: a global batch.

    Returns:
        what was found, in one line.
    """
    learner.broadcast()  # what is measured must not depend on weights that no training will have
    totals = label_totals(dataset)
    chosen = sample_batches(dataset.sizes[indices], cost.model, num_ranks=mesh.batch.size, budget=budget)
    seconds = []
    for positions in chosen:
        micro_batch = collate([dataset[int(i)] for i in indices[positions]])
        times = []
        for _ in range(1 + _REPETITIONS):
            watch = Stopwatch(mesh.device)
            accumulate_gradients(task, [micro_batch], totals, learner)
            watch.stop()
            times.append(watch.seconds())
            learner.zero_gradients()
        seconds.append(min(times[1:]))
    sums = np.array([dataset.sizes[indices[positions]].sum(axis=0) for positions in chosen])
    found: tuple[CostModel, float] | None = broadcast_object(fit_cost(sums, np.array(seconds)), mesh)
    if found is None:
        cost.use(cost.model)
        return f"times of {len(chosen)} micro-batches do not grow with their sizes: costs stay those of the formula"
    model, error = found
    cost.use(model)
    parts = " + ".join(
        f"{1e6 * weight:.3g} us per {name}"
        for weight, name in zip(model.weights, ("atom", "edge", "angle"), strict=True)
    )
    return (
        f"{1e3 * model.constant:.3g} ms + {parts} of a micro-batch; fitted to {len(chosen)} micro-batches with a "
        f"relative error of {100.0 * error:.2g} % (RMS)"
    )


def sample_batches(sizes: np.ndarray, model: CostModel, *, num_ranks: int, budget: Budget) -> list[np.ndarray]:
    """Micro-batches of different size and shape, as positions: cheap, middling and costly structures alone, those with
    the largest and the smallest part of angles, and micro-batches of the plan, whole and in part."""
    cost = model.of_records(sizes)
    by_cost, by_angles = np.argsort(cost, kind="stable"), np.argsort(sizes[:, 2] / cost, kind="stable")
    singles = [*by_cost[[0, len(cost) // 2, -1]], *by_angles[[0, -1]]]
    chosen = [np.array([position]) for position in singles]
    plan = plan_micro_batches(sizes, num_ranks=num_ranks, budget=budget, cost=cost)
    planned = sorted((part for parts in plan for part in parts), key=lambda part: (cost[part].sum(), part[0]))
    for part in (planned[0], planned[-1]):
        chosen += [part[: max(1, len(part) * eighths // 8)] for eighths in (2, 4, 6, 8)]
    return [np.array(positions) for positions in sorted({tuple(part.tolist()) for part in chosen})]
