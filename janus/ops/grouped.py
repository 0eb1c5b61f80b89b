"""One matrix product per group of consecutive rows, each with a matrix of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """rows_g weight_g^T for every group g; differentiable any number of times.

    torch's grouped product where it exists (fp32, bf16), a product per group otherwise (fp64). A group without rows
    costs nothing, and its matrix has the gradient zero.

    Args:
        rows: (T, in), sorted by group.
        weight: (G, out, in).
        counts: (G,) int64 rows of each group; they add up to T.
        dtype: format of the products' operands, None for that of `rows`.
    Returns:
        (T, out) in the format of `rows`.
    """
    if dtype is not None and dtype != rows.dtype:
        return grouped_linear(rows.to(dtype), weight.to(dtype), counts).to(rows.dtype)
    if rows.dtype is torch.float64 or not len(rows):
        parts = rows.split(counts.tolist())
        return torch.cat([functional.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])
    return functional.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
