"""An all-to-all of token rows that sends fp16, with a scale for each kind of token, and computes in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from janus.comm.adjoint import all_to_all, gather
from janus.mesh import Axis

_EXPONENT = 15
"""Scaled values are below 2^15, half of what fp16 can hold; above 2^-14 they keep 11 bits."""


def compressed_all_to_all(
    rows: Tensor,
    axis: Axis,
    *,
    send: Sequence[int],
    receive: Sequence[int],
    kind_sent: Tensor,
    kind_received: Tensor,
    num_kinds: int,
) -> Tensor:
    """As `all_to_all`, but what leaves this rank is rounded to fp16; so is every derivative of it.

    Each rank has one scale per kind, a power of two by which the kind's largest value just fits; a value x loses at
    most 2^-11 |x|, or 2^-39 of the kind's largest value where that is more. Scales travel too, 4 bytes per kind and
    rank. A gradient goes the opposite way by the same rule, with scales of its own. Rows that stay on their rank are
    passed on as they are. What is not finite arrives not finite, and leaves the others' scale alone.

    Args:
        rows: (sum(send), width) fp32, grouped by receiver.
        send, receive: rows for and from each rank of the axis.
        kind_sent, kind_received: (sum(send),) and (sum(receive),) int64 kinds of the rows here and of those that come.
    Returns:
        (sum(receive), width) fp32, grouped by sender.
    Raises:
        ValueError: rows of another type than fp32, or other numbers of rows than the splits say.
    """
    if rows.dtype != torch.float32:
        raise ValueError(
            f"an exchange that sends fp16 in place of {rows.dtype}: only fp32 rows are compressed; compute in fp32, or "
            "exchange without compression"
        )
    found, wanted = (len(rows), len(kind_sent), len(kind_received)), (sum(send), sum(send), sum(receive))
    if found != wanted:
        raise ValueError(f"rows, their kinds and the kinds that come are {found} in number: the splits say {wanted}")
    if axis.size == 1:
        return rows
    route = _Route(
        axis=axis,
        send=tuple(send),
        receive=tuple(receive),
        kind_sent=kind_sent,
        kind_received=kind_received,
        num_kinds=num_kinds,
    )
    return _Compressed.apply(rows, route)


@dataclass(frozen=True, kw_only=True)
class _Route:
    axis: Axis
    send: tuple[int, ...]
    receive: tuple[int, ...]
    kind_sent: Tensor
    kind_received: Tensor
    num_kinds: int

    @property
    def back(self) -> _Route:
        return _Route(
            axis=self.axis,
            send=self.receive,
            receive=self.send,
            kind_sent=self.kind_received,
            kind_received=self.kind_sent,
            num_kinds=self.num_kinds,
        )


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return _exchanged(rows, route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Compressed.apply(grad, ctx.route.back), None


def _exchanged(rows: Tensor, route: _Route) -> Tensor:
    """Not recorded by autograd."""
    axis, rank = route.axis, route.axis.rank
    before, stay, after = rows.split(_around(route.send, rank))
    kind_before, _, kind_after = route.kind_sent.split(_around(route.send, rank))
    leaving, kind = torch.cat([before, after]), torch.cat([kind_before, kind_after])
    scale = _scales(leaving, kind, route.num_kinds)
    send, receive = ([*sizes[:rank], 0, *sizes[rank + 1 :]] for sizes in (route.send, route.receive))
    packed = leaving.div_(scale.index_select(0, kind)[:, None]).half()
    coming = all_to_all(packed, axis, send=send, receive=receive)
    scales = gather(scale, axis)
    first, _, last = _around(route.receive, rank)
    kind_first, _, kind_last = route.kind_received.split(_around(route.receive, rank))
    sender = torch.arange(axis.size).repeat_interleave(torch.tensor(receive)).to(rows.device)
    scale = scales.index_select(0, sender * route.num_kinds + torch.cat([kind_first, kind_last]))
    unpacked = coming.float().mul_(scale[:, None])
    return torch.cat([unpacked[:first], stay, unpacked[first : first + last]])


def _around(sizes: tuple[int, ...], rank: int) -> list[int]:
    """Rows before, of, and after a rank."""
    return [sum(sizes[:rank]), sizes[rank], sum(sizes[rank + 1 :])]


def _scales(rows: Tensor, kind: Tensor, num_kinds: int) -> Tensor:
    """(num_kinds,) powers of two: finite values of a kind over its scale are below 2^15 in size."""
    largest = rows.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(dim=1)
    of_kind = largest.new_zeros(num_kinds).scatter_reduce_(0, kind, largest, "amax")
    # Made from its bits: exact on every device. The smallest is 2^-126, whose inverse is finite too.
    exponent = torch.frexp(of_kind).exponent.clamp(min=_EXPONENT - 126)
    return (exponent + (127 - _EXPONENT)).bitwise_left_shift(23).view(torch.float32)
