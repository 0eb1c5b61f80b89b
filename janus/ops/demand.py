"""Whether a backward pass wants the gradient of an input at all."""

from __future__ import annotations

from typing import Any

import torch


def wants_gradient(ctx: Any, index: int) -> bool:
    """Whether the running backward pass uses the gradient of input `index` of an autograd function.

    `ctx.needs_input_grad` only tells whether the input requires a gradient. During the force pass (derivatives with
    respect to positions) weights do require one, but nobody asks for it, and computing it would be wasted.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # Raised for a leaf that torch.autograd.grad was asked for: it is wanted.
        return True
