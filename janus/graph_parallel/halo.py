"""Rows that one rank owns and others read: borrowing them, and returning what was summed for them.

Every row has one owner. `gather_halo` copies owned rows to their borrowers; `reduce_halo` sends the borrowers' partial
sums back and adds them up. Both are linear, and each is the other's adjoint, so they may be differentiated any number
of times. Nothing else is communicated: exactly the rows needed, by one all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus.comm.adjoint import PendingRows, start_all_to_all
from janus.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class HaloPlan:
    """Which rows this rank lends and borrows. Pure: made once per batch, alike on both sides, without communication.

    Attributes:
        send_index: (S,) int64 owned rows that others borrow, grouped by borrower; a row may occur for several.
        send: how many of them for each rank of the axis; receive: rows borrowed from each.
        num_owned: rows of this rank.
    """

    send_index: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    num_owned: int

    @property
    def num_local(self) -> int:
        """Owned and borrowed rows."""
        return self.num_owned + sum(self.receive)

    def gather_bytes(self, row_bytes: int) -> int:
        """What this rank sends in `gather_halo` of rows of so many bytes: each row once per borrower."""
        return sum(self.send) * row_bytes

    def reduce_bytes(self, row_bytes: int) -> int:
        """What this rank sends in `reduce_halo`: each borrowed row once."""
        return sum(self.receive) * row_bytes

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HaloPlan:
        """The same plan on another device."""
        return replace(self, send_index=self.send_index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> HaloPlan:
        """The same plan in page-locked memory."""
        return replace(self, send_index=self.send_index.pin_memory())


@dataclass(frozen=True, kw_only=True)
class PendingHalo:
    """An exchange under way; `wait` must be called exactly once.

    Attributes:
        rows: owned rows of this rank, or the partial sums of them.
        arriving: rows of other ranks; None where nothing is exchanged.
        return_to: owned rows that `arriving` is added to; None if it is appended.
    """

    rows: Tensor
    arriving: PendingRows | None
    return_to: Tensor | None = None

    def wait(self) -> Tensor:
        """The result of the exchange."""
        if self.arriving is None:
            return self.rows
        arrived = self.arriving.wait()
        if self.return_to is None:
            return torch.cat([self.rows, arrived])
        return self.rows.index_add(0, self.return_to, arrived)


def gather_halo(rows: Tensor, plan: HaloPlan | None, axis: Axis) -> Tensor:
    """Owned rows, then borrowed ones. One all-to-all on the axis, `plan.gather_bytes`; adjoint of `reduce_halo`.

    Args:
        rows: (num_owned, ...).
        plan: None on one rank.
    Returns:
        (num_local, ...), the borrowed rows grouped by owner.
    """
    return start_gather_halo(rows, plan, axis).wait()


def start_gather_halo(rows: Tensor, plan: HaloPlan | None, axis: Axis) -> PendingHalo:
    """Begins `gather_halo`; what is computed before `wait` overlaps with it, in every derivative."""
    if plan is None or axis.size == 1:
        return PendingHalo(rows=rows, arriving=None)
    _check(rows, plan.num_owned, "owned")
    lent = rows.index_select(0, plan.send_index)
    return PendingHalo(rows=rows, arriving=start_all_to_all(lent, axis, send=plan.send, receive=plan.receive))


def reduce_halo(partial: Tensor, plan: HaloPlan | None, axis: Axis) -> Tensor:
    """Sums over all ranks that hold a row, at its owner. One all-to-all, `plan.reduce_bytes`; adjoint of `gather_halo`.

    Args:
        partial: (num_local, ...), owned rows first.
    Returns:
        (num_owned, ...)
    """
    return start_reduce_halo(partial, plan, axis).wait()


def start_reduce_halo(partial: Tensor, plan: HaloPlan | None, axis: Axis) -> PendingHalo:
    """Begins `reduce_halo`; what is computed before `wait` overlaps with it, in every derivative."""
    if plan is None or axis.size == 1:
        return PendingHalo(rows=partial, arriving=None)
    _check(partial, plan.num_local, "local")
    owned, borrowed = partial.split([plan.num_owned, sum(plan.receive)])
    arriving = start_all_to_all(borrowed, axis, send=plan.receive, receive=plan.send)
    return PendingHalo(rows=owned, arriving=arriving, return_to=plan.send_index)


def max_halo(rows: Tensor, plan: HaloPlan | None, axis: Axis) -> Tensor:
    """Largest value over all ranks that hold a row, on all of them, detached. Two all-to-alls.

    Args:
        rows: (num_local, width), -inf where this rank has nothing to say.
    Returns:
        (num_local, width)
    """
    rows = rows.detach()
    if plan is None or axis.size == 1:
        return rows
    owned, borrowed = rows.split([plan.num_owned, sum(plan.receive)])
    arrived = start_all_to_all(borrowed, axis, send=plan.receive, receive=plan.send).wait()
    index = plan.send_index[:, None].expand_as(arrived)
    return gather_halo(owned.scatter_reduce(0, index, arrived, reduce="amax"), plan, axis)


def _check(rows: Tensor, expected: int, what: str) -> None:
    assert rows.shape[0] == expected, f"{rows.shape[0]} rows, but the plan has {expected} {what} ones"
