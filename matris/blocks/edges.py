"""Which nodes an edge joins, for the atom graph and for the line graph alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from janus.ops.segment import segment_sum


@dataclass(frozen=True, kw_only=True)
class EdgeSet:
    """Directed edges between nodes.

    In the atom graph nodes are atoms, and two directed edges share the features of one undirected edge. In the line
    graph nodes are undirected edges of the atom graph, and each angle has features of its own.

    Attributes:
        target, source: (E,) nodes.
        undirected: (E,) row of the edge features that a directed edge uses, or None if each has its own.
        num_features: rows of the edge features.
        envelope: (E, 1), one in the middle of an edge's range and zero at its cutoff.
    """

    target: Tensor
    source: Tensor
    undirected: Tensor | None
    num_features: int
    envelope: Tensor

    def spread(self, features: Tensor) -> Tensor:
        """From rows of edge features to directed edges, (E, width)."""
        return features if self.undirected is None else features.index_select(0, self.undirected)

    def average(self, rows: Tensor) -> Tensor:
        """From directed edges (E, width) to rows of edge features: mean of both directions."""
        return rows if self.undirected is None else 0.5 * segment_sum(rows, self.undirected, self.num_features)
