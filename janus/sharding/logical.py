"""Between a tensor-parallel rank's part of a parameter and the logical parameter, which no layout changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from janus.comm.adjoint import gather
from janus.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a parameter is split over the tensor axis, in Megatron's terms.

    Attributes:
        dim: dimension that is split.
        stride: runs of rows that are split each on its own; a rank holds its part of the first, then of the second.
    """

    dim: int
    stride: int


def split_of(parameter: Tensor) -> Split | None:
    """From Megatron's attributes; None for a parameter that all tensor ranks hold alike."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Split(dim=parameter.partition_dim, stride=parameter.partition_stride)  # type: ignore[attr-defined]


def whole_of(part: Tensor, split: Split | None, tensor: Axis) -> Tensor:
    """The logical tensor, on all ranks of the axis; gathers its bytes. Not recorded."""
    if split is None or tensor.size == 1:
        return part
    with torch.no_grad():
        runs = part.chunk(split.stride, dim=split.dim)
        return torch.cat([gather(run, tensor, dim=split.dim) for run in runs], dim=split.dim)


def part_of(whole: Tensor, split: Split | None, tensor: Axis) -> Tensor:
    """This rank's part of a logical tensor. Inverse of `whole_of`; sends nothing."""
    if split is None or tensor.size == 1:
        return whole
    runs = whole.chunk(split.stride, dim=split.dim)
    return torch.cat([run.chunk(tensor.size, dim=split.dim)[tensor.rank] for run in runs], dim=split.dim)


def whole_shape(shape: torch.Size, split: Split | None, tensor: Axis) -> torch.Size:
    """Shape of the logical tensor."""
    if split is None:
        return shape
    return torch.Size(size * tensor.size if dim == split.dim else size for dim, size in enumerate(shape))
