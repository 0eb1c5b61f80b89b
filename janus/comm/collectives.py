"""Collectives outside of autograd: gradients, metrics, decisions and small objects. Without ranks they do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from janus.comm.adjoint import all_gather_flat, all_reduced, reduce_scatter_flat
from janus.mesh import Axis, ElsewhereError, Mesh

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat buffers of about this size: few calls, bounded extra memory."""


def sum_gradients(parameters: Iterable[torch.nn.Parameter], axis: Axis, *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Sums gradients over an axis, in place; all-reduces as many bytes as the parameters have.

    Sums, never averages: each rank's loss is already divided by the totals of the global batch. A trainable parameter
    without a gradient counts as zero on every rank, also in a run of one, so that all ranks and all rank counts update
    the same parameters.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if axis.size == 1:
        return
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    for bucket in plan_buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        pieces = all_reduced(flat, axis).split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(gradient) for piece, gradient in zip(pieces, bucket, strict=True)])


def plan_buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type, in order, each run at most `bucket_bytes` unless a single tensor is larger."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def reduce_sums(values: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the replicas of the mesh in float64, out of place; all-reduces 8 bytes per element.

    All ranks get the same bits, so that they decide alike: the values of the tensor ranks, which may differ by rounding
    or by a stop signal that only one has got, are averaged, by an all-reduce of their axis.
    """
    total = all_reduced(values.detach().double(), mesh.replicas)
    return all_reduced(total / mesh.tensor.size, mesh.tensor)


def reduce_max(value: float, mesh: Mesh) -> float:
    """Largest value of any rank (NaN if any is), on all of them; gathers one number per rank."""
    values = gather_objects(value, mesh)
    return max(values, key=lambda entry: (entry != entry, entry))


def broadcast_tensors(tensors: Iterable[Tensor], axis: Axis) -> None:
    """Overwrites each tensor with that of the axis's first rank; one broadcast of its bytes each."""
    if axis.size == 1:
        return
    for tensor in tensors:
        axis.ledger.record(f"{axis.name}/broadcast", tensor.nbytes)
        value = tensor.detach().contiguous()
        dist.broadcast(value, src=axis.members[0], group=axis.group)
        tensor.detach().copy_(value)


@dataclass(kw_only=True)
class PendingTensor:
    """A tensor that a running collective fills.

    Attributes:
        result: not to be read before `wait`.
    """

    result: Tensor
    work: Any
    source: Tensor | None = field(repr=False)

    def wait(self) -> Tensor:
        """The tensor, filled."""
        self.work.wait()
        self.work = self.source = None  # only now: the collective has read it
        return self.result


def start_all_gather(piece: Tensor, axis: Axis) -> PendingTensor:
    """Starts the concatenation of the equal pieces (n,) of all ranks, (size * n,); sends (W - 1) times its bytes."""
    source = piece.detach()
    result = source.new_empty(axis.size * len(source))
    axis.ledger.record(f"{axis.name}/all_gather", source.nbytes, (axis.size - 1) * source.nbytes)
    work = all_gather_flat(result, source, group=axis.group, async_op=True)
    return PendingTensor(result=result, work=work, source=source)


def start_reduce_scatter(whole: Tensor, axis: Axis) -> PendingTensor:
    """Starts the sum of (size * n,) over the axis, of which each rank gets its piece (n,); sends (W - 1) / W of it."""
    source = whole.detach()
    result = source.new_empty(len(source) // axis.size)
    axis.ledger.record(f"{axis.name}/reduce_scatter", source.nbytes, (axis.size - 1) * source.nbytes / axis.size)
    work = reduce_scatter_flat(result, source, group=axis.group, async_op=True)
    return PendingTensor(result=result, work=work, source=source)


def start_all_to_all(rows: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> PendingTensor:
    """Starts the exchange of rows (sum(send), ...), grouped by receiver, for (sum(receive), ...), grouped by sender.

    Sends the bytes of the rows for other ranks. For what is differentiated see `janus.comm.adjoint`.
    """
    source = rows.detach().contiguous()
    result = source.new_empty((sum(receive), *source.shape[1:]))
    remote = (sum(send) - send[axis.rank]) * source[:1].nbytes
    axis.ledger.record(f"{axis.name}/all_to_all", source.nbytes, remote)
    work = dist.all_to_all_single(result, source, list(receive), list(send), group=axis.group, async_op=True)
    return PendingTensor(result=result, work=work, source=source)


def broadcast_object(value: Any, mesh: Mesh) -> Any:
    """Rank 0's object on every rank; for small things (a path, a table)."""
    if mesh.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    mesh.ledger.record("world/broadcast_object", 0)
    return holder[0]


def on_main_rank(function: Callable[[], T], mesh: Mesh) -> T:
    """Calls a function on rank 0 alone and gives its (small) result to all ranks.

    Raises:
        Exception: that of the function, on rank 0.
        ElsewhereError: on all other ranks, which would otherwise wait for ever.
    """
    if not mesh.is_main:
        succeeded, value = broadcast_object(None, mesh)
        if not succeeded:
            raise ElsewhereError("rank 0 failed")
        return value
    try:
        value = function()
    except Exception:
        broadcast_object((False, None), mesh)
        raise
    broadcast_object((True, value), mesh)
    return value


def gather_numbers(own: Sequence[float], mesh: Mesh) -> np.ndarray:
    """Float64 numbers of the ranks of `mesh.replicas`, (ranks, n), on each; gathers 8 bytes per number and rank."""
    numbers = torch.tensor(own, dtype=torch.float64, device=mesh.device)
    if mesh.replicas.size == 1:
        return numbers.cpu().numpy()[None]
    return start_all_gather(numbers, mesh.replicas).wait().view(-1, len(own)).cpu().numpy()


def gather_objects(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's object, in rank order, on every rank; for small things (identifiers, random states)."""
    if mesh.world_size == 1:
        return [value]
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value)
    mesh.ledger.record("world/gather_objects", 0)
    return values
