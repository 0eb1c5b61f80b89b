"""The state of a learner as logical tensors, whole, to compare layouts of ranks."""

from __future__ import annotations

from torch import Tensor

from janus.training.learner import Learner


def logical_state(learner: Learner) -> dict[str, Tensor]:
    """As a checkpoint names them; copies. All ranks call it."""
    weights, found = learner.weights, {}
    for kind, held in learner.held().items():
        tensors = weights.state() if kind == "model" else weights.gather(held)
        found |= {f"{kind}/{name}": value.clone() for name, value in tensors.items()}
    return found
