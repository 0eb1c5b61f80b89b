"""The force-matching step: energy, forces, second derivative, update. Exact for every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from janus.comm.collectives import gather_objects, reduce_sums
from janus.mesh import Mesh
from janus.telemetry import Stopwatch
from janus.training.learner import Learner
from janus.training.task import Batch, MicroLoss, Task


class NonFiniteError(ValueError):
    """A loss or gradient is infinite or not a number. Nothing was saved; the weights were not touched, or, with
    `Learner.updates_early`, partly: the process must not go on with them."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step tells, equal on all ranks.

    Attributes:
        sums: (Task.num_sums,) float64 over the global batch.
        num_edges: edges of the global batch.
        num_flops: `MicroLoss.num_flops` of the global batch.
        grad_norm: 2-norm of the gradient before clipping.
        stop: whether any rank wants to stop.
        computing: this rank's forward and backward passes; not equal on all ranks.
    """

    sums: np.ndarray
    num_edges: int
    num_flops: float
    grad_norm: float
    stop: bool
    computing: Stopwatch


def train_step(
    task: Task, batch: Batch, totals: Any, *, learner: Learner, mesh: Mesh, stop: bool = False
) -> StepReport:
    """One update with a global batch; all-reduces the gradients' bytes and 8 per element of the sums.

    Each micro-batch's loss is divided by the totals of the global batch, so gradients add up: over micro-batches in
    `.grad`, over ranks in one sum. A rank without micro-batches contributes zeros.

    Args:
        totals: denominators of the loss of the global batch.
        stop: this rank's wish to stop, which travels with the sums, so that all ranks stop after the same step.

    Raises:
        NonFiniteError: on all ranks.
    """
    learner.zero_gradients()
    computing = Stopwatch(mesh.device)
    losses = accumulate_gradients(task, batch.micro_batches, totals, learner, update=learner.updates_early)
    computing.stop()
    learner.sum_gradients()
    own = torch.zeros(task.num_sums + 3, dtype=torch.float64, device=mesh.device)
    for loss in losses:
        own[:-3] += loss.sums
        own[-3] += loss.num_edges
        own[-2] += loss.num_flops
    own[-1] = float(stop)
    sums = reduce_sums(own, mesh).cpu().numpy()
    grad_norm = learner.clip()
    # Both were reduced over all ranks, so all ranks take the same branch.
    if not (math.isfinite(grad_norm) and np.isfinite(sums).all()):
        raise NonFiniteError(_complaint(task, batch, losses, grad_norm, mesh))
    learner.update()
    return StepReport(
        sums=sums[:-3],
        num_edges=round(sums[-3]),
        num_flops=float(sums[-2]),
        grad_norm=grad_norm,
        stop=sums[-1] > 0,
        computing=computing,
    )


def accumulate_gradients(
    task: Task, micro_batches: Sequence[Any], totals: Any, learner: Learner, *, update: bool = False
) -> list[MicroLoss]:
    """Adds the gradients of this rank's micro-batches. Returns their losses, detached.

    With `update`, units of sharded weights are updated as soon as their gradient is complete.

    Nothing is communicated but what the model itself exchanges, and sharded weights and their gradients, for which all
    ranks need the same number of micro-batches.
    """
    losses = []
    for number, micro_batch in enumerate(micro_batches, start=1):
        complete = learner.update_early if update and number == len(micro_batches) else None
        with learner.weights.run(training=True, complete=complete):
            loss = task.loss(micro_batch, totals, training=True)
            if loss.total.requires_grad:
                # The weights alone: gradients on positions and strain would cost time and mean nothing.
                loss.total.backward(inputs=learner.weights.leaves)
        losses.append(replace(loss, total=loss.total.detach()))
    return losses


def _complaint(task: Task, batch: Batch, losses: Sequence[MicroLoss], grad_norm: float, mesh: Mesh) -> str:
    """Names the records to look at: those of the micro-batches with a bad loss, else all of the batch."""

    def is_bad(value: Tensor) -> bool:
        return not bool(torch.isfinite(value).all())

    named = [
        (is_bad(loss.total) or is_bad(loss.sums), list(task.identifiers(micro_batch)))
        for loss, micro_batch in zip(losses, batch.micro_batches, strict=True)
    ]
    everywhere = [entry for entries in gather_objects(named, mesh) for entry in entries]
    bad_loss = any(bad for bad, _ in everywhere)
    # Once each: ranks of the graph and tensor axes share their structures.
    suspects = list(dict.fromkeys(name for bad, names in everywhere if bad or not bad_loss for name in names))
    what = "the loss" if bad_loss else f"the gradient (norm {grad_norm})"
    return (
        f"{what} of step {batch.step + 1} is not finite; nothing was saved. Structures of the batch: "
        f"{', '.join(suspects)}. Check their labels and geometry, or lower the learning rate"
    )
