"""Exchange of halo rows on ranks: derivatives of any order, adjointness, bytes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from janus.comm.adjoint import copy, reduce
from janus.graph_parallel.halo import HaloPlan, gather_halo, max_halo, reduce_halo, start_gather_halo, start_reduce_halo
from janus.graph_parallel.partition import Reads
from janus.mesh import Axis, Mesh
from tests.parallel.ranks import run_ranks

WIDTH = 3


def table(num_parts: int, seed: int) -> Reads:
    """Random rows; the last part owns none, and the first reads none of others'."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, max(1, num_parts - 1), 7)
    reader = rng.integers(1, num_parts, 20)
    return Reads(owner=owner, reader=reader, row=rng.integers(0, 7, 20), num_parts=num_parts)


def random(rows: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, WIDTH)))


def total(x: Tensor, axis: Axis) -> float:
    """Sum over elements and ranks."""
    return float(reduce(x.detach().sum(), axis))


def exchanged(mesh: Mesh, seed: int) -> dict[str, object]:
    axis, reads = mesh.graph, table(mesh.graph.size, seed)
    plan, rows = reads.plan(axis.rank)
    whole = random(len(reads.owner), 1)
    owned = whole[rows[: plan.num_owned]]
    # Values.
    local = gather_halo(owned, plan, axis)
    assert torch.equal(local, whole[rows])
    shares = [reads.plan(part)[1] for part in range(axis.size)]
    sums = torch.zeros_like(whole)
    for part, its_rows in enumerate(shares):
        sums[its_rows] += random(len(its_rows), 10 + part)
    partial = random(plan.num_local, 10 + axis.rank)
    torch.testing.assert_close(reduce_halo(partial, plan, axis), sums[rows[: plan.num_owned]])
    largest = torch.full_like(whole, -torch.inf)
    for part, its_rows in enumerate(shares):
        largest[its_rows] = torch.maximum(largest[its_rows], random(len(its_rows), 10 + part))
    assert torch.equal(max_halo(partial, plan, axis), largest[rows])
    # Adjointness: <gather x, y> = <x, reduce y> over all ranks.
    x, y = random(plan.num_owned, 20 + axis.rank), random(plan.num_local, 30 + axis.rank)
    assert total(gather_halo(x, plan, axis) * y, axis) == pytest.approx(total(x * reduce_halo(y, plan, axis), axis))
    # Two exchanges at a time.
    x.requires_grad_()
    y.requires_grad_()
    first, second = start_gather_halo(x, plan, axis), start_reduce_halo(y, plan, axis)
    between = x.square().sum()
    value = reduce(between + first.wait().pow(3).sum() + second.wait().pow(3).sum(), axis)
    for result, expected in zip(
        torch.autograd.grad(value, (x, y)),
        (
            2 * x + 3 * reduce_halo(gather_halo(x, plan, axis).square(), plan, axis),
            3 * gather_halo(reduce_halo(y, plan, axis).square(), plan, axis),
        ),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)
    return {"derivatives": derivatives(plan, axis), "bytes": counted(mesh, plan)}


def energy(x: Tensor, y: Tensor, plan: HaloPlan, axis: Axis) -> Tensor:
    """A nonlinear function of owned rows x and local rows y of all ranks, through both exchanges."""
    gathered = gather_halo(x.sin(), plan, axis)
    returned = reduce_halo((gathered * y).exp() * y, plan, axis)
    return reduce((returned * x).sin().sum() + (gathered.square() * y).sum(), axis)


def derivatives(plan: HaloPlan, axis: Axis) -> int:
    """Compares directional derivatives to third order with finite differences. All ranks move along together."""
    x, y = random(plan.num_owned, 40 + axis.rank) / 2, random(plan.num_local, 50 + axis.rank) / 2
    directions = [
        (random(len(x), 60 + axis.rank + order), random(len(y), 70 + axis.rank + order)) for order in range(3)
    ]

    def derivative(at: tuple[Tensor, Tensor], order: int) -> Tensor:
        """D_1 .. D_order of the energy, replicated."""
        leaves = tuple(value.detach().requires_grad_() for value in at)
        value = energy(*leaves, plan, axis)
        for direction in directions[:order]:
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = reduce(sum((g * v).sum() for g, v in zip(gradients, direction, strict=True)), axis)
        return value.detach()

    step = 1e-5
    for order in range(1, 4):
        ends = [
            derivative(
                tuple(a + sign * step * v for a, v in zip((x, y), directions[order - 1], strict=True)), order - 1
            )
            for sign in (1, -1)
        ]
        difference = (ends[0] - ends[1]) / (2 * step)
        found = derivative((x, y), order)
        assert abs(float(found)) > 1e-3
        torch.testing.assert_close(found, difference, rtol=1e-6, atol=1e-6)
    return order


def counted(mesh: Mesh, plan: HaloPlan) -> tuple[int, int]:
    """Bytes of each exchange and of its adjoint equal the plan's formulas."""
    axis, ledger = mesh.graph, mesh.ledger
    row_bytes = 8 * WIDTH
    x, y = random(plan.num_owned, 1).requires_grad_(), random(plan.num_local, 2).requires_grad_()
    for function, rows, forward, backward in (
        (gather_halo, x, plan.gather_bytes(row_bytes), plan.reduce_bytes(row_bytes)),
        (reduce_halo, y, plan.reduce_bytes(row_bytes), plan.gather_bytes(row_bytes)),
    ):
        ledger.clear()
        result = function(rows, plan, axis)
        assert ledger.calls == Counter({"graph/all_to_all": 1})
        assert ledger.bytes["graph/all_to_all"] == ledger.wire_bytes["graph/all_to_all"] == forward
        torch.autograd.grad(result.sum(), rows)
        assert ledger.calls == Counter({"graph/all_to_all": 2})
        assert ledger.wire_bytes["graph/all_to_all"] == forward + backward
    return plan.gather_bytes(row_bytes), plan.reduce_bytes(row_bytes)


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchanges(world_size: int) -> None:
    results = run_ranks(world_size, exchanged, 3, layout={"graph": world_size})
    sent, returned = zip(*(result["bytes"] for result in results), strict=True)
    assert sum(sent) == sum(returned) > 0
    assert all(result["derivatives"] == 3 for result in results)


def gradcheck_on_ranks(mesh: Mesh) -> bool:
    """torch's own checks. Each rank perturbs only its own rows, so each function's outputs must be this rank's alone.

    Every rank plays the same batch at the same time with the inputs of all: leaves are replicated, and each rank takes
    its rows of them, hence each perturbation is seen by all.
    """
    axis, reads = mesh.graph, table(mesh.graph.size, 5)
    plan, rows = reads.plan(axis.rank)
    offsets = np.cumsum([0, *(reads.plan(part)[0].num_local for part in range(axis.size))])
    x, y = random(len(reads.owner), 3) / 2, random(int(offsets[-1]), 4) / 2

    def function(x: Tensor, y: Tensor) -> Tensor:
        own_rows = torch.from_numpy(rows[: plan.num_owned])
        owned = copy(x, axis).index_select(0, own_rows)
        local = copy(y, axis)[offsets[axis.rank] : offsets[axis.rank + 1]]
        return energy(owned, local, plan, axis)

    inputs = (x.requires_grad_(), y.requires_grad_())
    return torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(
        function, inputs, grad_outputs=(torch.ones((), dtype=torch.float64, requires_grad=True),)
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradgradcheck(world_size: int) -> None:
    assert all(run_ranks(world_size, gradcheck_on_ranks, layout={"graph": world_size}))
