"""SiLU whose first derivative keeps only its inputs for the second one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.fused import fusable
from janus.ops.recompute import recomputable
from janus.ops.rowwise import map_rows


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), (N, ...), differentiable any number of times.

    torch's own SiLU records its backward as a chain of element-wise operations, each of which keeps its operands when
    the force pass is recorded; this one keeps the input and the incoming gradient.
    """
    return silu_parts(x, 1)[0]


def silu_parts(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`silu` of (N, parts d), as tensors (N, d) of its columns; their gradients need not be joined."""
    return recomputable(_SiLU.apply(x, parts), partial(_value, parts=parts), x)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        return _value(x, parts=parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (x,) = ctx.saved_tensors
        return recomputable(_SiLUGrad.apply(x, *grads), _first_derivative, x, *grads), None


class _SiLUGrad(torch.autograd.Function):
    """grad silu'(x), the gradients given in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *grads: Tensor) -> Tensor:
        ctx.save_for_backward(x, *grads)
        return _first_derivative(x, *grads)[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        x, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():
            sigmoid = x.sigmoid()
            curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
            return cotangent * _joined(grads) * curvature, *_divided(_SiLUGrad.apply(x, cotangent), len(grads))
        return map_rows(_second_derivative, (x, *grads, cotangent))


@fusable("silu.value")
def _value(x: Tensor, *, parts: int) -> tuple[Tensor, ...]:
    return tuple(functional.silu(part) for part in _divided(x, parts))


@fusable("silu.first_derivative")
def _first_derivative(x: Tensor, *grads: Tensor) -> tuple[Tensor]:
    return (torch.ops.aten.silu_backward(_joined(grads), x),)


@fusable("silu.second_derivative")
def _second_derivative(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Gradients of <cotangent, grad silu'(x)> for x and the parts of grad; `rows` are these parts and the cotangent."""
    # silu''(x) = s (1 - s) (2 + x - 2 x s), s = sigmoid(x)
    *grads, cotangent = rows
    sigmoid = x.sigmoid()
    bend = torch.addcmul(x, x, sigmoid, value=-2).add_(2)
    curvature = torch.ops.aten.sigmoid_backward(cotangent * _joined(grads), sigmoid).mul_(bend)
    return curvature, *_divided(torch.ops.aten.silu_backward(cotangent, x), len(grads))


def _joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _divided(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    return (x,) if parts == 1 else x.chunk(parts, dim=1)
