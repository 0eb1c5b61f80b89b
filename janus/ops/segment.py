"""Sums over the rows that belong to a node, and rows gathered from nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from janus.ops.demand import wants_gradient
from janus.ops.fused import fusable
from janus.ops.recompute import recomputable


def segment_sum(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """out[k] = sum of `rows` whose `index` is k; the adjoint of `gather_rows`.

    Args:
        rows: (E, ...).
        index: (E,) int64 or int32 in [0, num_segments), not changed later.
    Returns:
        (num_segments, ...), zero where no row belongs.
    """
    return _SegmentSum.apply(rows, index, num_segments)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """out[e] = values[index[e]], (E, ...); the adjoint of `segment_sum`. Not kept for backward passes inside of
    `janus.ops.recompute.recomputing`, for there are far more rows than values."""
    return recomputable(_GatherRows.apply(values, index), _gather, values, index)


def gather_add(values: Sequence[Tensor], indices: Sequence[Tensor | None]) -> Tensor:
    """out[e] = sum over i of values[i][indices[i][e]], differentiable any number of times.

    What linear layers of concatenated features come to, where nodes are projected before they are gathered. Not kept
    for backward passes inside of `janus.ops.recompute.recomputing`, unless it takes rows that are as many themselves.

    Args:
        values: (N_i, d) each.
        indices: (E,) int64 or int32 each, not changed later; None for values that have a row for every e, (E, d).
    Returns:
        (E, d)
    """
    out = _GatherAdd.apply(*values, *indices)
    if any(index is None for index in indices):
        return out
    return recomputable(out, _add_gathered, *values, *indices)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(index)
        return sum_rows(rows, index, num_segments)

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


class _GatherAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values_and_indices: Tensor) -> Tensor:
        half = len(values_and_indices) // 2
        ctx.save_for_backward(*values_and_indices[half:])
        ctx.num_values = [value.shape[0] for value in values_and_indices[:half]]
        return _add_gathered(*values_and_indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        wanted = [wants_gradient(ctx, part) for part in range(len(ctx.num_values))]
        indices = [index for index, there in zip(ctx.saved_tensors, wanted, strict=True) if there]
        counts = [count for count, there in zip(ctx.num_values, wanted, strict=True) if there]
        found = iter(_SumEach.apply(grad, counts, *indices) if indices else ())
        return *(next(found) if there else None for there in wanted), *(None for _ in wanted)


class _SumEach(torch.autograd.Function):
    """The adjoint of `_GatherAdd`: the rows as they are where the index is None, and otherwise their sums by index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_values: list[int], *indices: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*indices)
        ctx.set_materialize_grads(False)
        return tuple(
            rows.view_as(rows) if index is None else sum_rows(rows, index, count)
            for index, count in zip(indices, num_values, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        pairs = [(grad, index) for grad, index in zip(grads, ctx.saved_tensors, strict=True) if grad is not None]
        added = None
        if pairs:
            values, indices = zip(*pairs, strict=True)
            added = gather_add(values, indices)
        return added, None, *(None for _ in grads)


def _add_gathered(*values_and_indices: Tensor | None) -> Tensor:
    return _gathered_sum(*values_and_indices)[0]


def sum_rows(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """`segment_sum`, unrecorded: for use inside autograd functions."""
    return _sum_rows(rows, index, num_segments)[0]


@fusable("segment.sum_rows", ("native", "triton"))
def _sum_rows(rows, index, num_segments: int) -> tuple[Tensor, ...]:
    return (rows.new_zeros((num_segments, *rows.shape[1:])).index_add(0, index, rows),)


@fusable("segment.gathered_sum", ("native", "triton"))
def _gathered_sum(*values_and_indices) -> tuple[Tensor, ...]:
    """Of all values, then all indices."""
    half = len(values_and_indices) // 2
    parts = zip(values_and_indices[:half], values_and_indices[half:], strict=True)
    (value, index), *others = parts
    total = value.clone() if index is None else value.index_select(0, index)
    for value, index in others:
        total += value if index is None else value.index_select(0, index)
    return (total,)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


def segment_max(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Largest of the rows of each segment, detached; -inf where no row belongs.

    Args:
        rows: (E, d).
        index: (E,) int64 or int32 in [0, num_segments), not changed later.
    Returns:
        (num_segments, d)
    """
    return _max_rows(rows.detach(), index, num_segments)[0]


@fusable("segment.max_rows", ("triton",))
def _max_rows(rows, index, num_segments: int) -> tuple[Tensor, ...]:
    lowest = rows.new_full((num_segments, rows.shape[1]), -torch.inf)
    # Rows with gaps between them, such as half the columns of a product, would take ten times as long.
    of = index.long()[:, None].expand_as(rows)  # torch 2.13 takes int32 for rows of a few channels alone
    return (lowest.scatter_reduce_(0, of, rows.contiguous(), reduce="amax"),)
