"""Sums over the rows that belong to a node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus.ops.recompute import recomputable


def segment_sum(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """out[k] = sum of `rows` whose `index` is k; the adjoint of `gather_rows`.

    Args:
        rows: (E, ...).
        index: (E,) int64 in [0, num_segments).
    Returns:
        (num_segments, ...), zero where no row belongs.
    """
    return _SegmentSum.apply(rows, index, num_segments)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """out[e] = values[index[e]], (E, ...); the adjoint of `segment_sum`. Not kept for backward passes inside of
    `janus.ops.recompute.recomputing`, for there are far more rows than values."""
    return recomputable(_GatherRows.apply(values, index), _gather, values, index)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros((num_segments, *rows.shape[1:])).index_add(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_values = values.shape[0]  # len() would make a traced size a constant
        return _gather(values, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return segment_sum(grad, index, ctx.num_values), None


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


def segment_max(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Largest of the rows of each segment, detached, (num_segments, d); -inf where no row belongs."""
    lowest = rows.new_full((num_segments, rows.shape[1]), -torch.inf)
    # Rows with gaps between them, such as half the columns of a product, would take ten times as long.
    packed = rows.detach().contiguous()
    return lowest.scatter_reduce_(0, index[:, None].expand_as(rows), packed, reduce="amax")
