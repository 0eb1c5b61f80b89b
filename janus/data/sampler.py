"""Which records make the global batch of a step: a function of seed and step alone, never of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from janus.data.packing import Budget
from janus.data.shared_rows import blocks
from janus.data.shuffle import shuffled


class Sampler(Protocol):
    """Anything that gives the records of each step."""

    def indices(self, step: int) -> np.ndarray:
        """Records of the global batch of `step`, (n,) int64."""
        ...


class GlobalBatchSampler:
    """Shuffled epochs, each record exactly once per epoch, cut into global batches. Holds nothing of each record.

    With groups an epoch has as many records, but so many of each group as its share says, drawn without replacement
    from the group's own shuffled passes, which go on from epoch to epoch.

    With `global_batch_size` N an epoch has ceil(num_records / N) batches whose sizes differ by at most one and never
    exceed N: no tiny last batch, nothing dropped. With `global_budget` a batch takes records as long as its sums stay
    within the limits.

    Args:
        num_records: how many there are.
        sizes: (num_records, columns), needed for a budget.
        global_batch_size: records per global batch; give this or `global_budget`.
        global_budget: limits of the sums over a global batch.
        groups: records of each group, which lie one group after the other; at least one each.
        shares: of each group, relative to each other; needed with `groups`.
        seed: of the shuffling.
    Raises:
        ValueError: no records, both or neither of size and budget, a record larger than the budget.
    """

    def __init__(
        self,
        num_records: int,
        *,
        sizes: np.ndarray | None = None,
        global_batch_size: int | None = None,
        global_budget: Budget | None = None,
        groups: Sequence[int] | None = None,
        shares: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        if num_records < 1:
            raise ValueError("no records to sample from: the data set is empty")
        if (global_batch_size is None) == (global_budget is None):
            raise ValueError(
                f"global_batch_size={global_batch_size}, global_budget={global_budget}: exactly one is needed"
            )
        if global_batch_size is not None and global_batch_size < 1:
            raise ValueError(f"global_batch_size is {global_batch_size}: at least 1 is needed")
        self.num_records = num_records
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1  # the epoch whose cuts are held below
        self._cuts = np.empty(0, np.int64)
        self._first_steps = [0]  # first step of each epoch counted so far; grows only with a budget
        self._sizes, self._capacity = sizes, None
        self._groups: list[_Group] = []
        if groups is not None:
            assert shares is not None
            drawn = apportion(num_records, shares).tolist()
            starts = accumulate(groups, initial=0)
            self._groups = [
                _Group(start, size, count) for start, size, count in zip(starts, groups, drawn, strict=False)
            ]
        if global_budget is not None:
            if sizes is None:
                raise ValueError("a global budget needs the sizes of the records")
            self._capacity = global_budget.capacity(sizes.shape[1])
            worst = sizes.max(axis=0)
            if (worst > self._capacity).any():
                raise ValueError(
                    f"global budget {global_budget.limits} {global_budget.names} is less than the largest record "
                    f"{worst.tolist()}: raise it"
                )

    def indices(self, step: int) -> np.ndarray:
        """Records of the global batch of `step`, (n,) int64.

        None is in it twice; with groups it can be, where an epoch begins a new pass over its group.
        """
        epoch = self.epoch(step)
        position = step - self.first_step(epoch)
        if self.global_batch_size is not None:
            steps = self._steps_per_epoch
            start, stop = (edge * self.num_records // steps for edge in (position, position + 1))
        else:
            start, stop = self._cuts_of(epoch)[position : position + 2].tolist()
        return self._records(epoch, start, stop)

    def epoch(self, step: int) -> int:
        """Epoch that `step` belongs to."""
        if self.global_batch_size is not None:
            return step // self._steps_per_epoch
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def first_step(self, epoch: int) -> int:
        """First step of an epoch, which is also the number of steps of all epochs before it.

        With a budget the first call costs a pass over the sizes for every earlier epoch.
        """
        if self.global_batch_size is not None:
            return epoch * self._steps_per_epoch
        while len(self._first_steps) <= epoch:
            cuts = self._cuts_of(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(cuts) - 1)
        return self._first_steps[epoch]

    @property
    def _steps_per_epoch(self) -> int:
        assert self.global_batch_size is not None
        return -(-self.num_records // self.global_batch_size)

    def _records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Records at places start..stop-1 of the order of an epoch."""
        order = shuffled(np.arange(start, stop), self.num_records, (self.seed, epoch))
        if not self._groups:
            return order
        # Of the records that an epoch draws, group after group, these.
        records = np.empty_like(order)
        first = 0
        for number, group in enumerate(self._groups):
            of_group = (first <= order) & (order < first + group.drawn)
            place = epoch * group.drawn + order[of_group] - first  # in all passes over the group
            found = np.empty_like(place)
            for turn in np.unique(place // group.size).tolist():
                own = place // group.size == turn
                found[own] = shuffled(place[own] % group.size, group.size, (self.seed, number, turn, 1))
            records[of_group] = group.start + found
            first += group.drawn
        return records

    def _cuts_of(self, epoch: int) -> np.ndarray:
        """With a budget: places in the order of an epoch at which its batches begin, and its end."""
        assert self._sizes is not None
        assert self._capacity is not None
        if epoch != self._epoch:
            ordered = (self._sizes[self._records(epoch, part.start, part.stop)] for part in blocks(self.num_records))
            self._epoch, self._cuts = epoch, _cut(ordered, self._capacity)
        return self._cuts


@dataclass(frozen=True)
class _Group:
    """Its records start..start+size-1, and how many an epoch draws of them."""

    start: int
    size: int
    drawn: int


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """(n,) int64 parts of `total` as near to the shares as whole numbers are, at least one each, if it reaches.

    Raises:
        ValueError: fewer than one for each.
    """
    if total < len(shares):
        raise ValueError(f"{total} records do not give each of {len(shares)} groups one")
    exact = total * shares / shares.sum()
    # A part that is a whole number up to rounding is that number.
    parts = np.maximum(np.floor(exact + 1e-9), 1.0).astype(np.int64)
    while parts.sum() < total:
        parts[np.argmax(exact - parts)] += 1
    while parts.sum() > total:
        parts[np.argmax(np.where(parts > 1, parts - exact, -np.inf))] -= 1
    return parts


class SequentialSampler:
    """Every record once, in order, for evaluation. The last batch may be short; nothing is padded or repeated."""

    def __init__(self, num_records: int, *, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size is {global_batch_size}: at least 1 is needed")
        self.num_records = num_records
        self.global_batch_size = global_batch_size

    @property
    def num_steps(self) -> int:
        return -(-self.num_records // self.global_batch_size)

    def indices(self, step: int) -> np.ndarray:
        start = step * self.global_batch_size
        return np.arange(start, min(start + self.global_batch_size, self.num_records))


def _cut(ordered: Iterable[np.ndarray], capacity: np.ndarray) -> np.ndarray:
    """Boundaries 0..n of the longest runs of consecutive records whose sums stay within `capacity`.

    Args:
        ordered: sizes of the records, (_, columns) at a time.
    """
    cuts, rest = [0], np.empty((0, len(capacity)), np.int64)
    for sizes in ordered:
        rest = np.concatenate([rest, sizes])
        totals = np.vstack([np.zeros((1, rest.shape[1]), np.int64), np.cumsum(rest, axis=0, dtype=np.int64)])
        start = end = 0
        while end < len(rest):
            reach = totals[start] + capacity
            ends = (np.searchsorted(totals[:, column], limit, side="right") for column, limit in enumerate(reach))
            end = min(map(int, ends)) - 1
            if end < len(rest):  # or else more may fit, of those that follow
                cuts.append(cuts[-1] + end - start)
                start = end
        rest = rest[start:]
    return np.array([*cuts, cuts[-1] + len(rest)])
