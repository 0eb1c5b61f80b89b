"""Which nodes an edge joins, for the atom graph and for the line graph alike, and which rows other ranks hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from janus.graph_parallel.halo import HaloPlan, PendingHalo, max_halo, reduce_halo, start_gather_halo, start_reduce_halo
from janus.mesh import Axis
from janus.ops.segment import gather_rows, segment_max, segment_sum


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of features, each owned by one rank of the graph axis and perhaps borrowed by others.

    Attributes:
        owned: rows of this rank.
        local: owned and borrowed rows, in this order.
        halo: which rows are borrowed, and from whom; None for none.
        axis: the graph axis.
    """

    owned: int
    local: int
    halo: HaloPlan | None
    axis: Axis

    @staticmethod
    def of(num_owned: int, halo: HaloPlan | None, axis: Axis) -> Rows:
        """`num_owned` rows, with those that the halo borrows."""
        return Rows(owned=num_owned, local=num_owned if halo is None else halo.num_local, halo=halo, axis=axis)

    def start_borrow(self, features: Tensor) -> PendingHalo:
        """Begins to exchange owned rows; `wait()` gives (local, width)."""
        return start_gather_halo(features, self.halo, self.axis)

    def start_return(self, partial: Tensor) -> PendingHalo:
        """Begins to send partial sums (local, ...) to their owners; `wait()` gives the sums (owned, ...)."""
        return start_reduce_halo(partial, self.halo, self.axis)

    def give_back(self, partial: Tensor) -> Tensor:
        """Partial sums (local, width) to sums (owned, width)."""
        return reduce_halo(partial, self.halo, self.axis)

    def sum(self, rows: Tensor, index: Tensor) -> Tensor:
        """Sums over edges (E, width) by local row (E,), still partial: (local, width)."""
        return segment_sum(rows, index, self.local)

    def max(self, rows: Tensor, index: Tensor) -> Tensor:
        """Largest over the edges of all ranks, detached: (local, width)."""
        return max_halo(segment_max(rows, index, self.local), self.halo, self.axis)


@dataclass(frozen=True, kw_only=True)
class EdgeSet:
    """Directed edges between nodes.

    In the atom graph nodes are atoms, and two directed edges share the features of one undirected edge. In the line
    graph nodes are undirected edges of the atom graph, and each angle has features of its own.

    Attributes:
        targets, sources: the nodes' rows. An atom graph's edges lie with the owner of their target, so only sources
            are borrowed there; in the line graph both are the same rows.
        features: rows of the edge features.
        target, source: (E,) local nodes.
        undirected: (E,) local row of the edge features that a directed edge uses, or None if each has its own.
        envelope: (E, 1), one in the middle of an edge's range and zero at its cutoff.
    """

    targets: Rows
    sources: Rows
    features: Rows
    target: Tensor
    source: Tensor
    undirected: Tensor | None
    envelope: Tensor

    def spread(self, features: Tensor) -> Tensor:
        """From local rows of edge features to directed edges, (E, width)."""
        return features if self.undirected is None else gather_rows(features, self.undirected)

    def average(self, rows: Tensor) -> Tensor:
        """From directed edges (E, width) to owned rows of edge features: mean of both directions."""
        if self.undirected is None:
            return rows
        return self.features.give_back(0.5 * self.features.sum(rows, self.undirected))
