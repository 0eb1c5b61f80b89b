"""From a global batch to the micro-batches of each rank. Pure: the same on every rank, no communication."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Largest sums of record sizes in one micro-batch (or one global batch).

    Attributes:
        limits: one per column of `sizes`; None for no limit. Empty: no limit at all.
        names: what the columns count, for messages.
    """

    limits: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.limits) != len(self.names):
            raise ValueError(f"a budget needs one name per limit, got limits {self.limits} and names {self.names}")
        for name, limit in zip(self.names, self.limits, strict=True):
            if limit is not None and limit < 1:
                raise ValueError(f"budget of {limit} {name}: at least 1 is needed; leave it out for no limit")

    def capacity(self, columns: int) -> np.ndarray:
        """Limits as (columns,) float64, inf where there is none."""
        limits = self.limits or (None,) * columns
        return np.array([np.inf if limit is None else limit for limit in limits])


def check_fits(sizes: np.ndarray, budget: Budget, identifier: Callable[[int], str]) -> None:
    """Refuse records that exceed the budget on their own; nothing is ever dropped.

    Args:
        sizes: (n, columns).
        identifier: name of record i, for the message.
    Raises:
        ValueError: names the records (the first ten) with their sizes and says which limits would do.
    """
    too_large = np.nonzero((sizes > budget.capacity(sizes.shape[1])).any(axis=1))[0]
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


def plan_micro_batches(
    sizes: np.ndarray, *, num_ranks: int, budget: Budget, cost: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Split a global batch over ranks, balanced by cost, and each share into micro-batches within the budget.

    Args:
        sizes: (n, columns) sizes of the records of the global batch.
        budget: per micro-batch; every record fits on its own (`check_fits`).
        cost: (n,) work of each record; by default the sum of its sizes.
    Returns:
        Per rank a list of micro-batches, each an array of positions 0..n-1 in rising order. Every position occurs
        exactly once; a rank without records has an empty list.
    """
    cost = sizes.sum(axis=1) if cost is None else cost
    plan = []
    for share in _balance(cost, num_ranks):
        plan.append([np.sort(share[bin_]) for bin_ in _pack(sizes[share], budget)])
    return plan


def _balance(cost: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Largest first, each to the least loaded rank (at most 4/3 of the best possible largest load; Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for i in np.argsort(-cost, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(i))
        heapq.heappush(loads, (load + float(cost[i]), rank))
    return [np.array(share, dtype=np.int64) for share in shares]


def _pack(sizes: np.ndarray, budget: Budget) -> Sequence[Sequence[int]]:
    """First fit in the given (falling) order: the bins as lists of positions."""
    bins: list[list[int]] = []
    if not len(sizes):
        return []
    if all(limit is None for limit in budget.limits):
        return [range(len(sizes))]
    capacity = budget.capacity(sizes.shape[1])
    room = np.empty((len(sizes), len(capacity)))
    for i, size in enumerate(sizes):
        fits = (room[: len(bins)] >= size).all(axis=1)
        chosen = int(fits.argmax()) if fits.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
            room[chosen] = capacity
        bins[chosen].append(i)
        room[chosen] -= size
    return bins
