"""Sums over the rows of a segment, and rows gathered from several places and added, as `janus.ops.segment` has them."""

from __future__ import annotations

from torch import Tensor

from janus.ops.native.library import launch
from janus.ops.rowwise import with_unit_stride


def sum_rows(rows: Tensor, index: Tensor, num_segments: int) -> tuple[Tensor, ...]:
    """(num_segments, ...), rows of any shape."""
    out = rows.new_zeros((num_segments, *rows.shape[1:]))
    if not rows.is_floating_point():
        return (out.index_add_(0, index, rows),)
    width = out[:1].numel()
    flat = with_unit_stride(rows.reshape(len(rows), width))
    return launch("segment_sum", [flat, index.long().contiguous()], [out], num_rows=len(rows), width=width)


def gathered_sum(*values_and_indices: Tensor | None) -> tuple[Tensor, ...]:
    """(E, d), of all values, then all indices."""
    half = len(values_and_indices) // 2
    values = [with_unit_stride(value) for value in values_and_indices[:half] if value is not None]
    indices = [None if index is None else index.long().contiguous() for index in values_and_indices[half:]]
    num_rows = len(values[0]) if indices[0] is None else len(indices[0])
    out = values[0].new_empty((num_rows, values[0].shape[1]))
    return launch("gathered_sum", [*values, *indices], [out], num_rows=num_rows, width=out.shape[1], numbers=(half,))
