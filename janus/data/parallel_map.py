"""A function over many items in processes, in order, with a bounded number of items under way."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, in_flight_per_worker: int = 2
) -> Iterator[Result]:
    """Results of `function` over `items`, in their order.

    `items` are drawn only as fast as results are taken, so a stream of any length needs little memory.

    Args:
        function: a module's function (or a partial of one), since workers are new processes.
        num_workers: processes; 0 or 1 works in this one.
        in_flight_per_worker: items drawn ahead, per worker.
    Raises:
        Whatever `function` raises, at that item's place.
    """
    items = iter(items)
    first = list(islice(items, 2))
    items = chain(first, items)
    if num_workers <= 1 or len(first) < 2:  # starting processes takes a second or two
        yield from map(function, items)
        return
    # Not forked: locks, threads and open files of this process stay its own.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= in_flight_per_worker * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Workers of a pool do not notice that their parent was killed, and would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
