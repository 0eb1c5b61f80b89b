"""The best layouts of a job among all that are possible."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from matris.layouts import Layout
from matris.plan import Planner
from matris.plan_job import Job, NoPlanError, Prediction

SLOWER = "slower than the best before weights are sent"
"""Why a layout was not looked at further."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of a search.

    Attributes:
        best: most structures per second first.
        possible: how many layouts were predicted.
        dropped: how many were not, by reason.
    """

    best: tuple[Prediction, ...]
    possible: int
    dropped: dict[str, int]


def search(job: Job, *, keep: int) -> Found:
    """Predicts every layout of `candidates` and keeps the best by the mean of the pessimistic and the optimistic time.

    Raises:
        NoPlanError: no layout is possible.
    """
    planner, dropped = Planner(job), Counter[str]()
    found: list[tuple[float, str, Prediction]] = []
    closest, possible = NoPlanError("", ""), 0
    for layout in candidates(job):
        try:
            if len(found) == keep and planner.least_seconds(layout) >= found[-1][0]:
                dropped[SLOWER] += 1
                continue
            prediction = planner.predict(layout)
        except NoPlanError as error:
            dropped[error.kind] += 1
            if error.needed < closest.needed or math.isinf(closest.needed):
                closest = error
            continue
        possible += 1
        found.append((prediction.pessimistic.step + prediction.optimistic.step, layout.name, prediction))
        found = sorted(found, key=lambda entry: entry[:2])[:keep]
    if not found:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        raise NoPlanError("nothing", f"none of {dropped.total()} layouts is possible ({reasons}): {closest}")
    return Found(best=tuple(entry[2] for entry in found), possible=possible, dropped=dict(dropped.most_common()))


def candidates(job: Job) -> Iterator[Layout]:
    """Layouts whose axes divide the ranks; of experts, no more ranks than there are experts."""
    sizes = divisors(job.ranks)
    experts = [size for size in sizes if size <= max(1, job.hyper.num_moe_experts)]
    for tensor in sizes:
        for graph in divisors(job.ranks // tensor):
            for shard in divisors(job.ranks // tensor // graph):
                for expert in experts:
                    for policy, placement in _ways(shard, expert):
                        yield Layout(
                            shard=shard, graph=graph, tensor=tensor, expert=expert, policy=policy, placement=placement
                        )


def divisors(number: int) -> list[int]:
    """In ascending order."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _ways(shard: int, expert: int) -> Iterator[tuple[Literal["regather", "keep"], Literal["sharded", "fixed"]]]:
    """Policies that have an effect: others would be refused by `ParallelConfig.refuse_idle`."""
    # Pieces of experts are gathered by the same policy.
    for placement in ("sharded", "fixed") if expert > 1 else ("sharded",):
        yield "regather", placement
        if shard > 1:
            yield "keep", placement
