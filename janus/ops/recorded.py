"""Derivatives of a plain torch function as recorded operations, for orders beyond the hand-written ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recorded_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    count: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of <grads, function(*inputs)>, themselves differentiable with respect to inputs and grads.

    Args:
        function: of all inputs, in plain torch operations.
        inputs: None is passed on to `function` and has no gradient.
        grads: one for each output.
        count: how many of the inputs, from the first; None for all.
    """
    with torch.enable_grad():
        # Stand-ins. An input without a gradient of its own gets one, so that every gradient asked for exists. Where an
        # input depends on another, only the function's own use of each counts, and no way leads from view to view.
        used = [x if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = function(*used)
        wanted = used[:count]
        found = iter(
            torch.autograd.grad(
                outputs, [x for x in wanted if x is not None], grads, create_graph=True, materialize_grads=True
            )
        )
    return tuple(None if x is None else next(found) for x in wanted)
