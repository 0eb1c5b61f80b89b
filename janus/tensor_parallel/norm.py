"""The gated norm of rows whose channels are split over the tensor axis."""

from __future__ import annotations

import torch
from torch import Tensor

from janus.comm.adjoint import copy, reduce
from janus.mesh import Axis
from janus.ops.gated_norm import gated_norm
from janus.ops.silu import silu


def parallel_gated_norm(
    core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, center: bool, tensor: Axis
) -> Tensor:
    """SiLU(norm(core)) * sigmoid(norm(gate)) with means over the channels of all ranks.

    All-reduces two numbers per row for each mean, both halves in one call; differentiable any number of times. On one
    rank it is `janus.ops.gated_norm.gated_norm`.

    Args:
        core, gate: (N, d / W), this rank's channels.
        weight, bias: (2, d / W); bias may be None.
        eps, center: as in `gated_norm`.
    Returns:
        (N, d / W)
    """
    if tensor.size == 1:
        return gated_norm(core, gate, weight, bias, eps=eps, center=center)
    width = core.shape[1] * tensor.size

    def mean(z: Tensor) -> Tensor:
        # Partial sums in, used by each rank for its own channels: reduce, then copy; the adjoint is the same.
        return copy(reduce(z.sum(dim=-1, keepdim=True), tensor), tensor) / width

    z = torch.stack([core, gate])
    if center:
        z = z - mean(z)
    a = z * (mean(z * z) + eps).rsqrt() * weight[:, None]
    if bias is not None:
        a = a + bias[:, None]
    return silu(a[0]) * a[1].sigmoid()
