"""From a global batch to the micro-batches of each rank. Pure: the same on every rank, no communication."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """Bytes of a micro-batch as a sum over its records.

    Attributes:
        available: for a micro-batch.
        per_unit: bytes of a unit of each column of `sizes`.
        advice: what to do about a record that needs more on its own, for messages.
    """

    available: float
    per_unit: tuple[float, ...]
    advice: str

    def of_records(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) bytes of each record (n, columns)."""
        return sizes @ np.array(self.per_unit)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Largest sums of record sizes in one micro-batch (or one global batch).

    Attributes:
        limits: one per column of `sizes`; None for no limit. Empty: no limit at all.
        names: what the columns count, for messages.
        memory: also a limit of the bytes that a micro-batch needs.
    """

    limits: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()
    memory: MemoryLimit | None = None

    def __post_init__(self) -> None:
        if len(self.limits) != len(self.names):
            raise ValueError(f"a budget needs one name per limit, got limits {self.limits} and names {self.names}")
        for name, limit in zip(self.names, self.limits, strict=True):
            if limit is not None and limit < 1:
                raise ValueError(f"budget of {limit} {name}: at least 1 is needed; leave it out for no limit")

    def capacity(self, columns: int) -> np.ndarray:
        """Limits of what `measure` gives, float64, inf where there is none."""
        limits = self.limits or (None,) * columns
        of_memory = () if self.memory is None else (self.memory.available,)
        return np.array([np.inf if limit is None else limit for limit in (*limits, *of_memory)])

    def measure(self, sizes: np.ndarray) -> np.ndarray:
        """What is limited of records: their sizes (n, columns), and with a limit of memory one column more."""
        return sizes if self.memory is None else np.column_stack([sizes, self.memory.of_records(sizes)])


def check_fits(sizes: np.ndarray, budget: Budget, identifier: Callable[[int], str]) -> None:
    """Refuse records that exceed the budget on their own; nothing is ever dropped.

    Args:
        sizes: (n, columns).
        identifier: name of record i, for the message.
    Raises:
        ValueError: names the records (the first ten) with their sizes and says which limits would do.
    """
    exceeds = budget.measure(sizes) > budget.capacity(sizes.shape[1])
    if budget.memory is not None and exceeds[:, -1].any():
        _refuse_for_memory(np.nonzero(exceeds[:, -1])[0], sizes, budget.memory, identifier)
    too_large = np.nonzero(exceeds.any(axis=1))[0]
    if not len(too_large):
        return
    listed = "\n".join(
        f"  {identifier(int(i))}: " + ", ".join(f"{sizes[i, c]} {name}" for c, name in enumerate(budget.names))
        for i in too_large[:10]
    )
    more = f"\n  and {len(too_large) - 10} more" if len(too_large) > 10 else ""
    limits = ", ".join(f"{limit} {name}" for limit, name in zip(budget.limits, budget.names, strict=True) if limit)
    needed = sizes[too_large].max(axis=0)
    wanted = ", ".join(
        f"{needed[c]} {name}"
        for c, name in enumerate(budget.names)
        if (limit := budget.limits[c]) is not None and needed[c] > limit
    )
    raise ValueError(
        f"{len(too_large)} of {len(sizes)} records exceed the budget of {limits} on their own:\n{listed}{more}\n"
        f"raise the budget to at least {wanted}, or leave these records out of the data"
    )


def _refuse_for_memory(
    too_large: np.ndarray, sizes: np.ndarray, memory: MemoryLimit, identifier: Callable[[int], str]
) -> None:
    needed = memory.of_records(sizes)
    listed = "\n".join(f"  {identifier(int(i))}: {needed[i] / 1e9:.3g} GB" for i in too_large[:10])
    more = f"\n  and {len(too_large) - 10} more" if len(too_large) > 10 else ""
    raise ValueError(
        f"{len(too_large)} of {len(sizes)} records need more memory on their own than the {memory.available / 1e9:.3g} "
        f"GB that there are for a micro-batch:\n{listed}{more}\n{memory.advice}"
    )


def plan_micro_batches(
    sizes: np.ndarray,
    *,
    num_ranks: int,
    budget: Budget,
    cost: np.ndarray | None = None,
    same_count: bool = False,
) -> list[list[np.ndarray]]:
    """Split a global batch over ranks, balanced by cost, and each share into micro-batches within the budget.

    Args:
        sizes: (n, columns) sizes of the records of the global batch.
        budget: per micro-batch; every record fits on its own (`check_fits`).
        cost: (n,) work of each record; by default the sum of its sizes.
        same_count: give every rank as many micro-batches as the one with the most needs, for ranks that run each
            together: the first of all ranks of like cost, and so on; without records where there are too few.
    Returns:
        Per rank a list of micro-batches, each an array of positions 0..n-1 in rising order. Every position occurs
        exactly once; without `same_count` a rank without records has an empty list.
    """
    cost = sizes.sum(axis=1) if cost is None else cost
    order = np.argsort(-cost, kind="stable")
    records = _Records(
        cost[order].astype(np.float64).tolist(), budget.measure(sizes[order]), budget.capacity(sizes.shape[1])
    )
    shares = _exchanged(_balance(records.cost, [0.0] * num_ranks), records)
    plan = _split(shares, records)
    if same_count:
        plan = _aligned(shares, plan, records)
    return [[np.sort(order[part]) for part in parts] for parts in plan]


@dataclass(frozen=True)
class _Records:
    """Those of a global batch, costliest first: their cost, their sizes (n, columns), and limits (columns,)."""

    cost: list[float]
    sizes: np.ndarray
    capacity: np.ndarray


def _balance(falling: Sequence[float], wanted: Sequence[float]) -> list[list[int]]:
    """Largest first, each to the bin that lacks most of what it should have.

    With bins alike: at most 4/3 of the best possible largest load (Graham 1969).
    """
    bins: list[list[int]] = [[] for _ in wanted]
    loads = [(-load, number) for number, load in enumerate(wanted)]
    heapq.heapify(loads)
    for i, value in enumerate(falling):
        load, number = loads[0]
        bins[number].append(i)
        heapq.heapreplace(loads, (load + value, number))
    return bins


def _exchanged(shares: list[list[int]], records: _Records) -> list[list[int]]:
    """With records of the most and the least loaded share exchanged one for one, as long as it helps and must be."""
    cost = np.array(records.cost)
    loads = np.array([cost[share].sum() for share in shares])
    good = _GOOD * loads.mean()
    for _ in range(len(shares)):
        most, least = int(loads.argmax()), int(loads.argmin())
        gap = loads[most] - loads[least]
        if loads[most] <= good or not shares[least]:
            break
        moved = cost[shares[most]][:, None] - cost[shares[least]]
        give, take = np.unravel_index(np.abs(moved - gap / 2).argmin(), moved.shape)
        if not 0.0 < (amount := moved[give, take]) < gap:
            break
        first, second = shares[most], shares[least]
        first[give], second[take] = second[take], first[give]
        first.sort()
        second.sort()
        loads[most] -= amount
        loads[least] += amount
    return shares


_ATTEMPTS = 3
"""With one part more each. First fit then needs fewer parts than another would."""
_GOOD = 1.005
"""Largest load over the mean that is worth no more search."""


def _split(shares: list[list[int]], records: _Records) -> list[list[list[int]]]:
    """Each share as balanced parts within the capacity: as few as its sums allow, or, where balance misses, a few more.

    Where that fails too, first fit of the largest first, which always fits.
    """
    plan = [[share] if share else [] for share in shares]
    exceeding = _exceeding(plan, range(len(plan)), records)
    for attempt in range(_ATTEMPTS):
        for number in exceeding:
            share, count = shares[number], len(plan[number]) + 1
            if attempt == 0:
                count = int(np.ceil(records.sizes[share].sum(axis=0) / records.capacity).max())
            plan[number] = _divided(share, [0.0] * min(count, len(share)), records)
        exceeding = _exceeding(plan, exceeding, records)
    for number in exceeding:
        plan[number] = _first_fit(shares[number], records)
    return plan


def _aligned(shares: list[list[int]], plan: list[list[list[int]]], records: _Records) -> list[list[list[int]]]:
    """As many parts of every share, the first of all shares of like cost, and so on; some empty for want of records.

    A share that is one large record has its first part from that; the others then take as much into theirs.
    """
    count = max(map(len, plan))
    best, shortest = _padded(plan, count), float("inf")
    mean = sum(records.cost) / len(shares)
    wanted = [0.0] * count
    for known in range(1, count + 1):
        tried = [_divided(share, wanted, records) for share in shares]
        for number in _exceeding(tried, range(len(tried)), records):
            tried[number] = plan[number]
        tried = _padded(tried, count)
        longest = [max(sum(records.cost[i] for i in parts[m]) for parts in tried) for m in range(count)]
        if sum(longest) < shortest:
            best, shortest = tried, sum(longest)
        if shortest <= _GOOD * mean or known == count:
            break
        rest = max(0.0, mean - sum(longest[:known])) / (count - known)
        wanted = longest[:known] + [rest] * (count - known)
    return best


def _padded(plan: list[list[list[int]]], count: int) -> list[list[list[int]]]:
    return [parts + [[] for _ in range(count - len(parts))] for parts in plan]


def _divided(share: list[int], wanted: Sequence[float], records: _Records) -> list[list[int]]:
    """A share as parts of about the wanted cost, those that get a record."""
    return [[share[i] for i in part] for part in _balance([records.cost[i] for i in share], wanted) if part]


def _exceeding(plan: list[list[list[int]]], numbers: Sequence[int], records: _Records) -> list[int]:
    """Those of the shares `numbers` of which a part exceeds the capacity."""
    limited = np.isfinite(records.capacity)
    parts = [part for number in numbers for part in plan[number]]
    if not parts or not limited.any():
        return []
    flat = np.fromiter((i for part in parts for i in part), np.int64)
    starts = np.cumsum([0, *map(len, parts[:-1])])
    sums = np.add.reduceat(records.sizes[flat][:, limited], starts, axis=0)
    owner = np.repeat(numbers, [len(plan[number]) for number in numbers])
    return np.unique(owner[(sums > records.capacity[limited]).any(axis=1)]).tolist()


def _first_fit(share: list[int], records: _Records) -> list[list[int]]:
    """Each record into the first part that has room for it."""
    parts: list[list[int]] = []
    room = np.empty((len(share), len(records.capacity)))
    for i in share:
        size = records.sizes[i]
        fits = (room[: len(parts)] >= size).all(axis=1)
        chosen = int(fits.argmax()) if fits.any() else len(parts)
        if chosen == len(parts):
            parts.append([])
            room[chosen] = records.capacity
        parts[chosen].append(i)
        room[chosen] -= size
    return parts
