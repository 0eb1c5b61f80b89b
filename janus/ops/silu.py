"""SiLU whose first derivative keeps only its inputs for the second one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.fused import fusable
from janus.ops.recompute import recomputable
from janus.ops.rowwise import map_rows


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), any shape, differentiable any number of times.

    torch's own SiLU records its backward as a chain of element-wise operations, each of which keeps its operands when
    the force pass is recorded; this one keeps the input and the incoming gradient.
    """
    return recomputable(_SiLU.apply(x), functional.silu, x)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return recomputable(_SiLUGrad.apply(x, grad), _first_derivative, x, grad)


class _SiLUGrad(torch.autograd.Function):
    """grad silu'(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, grad)
        return _first_derivative(x, grad)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, grad = ctx.saved_tensors
        if torch.is_grad_enabled():
            sigmoid = x.sigmoid()
            curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
            return cotangent * grad * curvature, _SiLUGrad.apply(x, cotangent)
        return map_rows(_second_derivative, (x, grad, cotangent))


def _first_derivative(x: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x)


@fusable("silu.second_derivative")
def _second_derivative(x: Tensor, grad: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    # silu''(x) = s (1 - s) (2 + x - 2 x s), s = sigmoid(x)
    sigmoid = x.sigmoid()
    bend = torch.addcmul(x, x, sigmoid, value=-2).add_(2)
    curvature = torch.ops.aten.sigmoid_backward(cotangent * grad, sigmoid).mul_(bend)
    return curvature, torch.ops.aten.silu_backward(cotangent, x)
