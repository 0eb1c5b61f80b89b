"""Matrix products in a chosen number format."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.demand import wants_gradient
from janus.ops.recompute import recomputable


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None, added in the format of `x`.
        dtype: format of the product's operands (and of the products in its derivatives); None keeps that of `x`.
    Returns:
        (..., out) in the format of `x`.
    """
    if dtype is None or dtype == x.dtype:
        return functional.linear(x, weight, bias)
    product = convert(_ConvertedProduct.apply(convert(x, dtype), weight, False), x.dtype)
    return product if bias is None else product + bias


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another number format, made again in backward passes where that is asked for, and so are its derivatives."""
    return recomputable(_Converted.apply(x, dtype), partial(Tensor.to, dtype=dtype), x)


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return convert(grad, ctx.dtype), None


class _ConvertedProduct(torch.autograd.Function):
    """x W^T (or x W) in the format of x. Saved is W itself: a converted copy would stay until the second backward pass,
    and sharded weights (`janus.sharding`), which are gathered again for each pass, would not be recognised in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, straight: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.straight = straight
        converted = weight.to(x.dtype)
        return functional.linear(x, converted.t() if straight else converted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        g_x = _ConvertedProduct.apply(grad, weight, not ctx.straight) if wants_gradient(ctx, 0) else None
        g_weight = None
        if wants_gradient(ctx, 1):
            rows, columns = (x, grad) if ctx.straight else (grad, x)
            g_weight = (rows.flatten(0, -2).t() @ columns.flatten(0, -2)).to(weight.dtype)
        return g_x, g_weight, None
