"""One matrix product per group of consecutive rows, each with a matrix of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.demand import wants_gradient
from janus.ops.product import convert, linear


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """rows_g weight_g^T for every group g; differentiable any number of times.

    torch's grouped product where it exists: in fp32 and bf16, for matrices whose rows and columns are multiples of 16
    bytes. Otherwise a product per group. A group without rows costs nothing, and its matrix has the gradient zero.

    Args:
        rows: (T, in), sorted by group.
        weight: (G, out, in).
        counts: (G,) int64 rows of each group; they add up to T.
        dtype: format of the products' operands, None for that of `rows`.
    Returns:
        (T, out) in the format of `rows`.
    """
    operand = rows.dtype if dtype is None else dtype
    fits = all(width * operand.itemsize % 16 == 0 for width in weight.shape[1:])
    if operand is torch.float64 or not fits or not len(rows):
        parts = zip(rows.split(counts.tolist()), weight, strict=True)
        return torch.cat([linear(part, matrix, dtype=dtype) for part, matrix in parts])
    offsets = counts.cumsum(0).to(torch.int32)
    if operand is not rows.dtype:
        return convert(_ConvertedProduct.apply(convert(rows, operand), weight, offsets, False), rows.dtype)
    return functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)


class _ConvertedProduct(torch.autograd.Function):
    """rows_g W_g^T (or rows_g W_g) in the format of the rows; W itself is saved, see `janus.ops.product`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, straight: bool) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.straight = straight
        converted = weight.to(rows.dtype)
        return functional.grouped_mm(rows, converted if straight else converted.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, offsets = ctx.saved_tensors
        g_rows = _ConvertedProduct.apply(grad, weight, offsets, not ctx.straight) if wants_gradient(ctx, 0) else None
        g_weight = None
        if wants_gradient(ctx, 1):
            left, right = (rows, grad) if ctx.straight else (grad, rows)
            g_weight = functional.grouped_mm(left.t(), right, offs=offsets).to(weight.dtype)
        return g_rows, g_weight, None, None
