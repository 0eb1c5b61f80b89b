"""Plans of experts over ranks: what every plan must satisfy, on seeded random loads."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from janus.expert_parallel.plan import ExpertPlan, expert_load, fixed_plan, plan_experts


def check_plan(plan: ExpertPlan, load: np.ndarray) -> None:
    """Every copy goes to exactly one rank that holds its expert, and both ends agree on it."""
    num_ranks, num_experts = load.shape
    quotas = np.stack([plan.quota(source) for source in range(num_ranks)])
    assert quotas.dtype == plan.slots.dtype == np.int64
    assert (quotas >= 0).all()
    np.testing.assert_array_equal(quotas.sum(axis=2), load)
    np.testing.assert_array_equal(quotas.sum(axis=(0, 1)), plan.load)
    stay = sum(int(quotas[rank, :, rank].sum()) for rank in range(num_ranks))
    assert plan.tokens_moved == quotas.sum() - stay
    # No rank sends copies away and takes others for the same expert.
    assert not ((plan.tokens > plan.kept) & (plan.taken > 0)).any()
    for rank in range(num_ranks):
        np.testing.assert_array_equal(plan.arrivals(rank), quotas[:, :, rank])
        held = plan.slots[rank][plan.slots[rank] >= 0]
        assert (np.diff(held) > 0).all()
        assert (plan.slots[rank, len(held) :] == -1).all()
        assert set(np.flatnonzero(quotas[:, :, rank].any(axis=0))) <= set(held.tolist())
    assert plan.slots.shape[1] == max(1, (plan.slots >= 0).sum(axis=1).max())
    np.testing.assert_array_equal(plan.num_replicas, [(plan.slots == e).sum() for e in range(num_experts)])
    filled = int((plan.slots >= 0).sum())
    assert plan.weights_moved == pytest.approx(filled * (num_ranks - 1) / num_ranks)


def check_planned(plan: ExpertPlan, load: np.ndarray, balance: float) -> None:
    """A plan just in time: even, and without an expert that computes nothing."""
    check_plan(plan, load)
    total, num_ranks = int(load.sum()), len(load)
    assert plan.load.max() <= max(balance * total / num_ranks, -(-total // num_ranks))
    np.testing.assert_array_equal(plan.num_replicas > 0, load.any(axis=0))
    computed = plan.kept + plan.taken
    assert (plan.slots >= 0).sum() == (computed > 0).sum()


def cost(plan: ExpertPlan, worth: float) -> float:
    """Bytes over those of a token copy."""
    return plan.tokens_moved + worth * plan.weights_moved


def random_load(generator: np.random.Generator) -> np.ndarray:
    """(W, E): few or many tokens, even or from one rank or for one expert, with and without empty rows."""
    num_ranks, num_experts = (int(n) for n in generator.integers(1, 13, 2))
    size = 10.0 ** generator.integers(0, 6)
    load = (size * generator.pareto(generator.choice([0.7, 3.0]), (num_ranks, num_experts))).astype(np.int64)
    load = np.minimum(load, 10**9)
    load *= generator.random(load.shape) < generator.choice([0.1, 0.5, 1.0])
    load *= generator.random((num_ranks, 1)) < generator.choice([0.3, 1.0])
    return load


@pytest.mark.parametrize("seed", range(300))
def test_random_loads(seed: int) -> None:
    generator = np.random.default_rng(seed)
    load = random_load(generator)
    num_ranks, num_experts = load.shape
    balance = float(generator.choice([1.0, 1.01, 1.05, 1.5]))
    token_bytes, expert_bytes = (float(bytes_) for bytes_ in generator.choice([0.0, 1.0, 37.5, 1e4, 1e8], 2))
    before = load.copy()
    plan = plan_experts(load, token_bytes=token_bytes, expert_bytes=expert_bytes, balance=balance)
    check_planned(plan, load, balance)
    again = plan_experts(np.asfortranarray(load), token_bytes=token_bytes, expert_bytes=expert_bytes, balance=balance)
    for name in ("slots", "tokens", "kept", "taken"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(again, name))
    np.testing.assert_array_equal(load, before)
    if num_experts % num_ranks == 0:
        check_plan(fixed_plan(load, num_ranks), load)


@pytest.mark.parametrize(
    "load",
    [
        np.zeros((4, 3), dtype=np.int64),  # no tokens
        np.zeros((1, 1), dtype=np.int64),
        np.array([[5, 0, 7]]),  # one rank
        np.array([[0, 0], [9, 4], [0, 0]]),  # ranks without tokens
        np.array([[0, 1000, 0]] * 8),  # one hot expert
        np.array([[0, 1], [1, 0], [0, 0], [0, 0], [0, 0]]),  # more ranks than tokens
        np.eye(6, dtype=np.int64),
        np.ones((3, 5), dtype=np.int64),
    ],
)
@pytest.mark.parametrize("expert_bytes", [0.0, 10.0, 1e9])
def test_extremes(load: np.ndarray, expert_bytes: float) -> None:
    check_planned(plan_experts(load, token_bytes=1.0, expert_bytes=expert_bytes), load, 1.05)


def test_nothing_to_do() -> None:
    plan = plan_experts(np.zeros((4, 3), dtype=np.int64), token_bytes=1.0, expert_bytes=1.0)
    np.testing.assert_array_equal(plan.slots, np.full((4, 1), -1))
    assert (plan.balance, plan.tokens_moved, plan.weights_moved) == (1.0, 0, 0.0)


def test_weights_come_to_many_tokens() -> None:
    load = np.full((8, 16), 10_000)
    plan = plan_experts(load, token_bytes=1.0, expert_bytes=100.0)
    assert plan.tokens_moved == 0
    np.testing.assert_array_equal(plan.slots, np.tile(np.arange(16), (8, 1)))


def test_few_tokens_travel() -> None:
    plan = plan_experts(np.full((8, 16), 10), token_bytes=1.0, expert_bytes=100_000.0)
    np.testing.assert_array_equal(plan.num_replicas, np.ones(16))
    assert plan.balance == 1.0


def test_hot_expert_has_replicas() -> None:
    load = np.array([[800, 10, 10, 10]] * 4)
    plan = plan_experts(load, token_bytes=1.0, expert_bytes=1e9)
    assert fixed_plan(load, 4).balance > 3.8
    assert plan.balance <= 1.05
    assert plan.num_replicas[0] == 4
    assert plan.num_replicas[1:].max() == 1


@pytest.mark.parametrize("seed", range(40))
def test_tiny_cases_against_every_plan(seed: int) -> None:
    """The largest load is the best there is; the bytes are at most half more than those of the best such plan."""
    generator = np.random.default_rng(seed)
    num_ranks, num_experts = (2, 3) if seed % 2 else (3, 2)
    load = generator.integers(0, 4, (num_ranks, num_experts))
    worth = float(generator.choice([0.5, 2.0, 5.0]))
    plan = plan_experts(load, token_bytes=1.0, expert_bytes=worth, balance=1.0)
    best_load, best_cost = every_plan(load, worth)
    assert plan.load.max() == best_load
    assert cost(plan, worth) <= 1.5 * best_cost + 1e-9


def every_plan(load: np.ndarray, worth: float) -> tuple[int, float]:
    """Smallest largest load of all ways to compute the copies, and the smallest cost of those that have it."""
    num_ranks = len(load)
    splits = [
        [split for split in itertools.product(range(total + 1), repeat=num_ranks) if sum(split) == total]
        for total in load.sum(axis=0)
    ]
    found = []
    for shares in itertools.product(*splits):
        share = np.array(shares).T
        slots = (share > 0).sum() * (num_ranks - 1) / num_ranks
        found.append((int(share.sum(axis=1).max()), np.maximum(share - load, 0).sum() + worth * slots))
    best = min(largest for largest, _ in found)
    return best, min(bytes_ for largest, bytes_ in found if largest == best)


@pytest.mark.parametrize("num_ranks", [8, 64])
@pytest.mark.parametrize("tokens", [30, 1000, 30_000])
def test_no_dearer_than_its_two_ends(num_ranks: int, tokens: int) -> None:
    generator = np.random.default_rng(tokens)
    load = generator.poisson(tokens * generator.pareto(2.0, 24) / 24, (num_ranks, 24))
    plan = plan_experts(load, token_bytes=1.0, expert_bytes=1000.0)
    all_weights = (load > 0).sum() * 1000.0 * (num_ranks - 1) / num_ranks
    few_experts = cost(plan_experts(load, token_bytes=1.0, expert_bytes=1e12), 1000.0)
    assert cost(plan, 1000.0) <= 1.01 * min(all_weights, few_experts)


def test_expert_load_counts_copies() -> None:
    histogram = np.array([[3, 0, 2], [0, 0, 0]])
    routing = np.array([[0, 1], [2, 3], [1, 3]])
    np.testing.assert_array_equal(expert_load(histogram, routing, 4), [[3, 5, 0, 2], [0, 0, 0, 0]])


def test_expert_load_is_exact_for_large_numbers() -> None:
    histogram = np.full((2, 100), 2**43 + 1)
    routing = np.tile(np.arange(4), (100, 1))
    np.testing.assert_array_equal(expert_load(histogram, routing, 5), [[100 * (2**43 + 1)] * 4 + [0]] * 2)


def test_fixed_plan() -> None:
    load = np.arange(8).reshape(2, 4)
    plan = fixed_plan(load, 2)
    np.testing.assert_array_equal(plan.slots, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(plan.load, [0 + 1 + 4 + 5, 2 + 3 + 6 + 7])
    np.testing.assert_array_equal(plan.quota(0), [[0, 0], [1, 0], [0, 2], [0, 3]])
    np.testing.assert_array_equal(plan.arrivals(0), [[0, 1, 0, 0], [4, 5, 0, 0]])
    assert plan.tokens_moved == 2 + 3 + 4 + 5


def test_fixed_plan_needs_a_divisor() -> None:
    with pytest.raises(ValueError, match="8 experts do not divide into 3"):
        fixed_plan(np.zeros((3, 8), dtype=np.int64), 3)


@pytest.mark.parametrize(
    ("token", "expert", "balance"), [(-1.0, 1.0, 1.05), (1.0, float("nan"), 1.05), (1, 1, 0.9), (1, 1, np.inf)]
)
def test_bad_settings(token: float, expert: float, balance: float) -> None:
    with pytest.raises(ValueError, match=re.escape("at least 1 times the mean")):
        plan_experts(np.ones((2, 2), dtype=np.int64), token_bytes=token, expert_bytes=expert, balance=balance)
