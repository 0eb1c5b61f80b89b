"""Groups of records that are drawn in given proportions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from janus.data.packing import Budget
from janus.data.sampler import GlobalBatchSampler, apportion

COUNTS = (100, 30, 7)
GROUPS = np.repeat([0, 1, 2], COUNTS)
SIZES = np.random.default_rng(1).integers(1, 50, (137, 2))
BUDGET = Budget(limits=(400, None), names=("a", "b"))
SHARES = np.array([1.0, 1.0, 2.0])


def sampler(seed: int = 0, shares: np.ndarray = SHARES, *, budget: bool = False) -> GlobalBatchSampler:
    portions = {"global_budget": BUDGET, "sizes": SIZES} if budget else {"global_batch_size": 10}
    return GlobalBatchSampler(137, groups=COUNTS, shares=shares, seed=seed, **portions)


def epoch_of(drawn: GlobalBatchSampler, epoch: int) -> np.ndarray:
    steps = range(drawn.first_step(epoch), drawn.first_step(epoch + 1))
    return np.concatenate([drawn.indices(step) for step in steps])


@pytest.mark.parametrize("budget", [False, True])
def test_every_epoch_has_the_shares(budget: bool) -> None:
    drawn = sampler(budget=budget)
    for epoch in range(4):
        records = epoch_of(drawn, epoch)
        assert len(records) == 137
        assert np.bincount(GROUPS[records]).tolist() == [34, 34, 69]
    assert drawn.epoch(drawn.first_step(3)) == 3


def test_each_pass_over_a_group_has_every_record_once() -> None:
    """Of a group that is drawn in part, as of one that is drawn many times: no record is ever two passes ahead."""
    drawn = sampler()
    seen = np.zeros(137, dtype=np.int64)
    for epoch in range(12):
        seen += np.bincount(epoch_of(drawn, epoch), minlength=137)
        for group, count in enumerate((34, 34, 69)):
            of_group = seen[np.equal(GROUPS, group)]
            assert of_group.sum() == (epoch + 1) * count
            assert of_group.max() - of_group.min() <= 1
    # Passes have orders of their own.
    whole = sampler(shares=np.array([100.0, 30.0, 7.0]))
    first, second = (epoch_of(whole, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(137))
    assert not np.array_equal(first, second)


def test_groups_are_mixed_within_an_epoch() -> None:
    tasks = [set(GROUPS[sampler().indices(step)]) for step in range(14)]
    assert sum(len(found) > 1 for found in tasks) == 14


@pytest.mark.parametrize("budget", [False, True])
def test_a_step_depends_on_seed_and_step_alone(budget: bool) -> None:
    forward, backward = sampler(3, budget=budget), sampler(3, budget=budget)
    batches = [forward.indices(step) for step in range(60)]
    for step in reversed(range(60)):
        np.testing.assert_array_equal(backward.indices(step), batches[step])
        if step % 20 == 7:  # as if resumed there
            np.testing.assert_array_equal(sampler(3, budget=budget).indices(step), batches[step])
    assert not np.array_equal(sampler(4, budget=budget).indices(0), batches[0])


def test_budget_is_kept() -> None:
    drawn = sampler(budget=True)
    assert max(SIZES[drawn.indices(step)][:, 0].sum() for step in range(drawn.first_step(2))) <= 400


def test_without_groups_nothing_is_different() -> None:
    """The order of before there were groups, written out."""
    drawn = GlobalBatchSampler(10, global_batch_size=5, seed=3)
    expected = np.random.default_rng([3, 1]).permutation(10)
    np.testing.assert_array_equal(np.concatenate([drawn.indices(2), drawn.indices(3)]), expected)


@pytest.mark.parametrize(
    ("total", "shares", "parts"),
    [
        (10, [1, 1], [5, 5]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (3, [1, 1, 1], [1, 1, 1]),
        (3, [1000, 1, 1], [1, 1, 1]),
        (5, [1000, 1, 1], [3, 1, 1]),
        (100, [1e-300, 1.0], [1, 99]),
        (7, [0.0, 2.0], [1, 6]),
        (1, [0.3], [1]),
        (11, [1, 1, 1], [4, 4, 3]),
    ],
)
def test_apportion(total: int, shares: list[float], parts: list[int]) -> None:
    assert apportion(total, np.array(shares)).tolist() == parts


def test_apportion_is_as_near_as_whole_numbers_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shares = rng.uniform(0.01, 1.0, rng.integers(1, 9)) ** 3
        total = int(rng.integers(len(shares), 500))
        parts, exact = apportion(total, shares), total * shares / shares.sum()
        assert parts.sum() == total
        assert parts.min() >= 1
        if exact.min() >= 1.0:
            assert abs(parts - exact).max() < 1.0
        order = np.argsort(shares)
        assert all(parts[small] <= parts[large] + 1 for small, large in pairwise(order))


def test_too_few_records_for_all_groups() -> None:
    with pytest.raises(ValueError, match=r"2 records do not give each of 3 groups one"):
        apportion(2, np.ones(3))
