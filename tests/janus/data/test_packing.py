import numpy as np
import pytest

from janus.data.packing import Budget, check_fits, plan_micro_batches

NAMES = ("atoms", "edges", "angles")


def make_sizes(count: int, seed: int = 0) -> np.ndarray:
    atoms = np.random.default_rng(seed).integers(1, 60, count)
    return np.stack([atoms, atoms * 40, atoms * 300], axis=1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 64, 257])
def test_every_record_once_within_the_budget(num_ranks, count):
    sizes = make_sizes(count)
    budget = Budget(limits=(150, None, 30_000), names=NAMES)
    plan = plan_micro_batches(sizes, num_ranks=num_ranks, budget=budget)
    assert len(plan) == num_ranks
    positions = np.concatenate([batch for rank in plan for batch in rank])
    np.testing.assert_array_equal(np.sort(positions), np.arange(count))
    for batch in (batch for rank in plan for batch in rank):
        assert len(batch) > 0
        assert (np.diff(batch) > 0).all()
        assert (sizes[batch].sum(axis=0)[[0, 2]] <= (150, 30_000)).all()


def test_cost_is_balanced():
    sizes = make_sizes(512)
    plan = plan_micro_batches(sizes, num_ranks=8, budget=Budget())
    loads = [sizes[rank[0]].sum() for rank in plan]
    assert max(loads) < 1.01 * min(loads)


def test_micro_batches_are_full():
    sizes = np.full((100, 3), 10)
    plan = plan_micro_batches(sizes, num_ranks=1, budget=Budget(limits=(100, None, None), names=NAMES))
    assert [len(batch) for batch in plan[0]] == [10] * 10


def test_ranks_may_get_nothing():
    plan = plan_micro_batches(make_sizes(2), num_ranks=4, budget=Budget())
    assert [len(rank) for rank in plan] == [1, 1, 0, 0]


def test_plan_is_deterministic_with_equal_costs():
    sizes = np.ones((20, 3), np.int64)
    first, second = (plan_micro_batches(sizes, num_ranks=3, budget=Budget()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_oversize_records_are_named():
    sizes = make_sizes(5)
    sizes[3] = 192, 9000, 800_000
    budget = Budget(limits=(100, None, 500_000), names=NAMES)
    with pytest.raises(ValueError, match=r"1 of 5 .*\n  file:3: 192 atoms, 9000 edges, 800000 angles\nraise .*192 at"):
        check_fits(sizes, budget, lambda i: f"file:{i}")
    check_fits(sizes[:3], budget, str)


def test_wrong_budgets():
    with pytest.raises(ValueError, match="one name per limit"):
        Budget(limits=(1, 2))
    with pytest.raises(ValueError, match="0 atoms"):
        Budget(limits=(0,), names=("atoms",))
