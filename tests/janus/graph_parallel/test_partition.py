"""Partitioners and exchange plans on random rows."""

from __future__ import annotations

import numpy as np
import pytest

from janus.graph_parallel.partition import PARTITIONERS, Nodes, Reads, assign_owners, morton_order


def cloud(count: int, seed: int = 0) -> Nodes:
    rng = np.random.default_rng(seed)
    return Nodes(
        positions=rng.uniform(-5.0, 20.0, (count, 3)),
        group=np.sort(rng.integers(0, 3, count)),
        cost=rng.integers(1, 100, count),
    )


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("count", [0, 1, 3, 500])
@pytest.mark.parametrize("num_parts", [1, 4, 7])
def test_every_node_has_one_owner(partitioner: str, count: int, num_parts: int) -> None:
    nodes = cloud(count)
    owner = assign_owners(partitioner, nodes, num_parts)
    assert owner.shape == (count,)
    assert owner.dtype == np.int64
    assert ((owner >= 0) & (owner < num_parts)).all()
    np.testing.assert_array_equal(owner, assign_owners(partitioner, nodes, num_parts))
    if count == 500:
        load = np.bincount(owner, weights=nodes.cost, minlength=num_parts)
        allowed = {"index": 1.3, "morton": 1.05, "balanced": 1.01}[partitioner]
        assert load.max() <= allowed * load.mean()


def test_unknown_partitioner_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed are morton, index, balanced"):
        assign_owners("metis", cloud(3), 2)


def test_the_curve_keeps_near_nodes_together() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), axis=-1).reshape(-1, 3).astype(float)
    shuffled = np.random.default_rng(0).permutation(len(grid))
    nodes = Nodes(positions=grid[shuffled], group=np.zeros(512, np.int64), cost=np.ones(512))
    owner = np.empty(512, np.int64)
    owner[shuffled] = assign_owners("morton", nodes, 8)
    # Eight parts of equal cost are the eight octants.
    octant = ((grid >= 4) @ np.array([1, 2, 4])).astype(int)
    assert len(set(zip(owner.tolist(), octant.tolist(), strict=True))) == 8
    groups = cloud(100).group
    assert (np.diff(groups[morton_order(cloud(100))]) >= 0).all()


@pytest.mark.parametrize(("rows", "reads", "num_parts"), [(0, 0, 3), (5, 0, 2), (40, 300, 4), (3, 60, 6)])
def test_plans_of_all_parts_match(rows: int, reads: int, num_parts: int) -> None:
    rng = np.random.default_rng(rows)
    table = Reads(
        owner=rng.integers(0, num_parts, rows),
        reader=rng.integers(0, num_parts, reads),
        row=rng.integers(0, max(1, rows), reads),
        num_parts=num_parts,
    )
    plans = [table.plan(part) for part in range(num_parts)]
    for part, (plan, local) in enumerate(plans):
        owned = local[: plan.num_owned]
        np.testing.assert_array_equal(owned, np.flatnonzero(table.owner == part))
        assert plan.num_local == len(local) == len(set(local.tolist()))
        assert set(local.tolist()) == set(owned.tolist()) | set(table.row[table.reader == part].tolist())
        assert plan.send[part] == plan.receive[part] == 0
        assert len(plan.send_index) == sum(plan.send)
        # What arrives is what the others send, row by row.
        arriving = []
        for other, (lender, its_rows) in enumerate(plans):
            start = sum(lender.send[:part])
            lent = lender.send_index.numpy()[start : start + lender.send[part]]
            assert plan.receive[other] == len(lent)
            arriving.append(its_rows[lent])
        np.testing.assert_array_equal(local[plan.num_owned :], np.concatenate(arriving))
    np.testing.assert_array_equal(table.cut(), [plan.send for plan, _ in plans])
