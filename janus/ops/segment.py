"""Sums over the rows that belong to a node."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """out[k] = sum of `rows` whose `index` is k; the adjoint of `rows = out.index_select(0, index)`.

    Args:
        rows: (E, ...).
        index: (E,) int64 in [0, num_segments).
    Returns:
        (num_segments, ...), zero where no row belongs.
    """
    return rows.new_zeros((num_segments, *rows.shape[1:])).index_add(0, index, rows)


def segment_max(rows: Tensor, index: Tensor, num_segments: int) -> Tensor:
    """Largest of the rows of each segment, detached, (num_segments, d); -inf where no row belongs."""
    lowest = rows.new_full((num_segments, rows.shape[1]), -torch.inf)
    # Rows with gaps between them, such as half the columns of a product, would take ten times as long.
    packed = rows.detach().contiguous()
    return lowest.scatter_reduce_(0, index[:, None].expand_as(rows), packed, reduce="amax")
