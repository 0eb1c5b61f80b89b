"""Between a rank's part of a parameter and the logical parameter, which no layout changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from janus.checkpoint.shards import Piece, blocks
from janus.comm.adjoint import gather
from janus.mesh import Mesh

EXPERT_ATTRIBUTE = "expert_model_parallel"
"""Of a parameter: true if its first dimension is split over the expert axis."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a parameter is split over the tensor axis, in Megatron's terms, and over the expert axis.

    Attributes:
        dim: dimension that is split over the tensor axis.
        stride: runs of rows that are split each on its own; a rank holds its part of the first, then of the second.
        expert: whether the first dimension, which is then not `dim`, is split over the expert axis.
    """

    dim: int
    stride: int
    expert: bool


def split_of(parameter: Tensor) -> Split | None:
    """From the parameter's attributes; None for one that all ranks of both axes hold alike."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Split(
        dim=parameter.partition_dim,  # type: ignore[attr-defined]
        stride=parameter.partition_stride,  # type: ignore[attr-defined]
        expert=getattr(parameter, EXPERT_ATTRIBUTE, False),
    )


def whole_of(part: Tensor, split: Split | None, mesh: Mesh) -> Tensor:
    """The logical tensor, on all ranks of the axes; gathers its bytes. Not recorded."""
    if split is None:
        return part
    with torch.no_grad():
        if mesh.tensor.size > 1:
            runs = part.chunk(split.stride, dim=split.dim)
            part = torch.cat([gather(run, mesh.tensor, dim=split.dim) for run in runs], dim=split.dim)
        return gather(part, mesh.expert, dim=0) if split.expert else part


def part_of(whole: Tensor, split: Split | None, mesh: Mesh) -> Tensor:
    """This rank's part of a logical tensor. Inverse of `whole_of`; sends nothing."""
    if split is None:
        return whole
    if split.expert:
        whole = whole.chunk(mesh.expert.size)[mesh.expert.rank]
    if mesh.tensor.size == 1:
        return whole
    runs = whole.chunk(split.stride, dim=split.dim)
    return torch.cat([run.chunk(mesh.tensor.size, dim=split.dim)[mesh.tensor.rank] for run in runs], dim=split.dim)


def pieces_of(shape: torch.Size, first: int, values: Tensor, split: Split | None, mesh: Mesh) -> Iterator[Piece]:
    """Consecutive elements of a rank's part of a parameter, as blocks of the logical parameter.

    Args:
        shape: of the part.
        first: where they begin in the flattened part.
        values: (n,) they.
    """
    for start, size in blocks(tuple(shape), first, first + len(values)):
        block = values[: math.prod(size)].view(size)
        values = values[math.prod(size) :]
        if split is None:
            yield Piece(start=start, values=block)
            continue
        offset = list(start)
        if split.expert:
            offset[0] += mesh.expert.rank * shape[0]
        # The part has its rows of the first run of the logical dimension, then those of the second.
        length = shape[split.dim] // split.stride
        begin, end = start[split.dim], start[split.dim] + size[split.dim]
        for run in range(begin // length, -(-end // length)):
            lower, upper = max(begin, run * length), min(end, (run + 1) * length)
            offset[split.dim] = lower + (run * (mesh.tensor.size - 1) + mesh.tensor.rank) * length
            yield Piece(start=tuple(offset), values=block.narrow(split.dim, lower - begin, upper - lower))


def whole_shape(shape: torch.Size, split: Split | None, mesh: Mesh) -> torch.Size:
    """Shape of the logical tensor."""
    if split is None:
        return shape
    sizes = list(shape)
    sizes[split.dim] *= mesh.tensor.size
    if split.expert:
        sizes[0] *= mesh.expert.size
    return torch.Size(sizes)
