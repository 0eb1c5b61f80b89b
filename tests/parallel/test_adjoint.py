"""Every pair of differentiable collectives against finite differences to third order, and its ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from janus.comm.adjoint import (
    all_gather,
    all_to_all,
    copy,
    gather,
    reduce,
    reduce_scatter,
    scatter,
    start_all_to_all,
)
from janus.mesh import Axis, Mesh
from tests.parallel.ranks import run_ranks

COLUMNS = 2
PIECES = {1: (2,), 2: (2, 1), 4: (1, 0, 2, 1)}
"""Uneven pieces, by number of ranks; an empty one among four."""
SENT = {
    1: ((2,),),
    2: ((1, 2), (0, 1)),
    4: ((1, 0, 2, 0), (0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0)),
}
"""Rows from each rank (first index) to each rank; at four ranks the second sends nothing and gets one row."""


def bend(x: Tensor, rank: int) -> Tensor:
    """Something with derivatives of every order, another on every rank."""
    return torch.sin((1.0 + 0.3 * rank) * x + 0.1 * rank) * x


def own(x: Tensor, axis: Axis, sizes: tuple[int, ...]) -> Tensor:
    """This rank's rows of a replicated tensor, so that all ranks' rows can be perturbed alike everywhere."""
    return copy(x, axis).narrow(0, sum(sizes[: axis.rank]), sizes[axis.rank])


def scalar(x: Tensor, axis: Axis) -> Tensor:
    """A number made of what each rank has: replicated."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)
    return reduce((weights * bend(x, axis.rank)).sum(), axis)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A number made with the collective of that name; its input has so many rows, the same on all ranks."""

    name: str
    rows: int
    function: Callable[[Tensor], Tensor]


def cases(axis: Axis) -> list[Case]:
    size, pieces, sent = axis.size, PIECES[axis.size], SENT[axis.size]
    even = (1,) * size
    send = sent[axis.rank]
    receive = tuple(sent[source][axis.rank] for source in range(size))
    sending = tuple(map(sum, sent))

    def overlapped(x: Tensor) -> Tensor:
        """Two exchanges under way at once, with work between start and wait."""
        rows = bend(own(x, axis, sending), axis.rank)
        first = start_all_to_all(rows, axis, send=send, receive=receive)
        second = start_all_to_all(2.0 * rows.sin(), axis, send=send, receive=receive)
        meanwhile = scalar(rows, axis)
        return scalar(second.wait() * first.wait(), axis) * meanwhile

    def once_more(x: Tensor) -> Tensor:
        """There and back: the receivers' answer to the senders."""
        there = all_to_all(bend(own(x, axis, sending), axis.rank), axis, send=send, receive=receive)
        return scalar(all_to_all(there.square(), axis, send=receive, receive=send), axis)

    found = [
        Case(name="copy", rows=2, function=lambda x: scalar(copy(bend(x, 0), axis), axis)),
        Case(name="reduce", rows=2, function=lambda x: bend(reduce(bend(copy(x, axis), axis.rank), axis), 1).sum()),
        Case(name="all_to_all overlapped", rows=sum(sending), function=overlapped),
        Case(name="all_to_all there and back", rows=sum(sending), function=once_more),
    ]
    for kind, sizes in (("even", even), ("uneven", pieces)):
        given = None if kind == "even" else sizes
        for dim in (0,) if kind == "even" else (0, 1):

            def gathered(
                x: Tensor, sizes: tuple[int, ...] = sizes, dim: int = dim, given: tuple[int, ...] | None = given
            ) -> Tensor:
                piece = bend(own(x, axis, sizes), axis.rank).movedim(0, dim)
                return bend(gather(piece, axis, dim=dim, sizes=given), 1).sum()

            def all_gathered(
                x: Tensor, sizes: tuple[int, ...] = sizes, dim: int = dim, given: tuple[int, ...] | None = given
            ) -> Tensor:
                piece = bend(own(x, axis, sizes), axis.rank).movedim(0, dim)
                return scalar(all_gather(piece, axis, dim=dim, sizes=given), axis)

            def scattered(x: Tensor, dim: int = dim, given: tuple[int, ...] | None = given) -> Tensor:
                return scalar(scatter(bend(x, 0).movedim(0, dim), axis, dim=dim, sizes=given), axis)

            def reduce_scattered(x: Tensor, dim: int = dim, given: tuple[int, ...] | None = given) -> Tensor:
                partial = bend(copy(x, axis), axis.rank).movedim(0, dim)
                return scalar(reduce_scatter(partial, axis, dim=dim, sizes=given), axis)

            for name, function in (
                ("gather", gathered),
                ("all_gather", all_gathered),
                ("scatter", scattered),
                ("reduce_scatter", reduce_scattered),
            ):
                found.append(Case(name=f"{name} {kind} dim {dim}", rows=sum(sizes), function=function))
    return found


def check(mesh: Mesh) -> list[str]:
    """Derivatives of every case; returns their names."""
    names = []
    for case in cases(mesh.data):
        generator = torch.Generator().manual_seed(len(names))
        x = torch.randn(case.rows, COLUMNS, dtype=torch.float64, generator=generator).requires_grad_()
        weight = torch.randn(x.shape, dtype=torch.float64, generator=generator)

        def slope(x: Tensor, case: Case = case, weight: Tensor = weight) -> Tensor:
            (gradient,) = torch.autograd.grad(case.function(x), x, create_graph=True)
            return (weight * gradient).sum()

        direction = torch.ones((), dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(case.function, (x,))
        torch.autograd.gradgradcheck(case.function, (x,), (direction,))
        torch.autograd.gradgradcheck(slope, (x,), (direction,))
        names.append(case.name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_derivatives_to_third_order(world_size: int) -> None:
    results = [check(Mesh())] if world_size == 1 else run_ranks(world_size, check, timeout=240.0)
    assert all(len(names) == 16 for names in results)


def dense(x: Tensor, size: int) -> Tensor:
    """What `chain` computes, by one process that holds all ranks' rows."""
    sizes, sent = PIECES[size], SENT[size]
    pieces = [bend(piece, rank) for rank, piece in enumerate(x.split(sizes))]
    whole = torch.cat(pieces)
    parts = [bend(whole, rank) for rank in range(size)]
    total = torch.stack(parts).sum(0)
    rows = [torch.cat([total, total])[: sum(sent[rank])] for rank in range(size)]
    arrived = [
        torch.cat([rows[source].split(sent[source])[target] for source in range(size)]) for target in range(size)
    ]
    numbers = []
    for rank, value in enumerate(arrived):
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=x.dtype).view_as(value)
        numbers.append((weights * bend(value, rank)).sum())
    return torch.stack(numbers).sum()


def chain(x: Tensor, axis: Axis) -> Tensor:
    """All collectives one after the other."""
    sizes, sent = PIECES[axis.size], SENT[axis.size]
    whole = all_gather(bend(own(x, axis, sizes), axis.rank), axis, sizes=sizes)
    piece = reduce_scatter(bend(whole, axis.rank), axis, sizes=sizes)
    total = scatter(gather(piece, axis, sizes=sizes), axis, sizes=sizes)
    total = copy(gather(total, axis, sizes=sizes), axis)
    rows = torch.cat([total, total])[: sum(sent[axis.rank])]
    receive = tuple(sent[source][axis.rank] for source in range(axis.size))
    return scalar(all_to_all(rows, axis, send=sent[axis.rank], receive=receive), axis)


def derivatives(function: Callable[[Tensor], Tensor], size: int) -> list[Tensor]:
    """The value and the first three derivatives along the vector of ones."""
    rows = sum(PIECES[size])
    x = torch.linspace(-1.0, 1.0, rows * COLUMNS, dtype=torch.float64).view(rows, COLUMNS).requires_grad_()
    value = function(x)
    found = [value]
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(gradient)
        value = gradient.square().sum()
    return [entry.detach() for entry in found]


def chained(mesh: Mesh) -> list[Tensor]:
    return derivatives(lambda x: chain(x, mesh.data), mesh.data.size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_chain_of_collectives_is_the_computation_of_one_process(world_size: int) -> None:
    expected = derivatives(lambda x: dense(x, world_size), world_size)
    for found in run_ranks(world_size, chained):
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


def traffic(mesh: Mesh) -> dict[str, list[dict[str, tuple[int, int, float]]]]:
    """Ledger entries of value, first and second derivative of one collective alone."""
    axis, size = mesh.data, mesh.data.size
    pieces, sent = PIECES[size], SENT[size]
    receive = tuple(sent[source][axis.rank] for source in range(size))
    mine = pieces[axis.rank]
    table: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "copy": (3, lambda x: copy(x, axis)),
        "reduce": (3, lambda x: reduce(x, axis)),
        "gather": (mine, lambda x: gather(x, axis, sizes=pieces)),
        "scatter": (sum(pieces), lambda x: scatter(x, axis, sizes=pieces)),
        "all_gather": (mine, lambda x: all_gather(x, axis, sizes=pieces)),
        "reduce_scatter": (sum(pieces), lambda x: reduce_scatter(x, axis, sizes=pieces)),
        "all_to_all": (sum(sent[axis.rank]), lambda x: all_to_all(x, axis, send=sent[axis.rank], receive=receive)),
    }
    result = {}
    for name, (rows, function) in table.items():
        x = torch.ones(rows, COLUMNS, dtype=torch.float64, requires_grad=True)
        orders = []

        def counted(orders: list[dict[str, tuple[int, int, float]]] = orders) -> None:
            ledger = mesh.ledger
            orders.append({key: (ledger.calls[key], ledger.bytes[key], ledger.wire_bytes[key]) for key in ledger.calls})
            ledger.clear()

        mesh.ledger.clear()
        value = function(x).pow(3).sum()
        counted()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        counted()
        torch.autograd.grad(first.square().sum(), x)
        counted()
        result[name] = orders
    return result


def test_ledger() -> None:
    """One collective per map: the value's own, its adjoint in the first derivative, both in the second."""
    size, row = 4, 8 * COLUMNS
    largest, whole = max(PIECES[size]), sum(PIECES[size])
    for rank, found in enumerate(run_ranks(size, traffic)):
        # (calls, payload, least bytes to send); pieces are padded to the longest.
        all_reduce = {"data/all_reduce": (1, 3 * row, 2 * 3 / 4 * 3 * row)}
        gathering = {"data/all_gather": (1, largest * row, 3 * largest * row)}
        scattering = {"data/reduce_scatter": (1, 4 * largest * row, 3 * largest * row)}
        sent = SENT[size]
        there, back = sum(sent[rank]), sum(sent[source][rank] for source in range(size))
        away = sent[rank][rank]
        forth = (1, there * row, (there - away) * row)
        return_ = (1, back * row, (back - away) * row)
        both = (2, forth[1] + return_[1], forth[2] + return_[2])
        assert whole < 4 * largest
        assert found["copy"] == [{}, all_reduce, all_reduce]
        assert found["reduce"] == [all_reduce, {}, all_reduce]
        assert found["gather"] == [gathering, {}, gathering]
        assert found["scatter"] == [{}, gathering, gathering]
        assert found["all_gather"] == [gathering, scattering, {**gathering, **scattering}]
        assert found["reduce_scatter"] == [scattering, gathering, {**scattering, **gathering}]
        keys = [{"data/all_to_all": value} for value in (forth, return_, both)]
        assert found["all_to_all"] == keys
