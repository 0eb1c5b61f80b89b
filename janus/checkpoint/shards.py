"""The part of a logical tensor that one rank holds, as blocks of the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from janus.checkpoint.manifest import StoredPiece, StoredTensor

_PIECE = 1 << 24
"""Elements of a stored piece, at most."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of a logical tensor.

    Attributes:
        start: within the tensor, an index for each dimension.
        values: of the block's shape; a view of what a rank holds.
    """

    start: tuple[int, ...]
    values: Tensor

    def cut(self, limit: int) -> Iterator[Piece]:
        """The same elements in pieces of at most `limit`, which are views."""
        for first in range(0, self.values.numel(), limit):
            for start, size in blocks(tuple(self.values.shape), first, min(first + limit, self.values.numel())):
                ends = zip(start, size, strict=True)
                values = self.values[tuple(slice(begin, begin + length) for begin, length in ends)]
                yield Piece(start=tuple(a + b for a, b in zip(self.start, start, strict=True)), values=values)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The block in the terms of torch.distributed.checkpoint."""
        return ChunkStorageMetadata(offsets=torch.Size(self.start), sizes=self.values.shape)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Something to read.

    Attributes:
        piece: from where.
        within: which part of it; empty for a tensor without dimensions.
        target: to where.
    """

    piece: StoredPiece
    within: tuple[slice, ...]
    target: Tensor

    def takes_as_it_is(self, dtype: torch.dtype) -> bool:
        """Whether the target can be filled with the bytes of the piece, which are of this type."""
        whole = self.target.shape == self.piece.shape
        return whole and self.target.is_contiguous() and self.target.dtype == dtype and self.target.device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A rank's blocks of a logical tensor.

    Attributes:
        shape: of the logical tensor.
        pieces: without overlap; maybe none.
    """

    shape: torch.Size
    pieces: tuple[Piece, ...]

    @staticmethod
    def whole(value: Tensor) -> Shards:
        """Of a rank that holds all of a tensor."""
        return Shards(shape=value.shape, pieces=(Piece(start=(0,) * value.ndim, values=value),))

    def cut(self) -> Shards:
        """The same in pieces none of which is large: whoever needs a part of one reads it whole, to verify it."""
        return Shards(shape=self.shape, pieces=tuple(part for piece in self.pieces for part in piece.cut(_PIECE)))

    def reads(self, name: str, stored: StoredTensor) -> Iterator[Read]:
        """What has to be read to fill all pieces with what is stored."""
        chunks = [
            ChunkStorageMetadata(offsets=torch.Size(piece.start), sizes=torch.Size(piece.shape))
            for piece in stored.pieces
        ]
        description = TensorStorageMetadata(
            properties=TensorProperties(dtype=stored.dtype), size=stored.shape, chunks=chunks
        )
        for item in create_read_items_for_chunk_list(name, description, [piece.chunk for piece in self.pieces]):
            source, target = stored.pieces[_index(item.storage_index)], self.pieces[_index(item.dest_index)].values
            for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                target = target.narrow(dim, start, length)
            ends = (start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True))
            within = tuple(slice(start, end) for start, end in zip(item.storage_offsets, ends, strict=True))
            yield Read(piece=source, within=within, target=target)


def blocks(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements first..last-1 of a tensor, counted row by row, as few blocks (start, shape) in the same order."""
    if first >= last:
        return
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    row, begin = divmod(first, inner)
    last_row, end = divmod(last, inner)
    if begin or row == last_row:  # a part of one row
        stop = end if row == last_row else inner
        yield from (((row, *start), (1, *size)) for start, size in blocks(shape[1:], begin, stop))
        row += 1
    if row < last_row:
        yield (row, *(0 for _ in shape[1:])), (last_row - row, *shape[1:])
    if row <= last_row and end:
        yield from (((last_row, *start), (1, *size)) for start, size in blocks(shape[1:], 0, end))


def _index(index: object) -> int:
    """Which chunk an index of torch.distributed.checkpoint means."""
    number = getattr(index, "index", None)
    assert isinstance(number, int)
    return number
