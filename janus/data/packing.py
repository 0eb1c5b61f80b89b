"""From a global batch to the micro-batches of each rank. Pure: the same on every rank, no communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from janus.data.shared_rows import blocks

Plan: TypeAlias = list[list[np.ndarray]]
"""Per rank a list of micro-batches, each an array of positions in the global batch."""


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """Bytes of a micro-batch as a sum over its records.

    Attributes:
        available: for a micro-batch.
        per_unit: bytes of a unit of each column of `sizes`.
        advice: from sizes (n, columns) of records of which each needs more on its own to what to do about them.
    """

    available: float
    per_unit: tuple[float, ...]
    advice: Callable[[np.ndarray], str]

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
    capacity = budget.capacity(sizes.shape[1])
    records, exceeded = [np.empty(0, np.int64)], [np.empty((0, len(capacity)), bool)]
    for part in blocks(len(sizes)):
        exceeds = budget.measure(sizes[part]) > capacity
        some = np.flatnonzero(exceeds.any(axis=1))
        records.append(part.start + some)
        exceeded.append(exceeds[some])
    too_large, which = np.concatenate(records), np.concatenate(exceeded)
    if not len(too_large):
        return
    if budget.memory is not None and which[:, -1].any():
        _refuse_for_memory(too_large[which[:, -1]], sizes, budget.memory, identifier)
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
    needed = memory.of_records(sizes[too_large[:10]])
    listed = "\n".join(f"  {identifier(int(i))}: {own / 1e9:.3g} GB" for i, own in zip(too_large, needed, strict=False))
    more = f"\n  and {len(too_large) - 10} more" if len(too_large) > 10 else ""
    raise ValueError(
        f"{len(too_large)} of {len(sizes)} records need more memory on their own than the {memory.available / 1e9:.3g} "
        f"GB that there are for a micro-batch:\n{listed}{more}\n{memory.advice(sizes[too_large])}"
    )


def plan_micro_batches(
    sizes: np.ndarray,
    *,
    num_ranks: int,
    budget: Budget,
    cost: np.ndarray | None = None,
    same_count: bool = False,
) -> Plan:
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
        cost[order].astype(np.float64), budget.measure(sizes[order]), budget.capacity(sizes.shape[1]), num_ranks
    )
    share = _exchanged(_balance(records.cost, num_ranks), records)
    part = _split(share, records)
    if same_count:
        part = _aligned(share, part, records)
    return _lists(share, part, order, num_ranks, keep_empty=same_count)


@dataclass(frozen=True)
class _Records:
    """Those of a global batch, costliest first: their cost (n,), their sizes (n, columns), limits (columns,), ranks.

    A plan of them is two numbers of each: whose share it is in, and in which part of that. Shares are numbered from 0,
    and so are the parts of each, none of which is empty.
    """

    cost: np.ndarray
    sizes: np.ndarray
    capacity: np.ndarray
    num_ranks: int


def _lists(share: np.ndarray, part: np.ndarray, order: np.ndarray, num_ranks: int, *, keep_empty: bool) -> Plan:
    """Positions of the records of each part; with `keep_empty` all shares have as many parts."""
    most = _most(part)
    flat = share * most + part
    positions = order[np.lexsort((order, flat))]
    ends = np.cumsum(np.bincount(flat, minlength=num_ranks * most)).tolist()
    pieces = [positions[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rows = [pieces[start : start + most] for start in range(0, num_ranks * most, most)]
    return rows if keep_empty else [[piece for piece in row if len(piece)] for row in rows]


def _most(part: np.ndarray) -> int:
    """Number of parts of the share with the most."""
    return int(part.max(initial=-1)) + 1


def _balance(cost: np.ndarray, num_ranks: int) -> np.ndarray:
    """Largest first, each to the rank with the smallest load; (n,) the rank of each.

    At most 4/3 of the best possible largest load (Graham 1969).
    """
    rank, loads, start = np.empty(len(cost), np.int64), np.zeros(num_ranks), 0
    while start < len(cost):
        lightest = np.argsort(loads, kind="stable")
        before = loads[lightest]
        after = before[: len(cost) - start] + cost[start : start + num_ranks]
        # One record to each of the lightest, up to that which is no lighter than one that has got its record.
        in_turn = before[1 : len(after)] < np.minimum.accumulate(after[:-1])
        count = len(after) if in_turn.all() else 1 + int(in_turn.argmin())
        rank[start : start + count] = lightest[:count]
        loads[lightest[:count]] = after[:count]
        start += count
    return rank


def _exchanged(share: np.ndarray, records: _Records) -> np.ndarray:
    """With records of the most and the least loaded share exchanged one for one, as long as it helps and must be."""
    cost = records.cost
    loads = np.bincount(share, weights=cost, minlength=records.num_ranks)
    good = _GOOD * loads.mean()
    for _ in range(records.num_ranks):
        most, least = int(loads.argmax()), int(loads.argmin())
        gap = loads[most] - loads[least]
        if loads[most] <= good:
            break
        first, second = np.flatnonzero(share == most), np.flatnonzero(share == least)
        if not len(second):
            break
        moved = cost[first][:, None] - cost[second]
        give, take = np.unravel_index(np.abs(moved - gap / 2).argmin(), moved.shape)
        if not 0.0 < (amount := moved[give, take]) < gap:
            break
        share[first[give]], share[second[take]] = least, most
        loads[most] -= amount
        loads[least] += amount
    return share


_ATTEMPTS = 3
"""With one part more each. First fit then needs fewer parts than another would."""
_GOOD = 1.005
"""Largest load over the mean that is worth no more search."""


def _split(share: np.ndarray, records: _Records) -> np.ndarray:
    """Each share as balanced parts within the capacity: as few as its sums allow, or, where balance misses, a few more.

    Where that fails too, first fit of the largest first, which always fits.
    """
    part = np.zeros(len(share), np.int64)
    exceeding = _exceeding(share, part, records)
    for attempt in range(_ATTEMPTS if len(exceeding) else 0):
        chosen = _among(exceeding, records.num_ranks)[share]
        if attempt == 0:
            sums = _sums(share[chosen], records.sizes[chosen], records.num_ranks)
            counts = np.ceil((sums / records.capacity).max(axis=1))
        else:
            counts = np.zeros(records.num_ranks)
            np.maximum.at(counts, share, part + 2.0)  # one more than there are
        free = np.where(np.arange(counts[exceeding].max()) < counts[:, None], 0.0, np.inf)
        part[chosen] = _divided(share[chosen], records.cost[chosen], free)
        exceeding = _exceeding(share, part, records)
        if not len(exceeding):
            break
    for number in exceeding:
        chosen = np.flatnonzero(share == number)
        part[chosen] = _first_fit(records.sizes[chosen], records.capacity)
    return part


def _aligned(share: np.ndarray, part: np.ndarray, records: _Records) -> np.ndarray:
    """As many parts of every share, the first of all shares of like cost, and so on; some empty for want of records.

    A share that is one large record has its first part from that; the others then take as much into theirs.
    """
    count = _most(part)
    if count <= 1:
        return part
    best, shortest = part, np.inf
    mean = records.cost.sum() / records.num_ranks
    wanted = np.zeros(count)
    for known in range(1, count + 1):
        tried = _divided(share, records.cost, np.tile(-wanted, (records.num_ranks, 1)))
        tried = np.where(_among(_exceeding(share, tried, records), records.num_ranks)[share], part, tried)
        loads = np.bincount(share * count + tried, weights=records.cost, minlength=records.num_ranks * count)
        longest = loads.reshape(-1, count).max(axis=0)
        if longest.sum() < shortest:
            best, shortest = tried, longest.sum()
        if shortest <= _GOOD * mean or known == count:
            break
        rest = max(0.0, mean - longest[:known].sum()) / (count - known)
        wanted = np.concatenate([longest[:known], np.full(count - known, rest)])
    return best


def _divided(share: np.ndarray, cost: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Largest first, each to the lightest part of its share; (n,) its number among those parts that get a record.

    Args:
        share, cost: (n,) of records, costliest first.
        loads: (shares, parts) to begin with; infinite for a part that there is not.
    """
    by_share = np.argsort(share, kind="stable")
    present, counts = np.unique(share, return_counts=True)
    loads = loads[present]
    flat, first = loads.reshape(-1), np.arange(len(present)) * loads.shape[1]
    # All shares at once, record after record of each.
    column = np.arange(len(share)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.repeat(np.arange(len(present)), counts)
    table = np.zeros((counts.max(initial=0), len(present)))
    table[column, row] = cost[by_share]
    chosen = np.empty(table.shape, np.int64)
    for step, values in enumerate(table):
        chosen[step] = loads.argmin(axis=1)
        flat[first + chosen[step]] += values
    picked = chosen[column, row]
    used = np.zeros(loads.shape, np.int64)
    used[row, picked] = 1
    part = np.empty(len(share), np.int64)
    part[by_share] = (np.cumsum(used, axis=1) - 1)[row, picked]
    return part


def _exceeding(share: np.ndarray, part: np.ndarray, records: _Records) -> np.ndarray:
    """Those shares of which a part exceeds the capacity."""
    limited = np.isfinite(records.capacity)
    if not limited.any():
        return np.empty(0, np.int64)
    most = _most(part)
    sums = _sums(share * most + part, records.sizes[:, limited], records.num_ranks * most)
    return np.unique(np.flatnonzero((sums > records.capacity[limited]).any(axis=1)) // max(most, 1))


def _among(numbers: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool, whether a number is one of `numbers`."""
    found = np.zeros(count, dtype=bool)
    found[numbers] = True
    return found


def _sums(index: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """(count, columns) sums of the rows of each index."""
    return np.column_stack([np.bincount(index, weights=column, minlength=count) for column in sizes.T])


def _first_fit(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Each record into the first part that has room for it; (n,) the part of each."""
    part = np.empty(len(sizes), np.int64)
    room = np.empty((len(sizes), len(capacity)))
    count = 0
    for i, size in enumerate(sizes):
        fits = (room[:count] >= size).all(axis=1)
        part[i] = int(fits.argmax()) if fits.any() else count
        if part[i] == count:
            room[count] = capacity
            count += 1
        room[part[i]] -= size
    return part
