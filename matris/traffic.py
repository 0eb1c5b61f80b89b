"""Collectives of the features of a micro-batch over the tensor and graph axes, by formula, to the byte.

An operation runs once in the forward pass. If it depends on the positions, its adjoint runs in the force pass, and the
derivative of that, the operation itself, in the second backward. If it depends on a weight, its adjoint runs in the
second backward once more. `tests/parallel/test_ledger_at_scale.py` finds the same calls and bytes in the ledger of
ranks of 1024 and 16384.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from janus.comm.traffic import SizedAxis, Traffic
from matris.config import ModelConfig, NormType, RadialBasis

_GEOMETRY = 8
"""Bytes of a number of positions, strain and energies."""


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Rows that a rank exchanges over the graph axis.

    Attributes:
        lent: rows of its own, once for each rank that borrows them.
        borrowed: rows of others.
    """

    lent: float
    borrowed: float


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """What one rank has of a micro-batch.

    Attributes:
        structures: of the whole micro-batch.
        atoms, edges, undirected, angles: rows that it owns.
        atom_halo, edge_halo: of atoms and of undirected edges; None without a graph axis.
    """

    structures: int
    atoms: float
    edges: float
    undirected: float
    angles: float
    atom_halo: Halo | None = None
    edge_halo: Halo | None = None

    @staticmethod
    def of(graph: Any) -> RankRows:
        """Those of a `matris.graph.batch.GraphBatch`."""
        halos = [
            None if plan is None else Halo(lent=sum(plan.send), borrowed=sum(plan.receive))
            for plan in (graph.atom_halo, graph.edge_halo)
        ]
        return RankRows(
            structures=graph.num_structures,
            atoms=graph.num_atoms,
            edges=graph.num_edges,
            undirected=graph.num_undirected if graph.edge_halo is None else graph.edge_halo.num_owned,
            angles=graph.num_angles,
            atom_halo=halos[0],
            edge_halo=halos[1],
        )


def feature_traffic(
    hyper: ModelConfig, rows: RankRows, *, graph: SizedAxis, tensor: SizedAxis, itemsize: int = 4
) -> Traffic:
    """Of the three passes of a micro-batch with energies, forces and stress; of smooth attention, and without the sums
    of compositions that several levels of theory need, a row per structure.

    Args:
        graph, tensor: axes.
        itemsize: bytes of a number of the features.

    Raises:
        ValueError: a model with released weights' attention, whose exchanges of maxima are not counted.
    """
    if not hyper.smooth_attention:
        raise ValueError("model.smooth_attention is false: what such a model sends is not predicted")
    count = _Count(hyper=hyper, rows=rows, graph=graph, tensor=tensor, itemsize=itemsize)
    count.geometry()
    last = hyper.num_layers - 1
    # In the first block the atoms' features are those of their elements; those between first and last are alike.
    for block, times in ((0, 1), (1, max(0, last - 1)), (last, int(last > 0))):
        if times:
            count.block(nodes_move=block > 0, is_last=block == last, times=times)
    # Sums of interaction and reference energies, whose gradient is a constant.
    count.traffic.all_reduce(graph, 2, rows.structures * _GEOMETRY)
    return count.traffic


@dataclass(kw_only=True)
class _Count:
    """Operation by operation, as the model calls them."""

    hyper: ModelConfig
    rows: RankRows
    graph: SizedAxis
    tensor: SizedAxis
    itemsize: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def row(self) -> int:
        """Bytes of the features of a row."""
        return self.itemsize * self.hyper.hidden_size

    @property
    def part(self) -> int:
        """Of those that a tensor rank has."""
        return self.row // self.tensor.size

    # Collectives and their adjoints -----------------------------------------------------------------------------------

    def copy(self, num_bytes: float, *, positions: bool = True, weights: bool = True) -> None:
        self.traffic.all_reduce(self.tensor, positions + weights, num_bytes)

    def reduce(self, num_bytes: float) -> None:
        self.traffic.all_reduce(self.tensor, 2, num_bytes)

    def gather(self, num_bytes: float) -> None:
        self.traffic.all_gather(self.tensor, 2, num_bytes)

    def all_gather(self, num_bytes: float) -> None:
        """Or the reduce-scatter that is its adjoint."""
        self.traffic.all_gather(self.tensor, 2, num_bytes)
        self.traffic.reduce_scatter(self.tensor, 2, num_bytes)

    def borrow(self, halo: Halo | None, row_bytes: float, *, positions: bool = True, weights: bool = True) -> None:
        if halo is not None:
            self.traffic.all_to_all(self.graph, 1 + positions, halo.lent * row_bytes)
            self.traffic.all_to_all(self.graph, positions + weights, halo.borrowed * row_bytes)

    def give_back(self, halo: Halo | None, row_bytes: float) -> None:
        self.borrow(halo, row_bytes)  # its adjoint; with positions and weights before it both run twice

    def gated(self, rows: float) -> None:
        """Two layers whose output is scattered, and two numbers per row for each mean of the norm."""
        for _half in ("core", "gate"):
            self.all_gather(rows * self.row)
        for _mean in range(2 if self.hyper.norm_type is NormType.layer else 1):
            self.reduce(2 * rows * self.itemsize)
            self.copy(2 * rows * self.itemsize)

    # Parts of the model -----------------------------------------------------------------------------------------------

    def geometry(self) -> None:
        """Positions and strain, which no weight comes before, and the bases."""
        rows, hyper = self.rows, self.hyper
        local = rows.undirected + (0 if rows.edge_halo is None else rows.edge_halo.borrowed)
        learns_basis = hyper.learnable_basis and hyper.radial_basis is RadialBasis.bessel
        self.borrow(rows.atom_halo, 3 * _GEOMETRY, weights=False)
        self.traffic.all_reduce(self.graph, 1, 9 * rows.structures * _GEOMETRY)
        self.copy(local * self.itemsize, weights=False)
        self.copy(rows.angles * self.itemsize, weights=False)
        for _basis in ("pair", "line"):
            self.copy(local * hyper.num_radial * self.itemsize, weights=learns_basis)

    def block(self, *, nodes_move: bool, is_last: bool, times: int) -> None:
        one = replace(self, traffic=Traffic())
        one.line_attention()
        if self.hyper.num_moe_experts and not self.hyper.separable_attention:
            one.expert_attention(nodes_move=nodes_move)
        else:
            one.atom_attention(nodes_move=nodes_move)
        one.line_refinement(is_last=is_last)
        one.atom_refinement(is_last=is_last)
        self.traffic.add(one.traffic, times)

    def line_attention(self) -> None:
        rows, row = self.rows, self.row
        self.copy(rows.undirected * row)
        self.borrow(rows.edge_halo, row)
        self.copy(rows.angles * row)
        self.gated(rows.angles)
        for _sum in range(4):  # numerator and denominator at both ends
            self.give_back(rows.edge_halo, self.part)
        self._means(rows.undirected)
        self.gated(rows.undirected)
        self.gather(rows.undirected * row)
        self.gather(rows.angles * row)

    def atom_attention(self, *, nodes_move: bool) -> None:
        self._tokens(nodes_move=nodes_move)
        for _sum in range(2):  # at the source: targets are owned
            self.give_back(self.rows.atom_halo, self.part)
        self._means(self.rows.atoms)
        self._update()

    def expert_attention(self, *, nodes_move: bool) -> None:
        rows, hyper = self.rows, self.hyper
        self._tokens(nodes_move=nodes_move)
        self.gather(rows.edges * self.row)
        self.copy(rows.edges * self.row)
        self.give_back(rows.atom_halo, self.part)
        self.give_back(rows.atom_halo, self.part // hyper.kv_channels)  # a number for each head
        for _end in ("target", "source"):
            self.reduce(rows.atoms * self.row)
            self.copy(rows.atoms * self.row)
        self._update()

    def line_refinement(self, *, is_last: bool) -> None:
        rows, row = self.rows, self.row
        for count in (rows.undirected, rows.angles, rows.atoms):
            self.copy(count * row)
        self.borrow(rows.edge_halo, row)
        self.gated(rows.angles)
        self.give_back(rows.edge_halo, self.part)
        self._feed_forward((rows.undirected,) if is_last else (rows.undirected, rows.angles))

    def atom_refinement(self, *, is_last: bool) -> None:
        rows = self.rows
        for count, halo in ((rows.atoms, rows.atom_halo), (rows.undirected, rows.edge_halo)):
            self.copy(count * self.row)
            self.borrow(halo, self.row)
        self.gated(rows.edges)
        self._feed_forward((rows.atoms,) if is_last else (rows.atoms, rows.edges))
        if not is_last:
            self.give_back(rows.edge_halo, self.row)

    def _tokens(self, *, nodes_move: bool) -> None:
        """Messages of the atom graph's edges."""
        rows, row = self.rows, self.row
        self.copy(rows.atoms * row, positions=nodes_move)
        self.borrow(rows.atom_halo, row, positions=nodes_move)
        self.copy(rows.undirected * row)
        self.borrow(rows.edge_halo, row)
        self._gates()
        self.gated(rows.edges)

    def _means(self, nodes: float) -> None:
        for _end in ("target", "source"):
            self.all_gather(nodes * self.row)

    def _update(self) -> None:
        """Of atoms, and of the edges by the mean of their two directions."""
        self._gates()
        self.gated(self.rows.atoms)
        self.gather(self.rows.atoms * self.row)
        if self.rows.edge_halo is not None:
            self.give_back(self.rows.edge_halo, self.part)
        self.gather(self.rows.undirected * self.row)

    def _gates(self) -> None:
        """Of experts: a table that depends on weights alone."""
        if self.hyper.num_moe_experts:
            size = self.hyper.num_elements * self.hyper.moe_router_topk * self.itemsize
            self.copy(size, positions=False)

    def _feed_forward(self, counts: tuple[float, ...]) -> None:
        for count in counts:
            self.all_gather(count * self.row)
            self.reduce(count * self.row)
