"""Plans of experts over ranks: what every plan must satisfy, on seeded random loads."""

from __future__ import annotations

import numpy as np
import pytest

from janus.expert_parallel.plan import ExpertPlan, expert_load, fixed_plan, plan_experts


def check_plan(plan: ExpertPlan, load: np.ndarray) -> None:
    num_ranks, num_experts = load.shape
    quotas = np.stack([plan.quota(source) for source in range(num_ranks)])
    assert quotas.dtype == np.int64
    assert (quotas >= 0).all()
    np.testing.assert_array_equal(quotas.sum(axis=2), load)
    np.testing.assert_array_equal(quotas.sum(axis=(0, 1)), plan.load)
    assert plan.tokens_moved == quotas.sum() - sum(np.trace(quotas[:, e]) for e in range(num_experts))
    for rank in range(num_ranks):
        np.testing.assert_array_equal(plan.arrivals(rank), quotas[:, :, rank])
        held = plan.slots[rank][plan.slots[rank] >= 0]
        assert (np.diff(held) > 0).all()
        assert (plan.slots[rank, len(held) :] == -1).all()
        assert set(np.flatnonzero(quotas[:, :, rank].any(axis=0))) <= set(held.tolist())
    assert plan.slots.dtype == np.int64
    assert plan.slots.shape[1] == max(1, (plan.slots >= 0).sum(axis=1).max())
    np.testing.assert_array_equal(plan.num_replicas, [(plan.slots == e).sum() for e in range(num_experts)])


@pytest.mark.parametrize("seed", range(20))
def test_random_loads(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_ranks, num_experts = generator.integers(1, 9), generator.integers(1, 13)
    load = generator.integers(0, 10 ** generator.integers(1, 5), (num_ranks, num_experts))
    load *= generator.random(load.shape) < generator.random()
    plan = plan_experts(load, token_bytes=1.0, expert_bytes=10.0 ** generator.integers(0, 5))
    check_plan(plan, load)
    if num_experts % num_ranks == 0:
        check_plan(fixed_plan(load, int(num_ranks)), load)


def test_expert_load_counts_copies() -> None:
    histogram = np.array([[3, 0, 2], [0, 0, 0]])
    routing = np.array([[0, 1], [2, 3], [1, 3]])
    np.testing.assert_array_equal(expert_load(histogram, routing, 4), [[3, 5, 0, 2], [0, 0, 0, 0]])


def test_fixed_plan_needs_a_divisor() -> None:
    with pytest.raises(ValueError, match="8 experts do not divide into 3"):
        fixed_plan(np.zeros((3, 8), dtype=np.int64), 3)
