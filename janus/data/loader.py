"""The micro-batches of one rank, step after step, read ahead by worker processes. Starts at any step."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from janus.data.packing import Budget, check_fits, plan_micro_batches
from janus.data.sampler import Sampler

Batch = TypeVar("Batch")


class SizedRecords(Protocol):
    """A random-access data set whose records' sizes are known without reading them. Picklable.

    One with a method `__getitems__(indices)`, a list of records, is asked for a micro-batch at a time.
    """

    @property
    def sizes(self) -> np.ndarray:
        """(n, columns) int64."""
        ...

    def __getitem__(self, index: int) -> Any: ...

    def identifier(self, index: int) -> str:
        """Name of a record, for messages."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepBatch(Generic[Batch]):
    """What one rank works on in one step.

    Attributes:
        step: number of the step.
        indices: records of the global batch over all ranks, (n,).
        micro_batches: this rank's share, collated; empty if the rank got no record (but see `same_count`).
    """

    step: int
    indices: np.ndarray
    micro_batches: list[Batch]


class StepLoader(Generic[Batch]):
    """Iterates over `StepBatch`es of steps start_step .. start_step + num_steps - 1.

    Args:
        dataset: records with their sizes.
        sampler: global batch of each step.
        collate: a list of records to a micro-batch; picklable.
        rank, world_size: this process among those that share the global batch.
        budget: limits of one micro-batch.
        cost: from sizes (n, columns) to the cost of each record (n,), which is balanced over the ranks; by default the
            sum of its sizes.
        same_count: give every rank as many micro-batches as the one with the most has, the missing ones without
            records; for models whose ranks have to run together. `collate` must take an empty list then.
        num_workers: processes that read and collate ahead; 0 works in this process.
        start_step, num_steps: which steps.
        pin_memory: copy micro-batches to page-locked memory (they need a `pin_memory` method).
        prefetch_factor: micro-batches that each worker holds ready.
    Raises:
        ValueError: records that exceed the budget on their own, named.
    """

    def __init__(
        self,
        dataset: SizedRecords,
        sampler: Sampler,
        collate: Callable[[list[Any]], Batch],
        *,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        budget: Budget | None = None,
        cost: Callable[[np.ndarray], np.ndarray] | None = None,
        same_count: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: must be between 0 and {world_size - 1}")
        self.budget = budget or Budget()
        check_fits(dataset.sizes, self.budget, dataset.identifier)
        self.cost = cost or _sum_of_sizes
        self.dataset, self.sampler, self.collate = dataset, sampler, collate
        self.start_step, self.num_steps = start_step, num_steps
        self.rank, self.world_size, self.same_count = rank, world_size, same_count
        self.num_workers, self.pin_memory, self.prefetch_factor = num_workers, pin_memory, prefetch_factor

    def __len__(self) -> int:
        return self.num_steps

    def plan(self, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Records of the global batch, and those of each of this rank's micro-batches."""
        indices = self.sampler.indices(step)
        sizes = self.dataset.sizes[indices]
        plan = plan_micro_batches(
            sizes,
            num_ranks=self.world_size,
            budget=self.budget,
            cost=self.cost(sizes),
            same_count=self.same_count,
        )
        return indices, [indices[positions] for positions in plan[self.rank]]

    def __iter__(self) -> Iterator[StepBatch[Batch]]:
        planned: deque[tuple[int, np.ndarray, int]] = deque()  # step, global batch, number of micro-batches

        def requests() -> Iterator[np.ndarray | None]:
            for step in range(self.start_step, self.start_step + self.num_steps):
                indices, micro_batches = self.plan(step)
                planned.append((step, indices, len(micro_batches)))
                yield from micro_batches
                if not micro_batches:  # keeps the step in its place in the stream
                    yield None

        ready: list[Batch] = []
        for batch in DataLoader(
            _Requests(self.dataset, self.collate),
            sampler=_Once(requests()),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            worker_init_fn=_outlive_stop_signals,
        ):
            if batch is not None:
                ready.append(batch)
            step, indices, expected = planned[0]
            if len(ready) == expected:
                planned.popleft()
                yield StepBatch(step=step, indices=indices, micro_batches=ready)
                ready = []


def _sum_of_sizes(sizes: np.ndarray) -> np.ndarray:
    return sizes.sum(axis=1)


class _Requests(Dataset):
    """Maps record indices to a collated micro-batch, and None to None."""

    def __init__(self, dataset: SizedRecords, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: np.ndarray | None) -> Any:
        return None if indices is None else self.collate(_read(self.dataset, indices.tolist()))


def _read(dataset: SizedRecords, indices: list[int]) -> list[Any]:
    """All at once where the data set can, by the method of which torch's own fetcher asks as well."""
    together = getattr(dataset, "__getitems__", None)
    return [dataset[index] for index in indices] if together is None else together(indices)


class _Once:
    """The sampler that DataLoader expects, around a running iterator."""

    def __init__(self, requests: Iterator[np.ndarray | None]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[np.ndarray | None]:
        return self.requests


def _outlive_stop_signals(_: int) -> None:
    """Schedulers signal every process of a job; the training process decides when its workers end.

    It does so with SIGTERM as well (as Python does at its exit, and then waits), so the sender matters.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also of the threads that start later
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _unchanged(batch: Sequence[Any]) -> Any:
    return batch
