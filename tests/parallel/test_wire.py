"""Rows that travel in fp16: how much is lost, that every derivative travels alike, and the bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from janus.comm.adjoint import all_to_all
from janus.expert_parallel.wire import compressed_all_to_all
from janus.mesh import Axis, Mesh
from tests.parallel.ranks import run_ranks

NUM_KINDS = 5
WIDTH = 6
SENT = {
    1: ((4,),),
    2: ((3, 5), (0, 2)),
    4: ((3, 0, 2, 4), (0, 0, 0, 0), (5, 1, 0, 1), (2, 3, 0, 1)),
}
"""Rows from each rank (first index) to each rank; at four ranks the second sends nothing."""


class Rows:
    """What one rank sends: rows of kinds of very different size, and the kinds that it will get."""

    def __init__(self, axis: Axis, *, whole_numbers: bool = False) -> None:
        sent = SENT[axis.size]
        self.axis = axis
        self.splits = {"send": sent[axis.rank], "receive": tuple(row[axis.rank] for row in sent)}
        generator = torch.Generator().manual_seed(axis.rank)
        total = sum(sent[axis.rank])
        self.kind = torch.randint(NUM_KINDS, (total,), generator=generator)
        size = 10.0 ** (6.0 * self.kind - 12.0)
        self.rows = torch.randn(total, WIDTH, generator=generator) * size[:, None]
        if whole_numbers:
            self.rows = torch.randint(-9, 10, (total, WIDTH), generator=generator).float()
        self.kind_received = all_to_all(self.kind[:, None], axis, **self.splits)[:, 0]

    def exact(self, rows: Tensor) -> Tensor:
        return all_to_all(rows, self.axis, **self.splits)

    def compressed(self, rows: Tensor) -> Tensor:
        return compressed_all_to_all(
            rows,
            self.axis,
            **self.splits,
            kind_sent=self.kind,
            kind_received=self.kind_received,
            num_kinds=NUM_KINDS,
        )

    def largest(self) -> Tensor:
        """Largest value of each received row's kind on its sender, (R,)."""
        of_kind = torch.zeros(NUM_KINDS).scatter_reduce_(0, self.kind, self.rows.abs().amax(dim=1), "amax")
        at_sender = self.exact(of_kind[self.kind][:, None].contiguous())
        return at_sender[:, 0]

    def stay(self) -> slice:
        """Received rows that never left this rank."""
        start = sum(self.splits["receive"][: self.axis.rank])
        return slice(start, start + self.splits["send"][self.axis.rank])


def check_error(axis: Axis) -> None:
    rows = Rows(axis)
    exact, found = rows.exact(rows.rows), rows.compressed(rows.rows)
    assert found.dtype == torch.float32
    bound = 2.0**-11 * exact.abs() + 2.0**-39 * rows.largest()[:, None]
    assert ((found - exact).abs() <= bound).all()
    assert torch.equal(found[rows.stay()], exact[rows.stay()])


def check_extremes(axis: Axis) -> None:
    """Zeros, the largest and the smallest numbers of fp32, and what is no number."""
    rows = Rows(axis)
    for size in (0.0, 1e38, 1e-38, 1e-44):
        x = torch.full_like(rows.rows, size)
        error = (rows.compressed(x) - rows.exact(x)).abs()
        assert (error <= size * 2.0**-11 + 1e-42).all(), size
    for bad in (float("inf"), -float("inf"), float("nan")):
        x = rows.rows.clone()
        x[::2, 1] = bad
        exact, found = rows.exact(x), rows.compressed(x)
        wrong = ~exact.isfinite()
        assert torch.equal(found[wrong].nan_to_num(nan=7.0), exact[wrong].nan_to_num(nan=7.0))
        bound = 2.0**-11 * exact.abs() + 2.0**-39 * rows.largest()[:, None]
        assert ((found - exact).abs() <= bound)[~wrong].all()


def derivatives(exchange: Callable[[Tensor], Tensor], x: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Of a cubic function of what arrives: its gradient, and the gradient of a function of that, by all ranks."""
    x = x.clone().requires_grad_()
    arrived = exchange(x)
    (force,) = torch.autograd.grad((arrived**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((force * (1.0 + rank)).sum(), x, create_graph=True)
    (third,) = torch.autograd.grad((second * x).sum(), x)
    return tuple(tensor.detach() for tensor in (arrived, force, second, third))


def check_derivatives(axis: Axis) -> None:
    """Whole numbers of few digits lose nothing, so every derivative is exact; others lose little."""
    rows = Rows(axis, whole_numbers=True)
    for found, exact in zip(
        derivatives(rows.compressed, rows.rows, axis.rank),
        derivatives(rows.exact, rows.rows, axis.rank),
        strict=True,
    ):
        assert torch.equal(found, exact)
    generator = torch.Generator().manual_seed(10 + axis.rank)
    x = torch.randn(rows.rows.shape, generator=generator)
    for found, exact in zip(
        derivatives(rows.compressed, x, axis.rank), derivatives(rows.exact, x, axis.rank), strict=True
    ):
        largest = exact.abs().amax() if exact.numel() else torch.tensor(0.0)
        assert ((found - exact).abs() <= 4e-3 * largest).all()


def check_bytes(axis: Axis) -> None:
    rows = Rows(axis)
    x = rows.rows.clone().requires_grad_()
    counts = []
    for exchange in (rows.exact, rows.compressed):
        axis.ledger.clear()
        (grad,) = torch.autograd.grad(exchange(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)
        counts.append((dict(axis.ledger.calls), dict(axis.ledger.wire_bytes)))
    (calls, wire), (calls_half, wire_half) = counts
    if axis.size == 1:
        assert calls == calls_half == {}
        return
    name = f"{axis.name}/all_to_all"
    assert calls_half[name] == calls[name] == 4
    assert wire_half[name] == wire[name] / 2
    assert wire_half[f"{axis.name}/all_gather"] == 4 * 4 * NUM_KINDS * (axis.size - 1)


def check_refusals(axis: Axis) -> None:
    rows = Rows(axis)
    with pytest.raises(ValueError, match=r"torch\.float64: only fp32 rows"):
        rows.compressed(rows.rows.double())
    total, arriving = len(rows.rows), len(rows.kind_received)
    with pytest.raises(ValueError, match=rf"are \({total + 1}, {total}, {arriving}\) in number: the splits say"):
        rows.compressed(torch.zeros(total + 1, WIDTH))


def check_all(mesh: Mesh) -> None:
    for check in (check_error, check_extremes, check_derivatives, check_bytes, check_refusals):
        check(mesh.expert)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_wire(world_size: int) -> None:
    run_ranks(world_size, check_all, layout={"expert": world_size})
