"""Collectives that may be differentiated any number of times: linear maps in adjoint pairs.

The backward pass of each applies its partner as a recorded operation, so whatever the partner does is right for the
next derivative too. All are out of place, take tensors of any shape, also without rows, and return their input where
the axis has one rank. All ranks of the axis must call them in the same order, and differentiate alike.

A tensor is replicated over an axis (equal on its ranks; a scalar made of it counts once), sharded (each rank holds
another part) or partial (the true value is the sum over ranks). The pairs:

    operation        from -> to                 adjoint
    copy             replicated -> used apart   reduce
    reduce           partial -> replicated      copy
    gather           sharded -> replicated      scatter
    scatter          replicated -> sharded      gather
    all_gather       sharded -> used apart      reduce_scatter
    reduce_scatter   partial -> sharded         all_gather
    all_to_all       rows to their receivers    all_to_all with the splits exchanged

"Used apart" means that each rank goes on with the same tensor in a way of its own, so the gradients that come back are
parts of a sum. torch's functional collectives are right to second order as well; these count their bytes in the
ledger, take pieces of any size, and are tested to third order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from janus.mesh import Axis

# Newer releases of torch warn about the older names.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Public: the pairs ---------------------------------------------------------------------------------------------------


def copy(x: Tensor, axis: Axis) -> Tensor:
    """The same tensor; its gradient is all-reduced, 2 (W - 1) / W of its bytes. Adjoint of `reduce`."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, on all its ranks; all-reduces, 2 (W - 1) / W of the bytes of `x`. Adjoint of `copy`."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """The pieces of all ranks along `dim`, replicated; sends (W - 1) times its bytes. Adjoint of `scatter`.

    Args:
        sizes: length of each rank's piece along `dim`; None if all are equal.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis, dim, _pieces(x, axis, dim, sizes))


def scatter(x: Tensor, axis: Axis, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's piece of a replicated tensor along `dim`; sends nothing. Adjoint of `gather`, which does.

    Args:
        sizes: as in `gather`; they add up to the length of `x`. None if all are equal.
    """
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim, _parts(x, axis, dim, sizes))


def all_gather(x: Tensor, axis: Axis, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """As `gather`, for a result that the ranks use apart: its gradients are summed. Adjoint of `reduce_scatter`."""
    return x if axis.size == 1 else _AllGather.apply(x, axis, dim, _pieces(x, axis, dim, sizes))


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's piece along `dim` of the sum over ranks; sends (W - 1) / W of the bytes. Adjoint of `all_gather`."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, _parts(x, axis, dim, sizes))


def all_to_all(rows: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Rows to their receivers; sends the bytes of the rows for other ranks. Its own adjoint, with the splits exchanged.

    Args:
        rows: (sum(send), ...), grouped by receiver.
        send, receive: rows for and from each rank of the axis; `receive` must be what the others send.
    Returns:
        (sum(receive), ...), grouped by sender.
    """
    return start_all_to_all(rows, axis, send=send, receive=receive).wait()


def start_all_to_all(rows: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> PendingRows:
    """Starts `all_to_all` and returns at once; what is computed before `wait` overlaps with it, in every derivative."""
    if axis.size == 1:
        return PendingRows(ticket=rows, exchange=None)
    exchange = _Exchange(axis=axis, send=tuple(send), receive=tuple(receive))
    return PendingRows(ticket=_Start.apply(rows, exchange), exchange=exchange)


@dataclass(frozen=True, kw_only=True)
class PendingRows:
    """Rows that are under way; `wait` must be called exactly once.

    Attributes:
        ticket: () stands for them in the record of autograd; without an exchange the rows themselves.
    """

    ticket: Tensor
    exchange: _Exchange | None

    def wait(self) -> Tensor:
        """The rows that have arrived."""
        return self.ticket if self.exchange is None else _Wait.apply(self.ticket, self.exchange)


# The autograd functions ----------------------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Reduce.apply(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Copy.apply(grad, ctx.axis), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.arguments = axis, dim, sizes
        return _gathered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Scatter.apply(grad, *ctx.arguments), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.arguments = axis, dim, sizes
        return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank]).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grad, *ctx.arguments), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.arguments = axis, dim, sizes
        return _gathered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceScatter.apply(grad, *ctx.arguments), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.arguments = axis, dim, sizes
        return _reduce_scattered(x, axis, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllGather.apply(grad, *ctx.arguments), None, None, None


@dataclass(kw_only=True)
class _Exchange:
    """One all-to-all under way, shared by its `_Start` and its `_Wait`.

    The backward pass meets them in the opposite order: that of `_Wait` starts the adjoint, that of `_Start` waits for
    it, so there as well everything between the two is computed meanwhile. What autograd passes between them is a ticket
    without content, for a gradient must have the shape of its tensor, and the adjoint's rows are others in number.

    Attributes:
        adjoint: the exchange that the running backward pass has started.
        work, sent, received: the running collective, and its buffers.
    """

    axis: Axis
    send: tuple[int, ...]
    receive: tuple[int, ...]
    adjoint: _Exchange | None = None
    work: Any = None
    sent: Tensor | None = field(default=None, repr=False)
    received: Tensor | None = field(default=None, repr=False)

    def start(self, rows: Tensor) -> Tensor:
        """Returns the ticket."""
        if rows.shape[0] != sum(self.send):
            raise ValueError(f"an all-to-all of {rows.shape[0]} rows, but the plan sends {list(self.send)}")
        self.sent = rows.detach().contiguous()
        self.received = rows.new_empty((sum(self.receive), *rows.shape[1:]))
        row_bytes = rows.new_empty((1, *rows.shape[1:])).nbytes
        remote = sum(self.send) - self.send[self.axis.rank]
        _record(self.axis, "all_to_all", rows.nbytes, remote * row_bytes)
        self.work = dist.all_to_all_single(
            self.received, self.sent, list(self.receive), list(self.send), group=self.axis.group, async_op=True
        )
        return rows.new_zeros(())

    def wait(self) -> Tensor:
        """Returns the rows that have arrived."""
        assert self.received is not None, "wait is called once, after start"
        if self.work is not None:
            self.work.wait()
        received = self.received
        self.work = self.sent = self.received = None
        return received


class _Start(torch.autograd.Function):
    """Starts an exchange; its ticket must go through `_Wait`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        adjoint, ctx.exchange.adjoint = ctx.exchange.adjoint, None
        assert adjoint is not None, "the backward pass of _Wait runs first"
        return _Wait.apply(ticket, adjoint), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        exchange.adjoint = _Exchange(axis=exchange.axis, send=exchange.receive, receive=exchange.send)
        return _Start.apply(grad, exchange.adjoint), None


# The collectives themselves, not recorded ----------------------------------------------------------------------------


def all_reduced(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis as a new tensor, not recorded by autograd."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        _record(axis, "all_reduce", total.nbytes, 2 * (axis.size - 1) * total.nbytes / axis.size)
        dist.all_reduce(total, group=axis.group)
    return total


def _gathered(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    largest = max(sizes)
    own = x.detach().movedim(dim, 0).contiguous()
    if len(own) < largest:  # backends want equal pieces
        own = torch.cat([own, own.new_zeros((largest - len(own), *own.shape[1:]))])
    whole = own.new_empty((axis.size * largest, *own.shape[1:]))
    _record(axis, "all_gather", own.nbytes, (axis.size - 1) * own.nbytes)
    all_gather_flat(whole, own, group=axis.group)
    if min(sizes) < largest:
        whole = torch.cat([part[:size] for part, size in zip(whole.split(largest), sizes, strict=True)])
    return whole.movedim(0, dim).contiguous()


def _reduce_scattered(x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
    largest = max(sizes)
    whole = x.detach().movedim(dim, 0).contiguous()
    if min(sizes) < largest:
        padded = whole.new_zeros((axis.size, largest, *whole.shape[1:]))
        for part, piece in zip(padded, whole.split(list(sizes)), strict=True):
            part[: len(piece)] = piece
        whole = padded.flatten(0, 1)
    own = whole.new_empty((largest, *whole.shape[1:]))
    _record(axis, "reduce_scatter", whole.nbytes, (axis.size - 1) * whole.nbytes / axis.size)
    reduce_scatter_flat(own, whole, group=axis.group)
    return own[: sizes[axis.rank]].movedim(0, dim).contiguous()


def _record(axis: Axis, collective: str, num_bytes: int, wire_bytes: float) -> None:
    axis.ledger.record(f"{axis.name}/{collective}", num_bytes, wire_bytes)


def _pieces(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """Lengths of all ranks' pieces, of which `x` is this one's."""
    found = (x.shape[dim],) * axis.size if sizes is None else tuple(sizes)
    if len(found) != axis.size or found[axis.rank] != x.shape[dim]:
        raise ValueError(
            f"pieces of {list(found)} along dimension {dim} of the {axis.name} axis ({axis.size} ranks), but rank "
            f"{axis.rank} has one of {x.shape[dim]}: give one length per rank"
        )
    return found


def _parts(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """Lengths of the pieces that `x` is cut into."""
    if sizes is None and x.shape[dim] % axis.size:
        raise ValueError(
            f"{x.shape[dim]} along dimension {dim} do not divide into {axis.size} ranks of the {axis.name} axis: "
            "choose a divisible width, or give the pieces' lengths"
        )
    found = (x.shape[dim] // axis.size,) * axis.size if sizes is None else tuple(sizes)
    if len(found) != axis.size or sum(found) != x.shape[dim]:
        raise ValueError(
            f"pieces of {list(found)} do not cut {x.shape[dim]} along dimension {dim} for {axis.size} ranks of the "
            f"{axis.name} axis: give one length per rank that add up to it"
        )
    return found
