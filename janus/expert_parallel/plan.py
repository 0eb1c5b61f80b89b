"""Which rank of the expert axis computes which expert for whose tokens, planned from the tokens themselves.

Where the kind of a token decides its experts, the number of token copies that each expert gets is known before the
forward pass. Pure numpy on integers: every rank computes the same plan from the same numbers.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """Experts in the slots of W ranks, and where the copies of tokens for E experts go.

    A source's copies for an expert that its own rank holds stay there as far as `kept` says. All other copies for the
    expert stand in a line in the order of their sources, and the ranks that take some cut it in their own order: so
    (W, E) numbers say what (W, E, W) would.

    Attributes:
        slots: (W, S) int64 expert in each slot of each rank, ascending, then -1; S >= 1 is the most of any rank.
        tokens: (W, E) int64 copies by source rank and expert.
        kept: (W, E) int64 copies that their own rank computes.
        taken: (W, E) int64 copies of other ranks by destination and expert; 0 where a rank sends copies away itself.
    """

    slots: np.ndarray
    tokens: np.ndarray
    kept: np.ndarray
    taken: np.ndarray

    def quota(self, source: int) -> np.ndarray:
        """(E, W) int64 copies of a source rank by expert and destination; over destinations they add up to `tokens`."""
        sent = self.tokens - self.kept
        end = sent[: source + 1].sum(axis=0)
        cut = np.cumsum(self.taken, axis=0)
        copies = _overlap(end - sent[source], end, cut - self.taken, cut).T.copy()
        copies[:, source] += self.kept[source]
        return copies

    def arrivals(self, destination: int) -> np.ndarray:
        """(W, E) int64 copies that a rank computes by source and expert: `quota(s)[:, destination]` in row s."""
        sent = self.tokens - self.kept
        end = np.cumsum(sent, axis=0)
        cut = self.taken[: destination + 1].sum(axis=0)
        copies = _overlap(cut - self.taken[destination], cut, end - sent, end)
        copies[destination] += self.kept[destination]
        return copies

    @property
    def num_replicas(self) -> np.ndarray:
        """(E,) int64 ranks that hold each expert."""
        return np.bincount(self.slots[self.slots >= 0], minlength=self.tokens.shape[1])

    @property
    def load(self) -> np.ndarray:
        """(W,) int64 copies that each rank computes."""
        return (self.kept + self.taken).sum(axis=1)

    @property
    def balance(self) -> float:
        """Largest load of a rank / mean load; 1 where there are no tokens."""
        load = self.load
        total = int(load.sum())
        return int(load.max()) * len(load) / total if total else 1.0

    @property
    def tokens_moved(self) -> int:
        """Copies whose destination is another rank."""
        return int(self.taken.sum())

    @property
    def weights_moved(self) -> float:
        """Experts that ranks gather where each stores 1/W of every expert: (W - 1) / W for each filled slot."""
        num_ranks = len(self.slots)
        return int((self.slots >= 0).sum()) * (num_ranks - 1) / num_ranks


def expert_load(histogram: np.ndarray, routing: np.ndarray, num_experts: int) -> np.ndarray:
    """(W, E) int64 token copies by source rank and expert.

    Args:
        histogram: (W, K) int64 tokens by rank and kind.
        routing: (K, topk) int64 the experts of each kind, all different.
    """
    kinds = np.flatnonzero(histogram.any(axis=0))
    serves = np.zeros((len(kinds), num_experts))
    serves[np.arange(len(kinds))[:, None], routing[kinds]] = 1.0
    # Whole numbers below 2^53: float64 holds every partial sum exactly, in whatever order a library adds.
    return (histogram[:, kinds].astype(np.float64) @ serves).astype(np.int64)


def fixed_plan(load: np.ndarray, num_ranks: int) -> ExpertPlan:
    """Whole experts at home: rank r holds experts r E / W, ..., (r + 1) E / W - 1, and all their copies go there.

    Args:
        load: (W, E) int64 copies by source rank and expert.
    Raises:
        ValueError: the ranks do not divide the experts.
    """
    num_experts = load.shape[1]
    if num_experts % num_ranks:
        raise ValueError(
            f"{num_experts} experts do not divide into {num_ranks} expert-parallel ranks: choose a number of ranks "
            "that divides them, or the sharded placement"
        )
    slots = np.arange(num_experts).reshape(num_ranks, -1)
    kept = np.zeros_like(load)
    at_home = np.arange(num_ranks)[:, None], slots
    kept[at_home] = load[at_home]
    taken = np.zeros_like(load)
    taken[at_home] = load.sum(axis=0)[slots] - kept[at_home]
    return ExpertPlan(slots=slots, tokens=load, kept=kept, taken=taken)


def plan_experts(load: np.ndarray, *, token_bytes: float, expert_bytes: float, balance: float = 1.05) -> ExpertPlan:
    """Just in time: the experts that these tokens need, on ranks such that loads are even and few bytes move.

    The largest load is at most `balance` times the mean, or the mean rounded up where no whole number is between. Then
    the bytes are few: token_bytes for each copy that moves, expert_bytes (W - 1) / W for each filled slot. Weights come
    to the ranks that have many tokens for an expert, and all other tokens go to few ranks.

    Args:
        load: (W, E) int64 copies by source rank and expert.
    Raises:
        ValueError: negative bytes, or a balance below 1.
    """
    if not (token_bytes >= 0.0 and expert_bytes >= 0.0 and 1.0 <= balance < float("inf")):
        raise ValueError(
            f"a plan for {token_bytes} bytes of a token, {expert_bytes} bytes of an expert and a largest load of "
            f"{balance} times the mean: bytes are at least 0, and the largest load at least 1 times the mean"
        )
    num_ranks, total = len(load), int(load.sum())
    if num_ranks == 1 or total == 0:
        return _plan(load, load)
    numerator, denominator = float(balance).as_integer_ratio()
    limit = max(numerator * total // (denominator * num_ranks), -(-total // num_ranks))
    # From here on everything is a whole number: a slot costs as much as `worth` copies that move.
    slot_bytes = expert_bytes * (num_ranks - 1) / num_ranks
    worth = int(slot_bytes / token_bytes) if slot_bytes < token_bytes * total else total
    return _plan(load, _placed(load, load > worth, limit))


def _placed(load: np.ndarray, at_home: np.ndarray, limit: int) -> np.ndarray:
    """(W, E) copies that each rank computes, at most `limit` in a row; as in `load` where `at_home`, as far as it can.

    Copies from elsewhere go to slots that are filled anyway, or else to as few new ones as can be.
    """
    share = np.where(at_home, load, 0)
    room = limit - share.sum(axis=1)
    if room.min() < 0:
        _shed(share, np.flatnonzero(room < 0), limit)
        room = limit - share.sum(axis=1)
    moving = (load - share).sum(axis=0)
    _fill(share, moving, room)
    if moving.any():
        _pack(share, load, moving, room)
    return share


_ROUNDS = 3
"""Of looking for room in filled slots; more find next to nothing."""


def _shed(share: np.ndarray, ranks: np.ndarray, limit: int) -> None:
    """Takes what is over the limit away from these ranks: the smallest first, for that empties the most slots."""
    num_experts = share.shape[1]
    held = share[ranks]
    # Here and below sorts have keys without ties, for how ties fall may differ between machines.
    order = np.sort(held * num_experts + np.arange(num_experts), axis=1) % num_experts
    rows = np.arange(len(ranks))[:, None]
    in_order = held[rows, order]
    over = in_order.sum(axis=1, keepdims=True) - limit
    held[rows, order] = in_order - _first(in_order, over, axis=1)
    share[ranks] = held


def _fill(share: np.ndarray, moving: np.ndarray, room: np.ndarray) -> None:
    """Gives moving copies to slots that are filled anyway, in proportion to the room there.

    Where experts want the same room, the one comes first that is offered the least.
    """
    ranks, experts = np.flatnonzero(room), np.flatnonzero(moving)
    filled = (share.take(ranks, axis=0) > 0).take(experts, axis=1)
    for _ in range(_ROUNDS):
        free, needed = room[ranks], moving[experts]
        offered = free @ filled
        some_free, some = np.flatnonzero(free), np.flatnonzero(np.minimum(offered, needed))
        if not len(some):
            break
        some = some[np.argsort(offered[some] * len(offered) + some)]
        filled = filled.take(some_free, axis=0).take(some, axis=1)
        ranks, free = ranks[some_free], free[some_free, None]
        experts, needed, offered = experts[some], needed[some], offered[some]
        wanted = -(-free * np.minimum(needed, offered) // offered) * filled
        given = _first(_first(wanted, needed, axis=0), free, axis=1)
        share[ranks[:, None], experts] += given
        moving[experts] -= given.sum(axis=0)
        room[ranks] -= given.sum(axis=1)


def _pack(share: np.ndarray, load: np.ndarray, moving: np.ndarray, room: np.ndarray) -> None:
    """Gives each expert's moving copies to few ranks: the largest first, where the most are already, or where they fit.

    What fits nowhere as a whole fills a rank, and its rest waits for its turn.
    """
    num_ranks = len(load)
    experts = np.flatnonzero(moving)
    present = (load - share)[:, experts] * num_ranks + np.arange(num_ranks)[:, None]
    present = np.sort(present, axis=0) % num_ranks
    ranks_of = dict(zip(experts.tolist(), present.T.tolist(), strict=True))
    waiting = list(zip((-moving[experts]).tolist(), experts.tolist(), strict=True))
    heapq.heapify(waiting)
    rooms = room.tolist()
    free = sorted((size, rank) for rank, size in enumerate(rooms) if size)
    while waiting:
        size, expert = heapq.heappop(waiting)
        size = -size
        wanted = min(size, free[-1][0])
        ranks = ranks_of[expert]
        while ranks and rooms[ranks[-1]] < wanted:  # its turn is over: room only shrinks
            ranks.pop()
        rank = ranks[-1] if ranks else free[bisect_left(free, (wanted, 0))][1]
        del free[bisect_left(free, (rooms[rank], rank))]
        rooms[rank] -= wanted
        if rooms[rank]:
            insort(free, (rooms[rank], rank))
        share[rank, expert] += wanted
        if size > wanted:
            heapq.heappush(waiting, (wanted - size, expert))


def _first(sizes: np.ndarray, total: np.ndarray, *, axis: int) -> np.ndarray:
    """Of each size what is left of the total when those before it have taken theirs."""
    left = np.cumsum(sizes, axis=axis)
    np.subtract(total, left, out=left)
    left += sizes
    return np.minimum(np.maximum(left, 0, out=left), sizes, out=left)


def _plan(load: np.ndarray, share: np.ndarray) -> ExpertPlan:
    """The plan in which each rank computes so many copies of each expert, its own ones first."""
    kept = np.minimum(share, load)
    filled = share > 0
    num_slots = filled.sum(axis=1)
    width = max(1, int(num_slots.max()))
    slots = np.full((len(load), width), -1)
    slots[np.arange(width) < num_slots[:, None]] = np.nonzero(filled)[1]
    return ExpertPlan(slots=slots, tokens=load, kept=kept, taken=share - kept)


def _overlap(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Length that intervals of whole numbers share."""
    return np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0)
