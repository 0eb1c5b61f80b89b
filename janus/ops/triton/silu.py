"""The second derivative of SiLU; value and first derivative are one kernel each in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from janus.ops.triton.tile import accumulator

_BLOCK = 1024


def second_derivative(x: Tensor, grad: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """As `janus.ops.silu`, any shape."""
    x, grad, cotangent = x.contiguous(), grad.contiguous(), cotangent.contiguous()
    curvature, slope = torch.empty_like(x), torch.empty_like(x)
    size = x.numel()
    _second_derivative[(triton.cdiv(size, _BLOCK),)](
        x, grad, cotangent, curvature, slope, size, ACC=accumulator(x.dtype), BLOCK=_BLOCK
    )
    return curvature, slope


@triton.jit
def _second_derivative(x, grad, cotangent, curvature, slope, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    a = tl.load(x + place, mask=inside, other=0.0).to(ACC)
    g = tl.load(grad + place, mask=inside, other=0.0).to(ACC)
    v = tl.load(cotangent + place, mask=inside, other=0.0).to(ACC)
    s = tl.sigmoid(a)
    tl.store(curvature + place, v * g * s * (1 - s) * (2 + a * (1 - 2 * s)), mask=inside)
    tl.store(slope + place, v * s * (1 + a * (1 - s)), mask=inside)
