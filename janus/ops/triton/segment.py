"""Sums and maxima over the rows of a segment, and rows gathered from several places and added, each in one pass.

A segment's rows are found through a permutation that sorts them, and taken by one program in that order: no atomic
operation, so the same bits each time. Indices are read as they are, int32 or int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from janus.ops.rowwise import with_unit_stride
from janus.ops.triton.tile import accumulator

_ELEMENTS = 1024
_MAX_BLOCK = 256


@dataclass(frozen=True, slots=True)
class _Places:
    """The rows of segment k are `order[start[k]:start[k + 1]]`, both int32; `of` says for which tensor that holds."""

    order: Tensor
    start: Tensor
    of: tuple[Any, ...]


_PLACES = "janus_places"
"""Name of the attribute of a storage."""


def sum_rows(rows: Tensor, index: Tensor, num_segments: int) -> tuple[Tensor]:
    """As `janus.ops.segment`, rows of any shape."""
    flat = rows.reshape(len(rows), -1).contiguous()
    width = flat.shape[1]
    out = flat.new_empty((num_segments, width))
    places = _places_of(index, num_segments)
    tile = _tile(width)
    _sum_rows[(num_segments, triton.cdiv(width, tile["BLOCK"]))](
        flat, places.order, places.start, out, WIDTH=width, ACC=accumulator(rows.dtype), **tile
    )
    return (out.view(num_segments, *rows.shape[1:]),)


def max_rows(rows: Tensor, index: Tensor, num_segments: int) -> tuple[Tensor]:
    """As `janus.ops.segment`, except that what is not a number is passed over."""
    rows = with_unit_stride(rows)
    width = rows.shape[1]
    out = rows.new_empty((num_segments, width))
    places = _places_of(index, num_segments)
    tile = _tile(width)
    _max_rows[(num_segments, triton.cdiv(width, tile["BLOCK"]))](
        *(rows, places.order, places.start, out, rows.stride(0)), WIDTH=width, ACC=accumulator(rows.dtype), **tile
    )
    return (out,)


def gathered_sum(*values_and_indices: Tensor | None) -> tuple[Tensor]:
    """As `janus.ops.segment`."""
    half = len(values_and_indices) // 2
    values = tuple(value.contiguous() for value in values_and_indices[:half] if value is not None)
    indices = values_and_indices[half:]
    used = [value if index is None else index for value, index in zip(values, indices, strict=True)]
    num_rows, width = len(used[0]), values[0].shape[1]
    out = values[0].new_empty((num_rows, width))
    tile = _tile(width)
    _gathered_sum[(triton.cdiv(num_rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))](
        values,
        tuple(value if index is None else index.contiguous() for value, index in zip(values, indices, strict=True)),
        out,
        num_rows,
        PARTS=half,
        OWN=sum(1 << part for part, index in enumerate(indices) if index is None),
        WIDTH=width,
        ACC=accumulator(out.dtype),
        **tile,
    )
    return (out,)


def _tile(width: int) -> dict[str, int]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    return {"ROWS": max(1, _ELEMENTS // block), "BLOCK": block}


def _places_of(index: Tensor, num_segments: int) -> _Places:
    """Found once for a tensor: its storage carries them, as long as it lives and is not changed."""
    of = (index.storage_offset(), len(index), index.stride(0), index._version, num_segments)
    known = index.untyped_storage().__dict__
    places = known.get(_PLACES)
    if places is None or places.of != of:
        ordered, order = index.sort(stable=True)
        bounds = torch.arange(num_segments + 1, device=index.device, dtype=index.dtype)
        start = torch.searchsorted(ordered, bounds, out_int32=True)
        places = known[_PLACES] = _Places(order.int(), start, of)
    return places


@triton.jit
def _sum_rows(
    values,
    order,
    start,
    out,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(start + segment), tl.load(start + segment + 1)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for place in range(first, last, ROWS):
        places = place + tl.arange(0, ROWS)
        row = tl.load(order + places, mask=places < last, other=0).to(tl.int64)
        inside = (places < last)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(values + row[:, None] * WIDTH + columns[None, :], mask=inside, other=0).to(ACC)
    tl.store(out + segment * WIDTH + columns, tl.sum(total, 0), mask=columns < WIDTH)


@triton.jit
def _max_rows(
    values,
    order,
    start,
    out,
    stride,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(start + segment), tl.load(start + segment + 1)
    largest = tl.full((ROWS, BLOCK), float("-inf"), ACC)
    for place in range(first, last, ROWS):
        places = place + tl.arange(0, ROWS)
        row = tl.load(order + places, mask=places < last, other=0).to(tl.int64)
        inside = (places < last)[:, None] & (columns < WIDTH)[None, :]
        found = tl.load(values + row[:, None] * stride + columns[None, :], mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, found.to(ACC))
    tl.store(out + segment * WIDTH + columns, tl.max(largest, 0), mask=columns < WIDTH)


@triton.jit
def _gathered_sum(
    values,
    indices,
    out,
    num_rows,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    total = tl.zeros((ROWS, BLOCK), ACC)
    for part in tl.static_range(PARTS):
        row = rows
        if (OWN >> part) % 2 == 0:
            row = tl.load(indices[part] + rows, mask=rows < num_rows, other=0).to(tl.int64)
        total += tl.load(values[part] + row[:, None] * WIDTH + columns[None, :], mask=inside, other=0).to(ACC)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], total, mask=inside)
