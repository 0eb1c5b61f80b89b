"""Between a rank's part of a parameter and the logical parameter, which no layout changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from janus.checkpoint.shards import Piece, blocks
from janus.comm.collectives import start_all_gather
from janus.mesh import Axis, Mesh

EXPERT_ATTRIBUTE = "expert_model_parallel"
"""Of a parameter: true if its first dimension is split over the expert axis."""
_TOGETHER = 64 * 1024**2
"""Bytes of parts that are gathered together: most tensors are small, and a device may not have room for all."""


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


def wholes_of(parts: Mapping[str, Tensor], splits: Mapping[str, Split | None], mesh: Mesh) -> dict[str, Tensor]:
    """The logical tensors, on all ranks of the axes, which all call it: those that are split as copies in the host's
    memory, the others themselves. Gathers their bytes; not recorded."""
    found, size = dict(parts), 0
    together: list[str] = []
    for name, part in parts.items():
        split = splits.get(name)
        if split is None or (mesh.tensor.size == 1 and not split.expert):
            continue
        if together and (part.dtype != parts[together[0]].dtype or size + part.nbytes > _TOGETHER):
            found |= _gathered(together, parts, splits, mesh)
            together, size = [], 0
        together.append(name)
        size += part.nbytes
    return found | _gathered(together, parts, splits, mesh)


def _gathered(
    names: Sequence[str], parts: Mapping[str, Tensor], splits: Mapping[str, Split | None], mesh: Mesh
) -> dict[str, Tensor]:
    """Of split tensors of one number format, in a collective for each axis."""
    found = {}
    by_tensor_rank = _of_all_ranks([parts[name].to(mesh.device) for name in names], mesh.tensor)
    for name, pieces in zip(names, by_tensor_rank, strict=True):
        split = splits[name]
        assert split is not None
        runs = zip(*(piece.chunk(split.stride, dim=split.dim) for piece in pieces), strict=True)
        found[name] = torch.cat([part for run in runs for part in run], dim=split.dim)
    of_experts = [name for name in names if (split := splits[name]) is not None and split.expert]
    by_expert_rank = _of_all_ranks([found[name] for name in of_experts], mesh.expert)
    found |= {name: torch.cat(pieces) for name, pieces in zip(of_experts, by_expert_rank, strict=True)}
    return {name: whole.cpu() for name, whole in found.items()}


def _of_all_ranks(tensors: Sequence[Tensor], axis: Axis) -> list[list[Tensor]]:
    """What each rank of the axis has in place of each tensor."""
    if axis.size == 1 or not tensors:
        return [[tensor.detach()] for tensor in tensors]
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    ranks = start_all_gather(flat, axis).wait().view(axis.size, -1)
    columns = ranks.split([tensor.numel() for tensor in tensors], dim=1)
    return [[row.view(tensor.shape) for row in column] for tensor, column in zip(tensors, columns, strict=True)]


def part_of(whole: Tensor, split: Split | None, mesh: Mesh) -> Tensor:
    """This rank's part of a logical tensor. Inverse of `wholes_of`; sends nothing."""
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
