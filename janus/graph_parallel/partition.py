"""Who owns which row of a graph, and what the owners must lend each other. Pure numpy: alike on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from janus.graph_parallel.halo import HaloPlan

_BITS = 16
"""Of each coordinate along the space-filling curve."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """What a partitioner may look at; N nodes.

    Attributes:
        positions: (N, 3).
        group: (N,) int64; nodes of different groups have no edges between them.
        cost: (N,) positive work of each node's owner.
    """

    positions: np.ndarray
    group: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Which rows each part reads, with repetitions.

    Attributes:
        owner: (R,) part that owns each row.
        reader: (K,) part; row: (K,) row that it reads.
        num_parts: number of parts.
    """

    owner: np.ndarray
    reader: np.ndarray
    row: np.ndarray
    num_parts: int

    def borrowed(self) -> tuple[np.ndarray, np.ndarray]:
        """Reader and row of each loan, once per reader, ordered by reader and then by row."""
        foreign = self.owner[self.row] != self.reader
        key = np.unique(self.reader[foreign] * len(self.owner) + self.row[foreign])
        return np.divmod(key, max(1, len(self.owner)))

    def cut(self) -> np.ndarray:
        """(num_parts, num_parts) int64: rows that the part of the first index lends to that of the second."""
        reader, row = self.borrowed()
        sizes = np.zeros((self.num_parts, self.num_parts), dtype=np.int64)
        np.add.at(sizes, (self.owner[row], reader), 1)
        return sizes

    def plan(self, part: int) -> tuple[HaloPlan, np.ndarray]:
        """Exchange plan of a part, and its local rows: the owned ones in order, then the borrowed ones by owner."""
        reader, row = self.borrowed()
        lender = self.owner[row]
        owned = np.flatnonzero(self.owner == part)
        lent = row[lender == part]  # grouped by reader already
        coming = row[reader == part]
        coming = coming[np.argsort(self.owner[coming], kind="stable")]

        def counts(parts: np.ndarray) -> tuple[int, ...]:
            return tuple(np.bincount(parts, minlength=self.num_parts).tolist())

        plan = HaloPlan(
            send_index=torch.from_numpy(np.searchsorted(owned, lent)),
            send=counts(reader[lender == part]),
            receive=counts(self.owner[coming]),
            num_owned=len(owned),
        )
        return plan, np.concatenate([owned, coming])


def assign_owners(partitioner: str, nodes: Nodes, num_parts: int) -> np.ndarray:
    """(N,) int64 owner of each node, 0..num_parts-1; parts may stay empty.

    Args:
        partitioner: `index`, runs of equally many nodes in their order; `morton`, runs of equal cost along a
            space-filling curve, which cuts few edges; `balanced`, the costliest first, each to the part with the least
            cost, which is the most even and cuts the most edges.
    Raises:
        ValueError: unknown partitioner.
    """
    if partitioner not in PARTITIONERS:
        raise ValueError(f"graph partitioner is {partitioner!r}: allowed are {', '.join(PARTITIONERS)}")
    return PARTITIONERS[partitioner](nodes, num_parts)


def morton_order(nodes: Nodes) -> np.ndarray:
    """(N,) nodes group by group, each along a Z-curve through its bounding cube."""
    count = len(nodes.group)
    if not count:
        return np.empty(0, dtype=np.int64)
    num_groups = int(nodes.group.max()) + 1
    low = np.full((num_groups, 3), np.inf)
    high = np.full((num_groups, 3), -np.inf)
    np.minimum.at(low, nodes.group, nodes.positions)
    np.maximum.at(high, nodes.group, nodes.positions)
    extent = (high - low).max(axis=1)
    scale = (2**_BITS - 1) / np.where(extent > 0.0, extent, 1.0)
    cell = ((nodes.positions - low[nodes.group]) * scale[nodes.group, None]).astype(np.int64)
    code = np.zeros(count, dtype=np.int64)
    for bit in range(_BITS):
        for axis in range(3):
            code |= ((cell[:, axis] >> bit) & 1) << (3 * bit + axis)
    return np.lexsort((code, nodes.group))


def _by_index(nodes: Nodes, num_parts: int) -> np.ndarray:
    count = len(nodes.cost)
    return np.arange(count) * num_parts // max(1, count)


def _by_morton(nodes: Nodes, num_parts: int) -> np.ndarray:
    order = morton_order(nodes)
    cost = nodes.cost[order].astype(np.float64)
    middle = np.cumsum(cost) - 0.5 * cost  # a node belongs where the middle of its cost lies
    owner = np.empty(len(order), dtype=np.int64)
    owner[order] = np.minimum(middle * num_parts / cost.sum(), num_parts - 1).astype(np.int64)
    return owner


def _by_cost(nodes: Nodes, num_parts: int) -> np.ndarray:
    loads = [(0.0, part) for part in range(num_parts)]
    owner = np.empty(len(nodes.cost), dtype=np.int64)
    for node in np.argsort(-nodes.cost, kind="stable").tolist():
        load, part = loads[0]
        owner[node] = part
        heapq.heapreplace(loads, (load + float(nodes.cost[node]), part))
    return owner


PARTITIONERS: dict[str, Callable[[Nodes, int], np.ndarray]] = {
    "morton": _by_morton,
    "index": _by_index,
    "balanced": _by_cost,
}
