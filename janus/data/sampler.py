"""Which records make the global batch of a step: a function of seed and step alone, never of the number of ranks."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from janus.data.packing import Budget


class Sampler(Protocol):
    """Anything that gives the records of each step."""

    def indices(self, step: int) -> np.ndarray:
        """Records of the global batch of `step`, (n,) int64."""
        ...


class GlobalBatchSampler:
    """Shuffled epochs, each record exactly once per epoch, cut into global batches.

    With `groups` an epoch has as many records, but so many of each group as its share says, drawn without replacement
    from the group's own shuffled passes, which go on from epoch to epoch.

    With `global_batch_size` N an epoch has ceil(num_records / N) batches whose sizes differ by at most one and never
    exceed N: no tiny last batch, nothing dropped. With `global_budget` a batch takes records as long as its sums stay
    within the limits.

    Args:
        num_records: how many there are.
        sizes: (num_records, columns), needed for a budget.
        global_batch_size: records per global batch; give this or `global_budget`.
        global_budget: limits of the sums over a global batch.
        groups: (num_records,) int64 group of each record, 0, 1, ...; none of them empty.
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
        groups: np.ndarray | None = None,
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
        self._epoch = -1  # the epoch whose order is held below
        self._order = np.empty(0, np.int64)
        self._cuts = np.empty(0, np.int64)
        self._first_steps = [0]  # first step of each epoch counted so far; grows only with a budget
        self._sizes, self._capacity = sizes, None
        self._members: list[np.ndarray] = []
        if groups is not None:
            assert shares is not None
            self._members = [np.flatnonzero(groups == group) for group in range(len(shares))]
            self._counts = apportion(num_records, shares)
        if global_budget is not None:
            if sizes is None:
                raise ValueError("a global budget needs the sizes of the records")
            self._capacity = global_budget.capacity(sizes.shape[1])
            if (sizes > self._capacity).any():
                worst = sizes.max(axis=0).tolist()
                raise ValueError(
                    f"global budget {global_budget.limits} {global_budget.names} is less than the largest record "
                    f"{worst}: raise it"
                )

    def indices(self, step: int) -> np.ndarray:
        """Records of the global batch of `step`, (n,) int64.

        None is in it twice; with groups it can be, where an epoch begins a new pass over its group.
        """
        epoch = self.epoch(step)
        self._load(epoch)
        position = step - self.first_step(epoch)
        return self._order[self._cuts[position] : self._cuts[position + 1]]

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

        With a budget the first call costs a shuffle of every earlier epoch.
        """
        if self.global_batch_size is not None:
            return epoch * self._steps_per_epoch
        while len(self._first_steps) <= epoch:
            self._load(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(self._cuts) - 1)
        return self._first_steps[epoch]

    @property
    def _steps_per_epoch(self) -> int:
        assert self.global_batch_size is not None
        return -(-self.num_records // self.global_batch_size)

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_records)
        self._order = self._drawn(epoch)[order] if self._members else order
        if self._capacity is None:
            steps = self._steps_per_epoch
            self._cuts = np.arange(steps + 1) * self.num_records // steps
        else:
            assert self._sizes is not None
            self._cuts = _cut(self._sizes[self._order], self._capacity)
        self._epoch = epoch

    def _drawn(self, epoch: int) -> np.ndarray:
        """(num_records,) the records of an epoch, group after group."""
        drawn = []
        for group, (members, count) in enumerate(zip(self._members, self._counts.tolist(), strict=True)):
            start, size = epoch * count, len(members)
            passes = [
                members[np.random.default_rng([self.seed, group, number, 1]).permutation(size)]
                for number in range(start // size, (start + count - 1) // size + 1)
            ]
            drawn.append(np.concatenate(passes)[start % size : start % size + count])
        return np.concatenate(drawn)


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


def _cut(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Boundaries 0..n of the longest runs of consecutive records whose sums stay within `capacity`."""
    totals = np.vstack([np.zeros((1, sizes.shape[1]), np.int64), np.cumsum(sizes, axis=0, dtype=np.int64)])
    cuts = [0]
    while cuts[-1] < len(sizes):
        reach = totals[cuts[-1]] + capacity
        cuts.append(min(int(np.searchsorted(totals[:, c], reach[c], side="right")) - 1 for c in range(len(capacity))))
    return np.array(cuts)
