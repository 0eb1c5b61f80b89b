"""Sums over a whole set, exact for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from janus.comm.collectives import gather_objects, reduce_sums
from janus.mesh import Mesh
from janus.training.step import NonFiniteError
from janus.training.task import EvaluationSource, Task


def evaluate(
    task: Task,
    source: EvaluationSource,
    mesh: Mesh,
    *,
    step: int,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> np.ndarray:
    """Loss and error sums over the set, (Task.num_sums,) float64; all-reduces 8 bytes per element, once.

    Args:
        step: updates that the weights have seen, for messages.
        around: entered for each micro-batch; sharded weights need it.

    Raises:
        NonFiniteError: on all ranks, if the loss is not finite anywhere.
    """
    own = torch.zeros(task.num_sums, dtype=torch.float64, device=mesh.device)
    losses, identifiers = [], []
    for micro_batch in source.micro_batches():
        with around():
            loss = task.loss(micro_batch, source.totals, training=False)
        own += loss.sums
        losses.append(loss.total.detach())
        identifiers.append(task.identifiers(micro_batch))
    finite = torch.isfinite(torch.stack(losses)).tolist() if losses else []
    bad = [name for names, fine in zip(identifiers, finite, strict=True) if not fine for name in names]
    suspects = list(dict.fromkeys(name for names in gather_objects(bad, mesh) for name in names))
    if suspects:
        more = f" and {len(suspects) - 20} more" if len(suspects) > 20 else ""
        raise NonFiniteError(
            f"the validation loss after step {step} is not finite; the model and checkpoints on disk stay as they are. "
            f"Look at {', '.join(suspects[:20])}{more}: at their labels and geometry, or lower the learning rate"
        )
    return reduce_sums(own, mesh).cpu().numpy()
