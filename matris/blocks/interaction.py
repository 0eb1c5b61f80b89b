"""One interaction block: attention and refinement on the line graph and on the atom graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from matris.blocks.attention import SeparableAttention
from matris.blocks.edges import EdgeSet
from matris.blocks.expert_attention import ExpertAttention
from matris.blocks.module import MatRISConfig, MegatronModule
from matris.blocks.refinement import AtomRefinement, LineRefinement


@dataclass(frozen=True, kw_only=True)
class Connectivity:
    """What the blocks know of a batch besides features.

    Attributes:
        atom_graph: directed edges between atoms.
        line_graph: angles between undirected edges.
        element: (N,) Z - 1 of owned atoms.
        angle_center: (A,) atom at which an angle's edges meet.
        pair_basis, line_basis: (U, num_radial) radial bases of the two cutoffs.
    """

    atom_graph: EdgeSet
    line_graph: EdgeSet
    element: Tensor
    angle_center: Tensor
    pair_basis: Tensor
    line_basis: Tensor


class InteractionBlock(MegatronModule):
    """Line attention, atom attention, line refinement, atom refinement, each with the features of the one before.

    Args:
        is_last: the energy reads atoms only, so the last block leaves the edges and angles of its refinements alone.
    """

    def __init__(self, config: MatRISConfig, *, is_last: bool) -> None:
        super().__init__(config)
        self.is_last = is_last
        self.line_attention = SeparableAttention(config)
        self.has_experts = config.model.num_moe_experts > 0
        multi_head = self.has_experts and not config.model.separable_attention
        self.atom_attention = (
            ExpertAttention(config) if multi_head else SeparableAttention(config, has_experts=self.has_experts)
        )
        self.line_refinement = LineRefinement(config)
        self.atom_refinement = AtomRefinement(config)

    def forward(
        self, atoms: Tensor, edges: Tensor, angles: Tensor, graph: Connectivity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of atoms (N, width), undirected edges (U, width) and angles (A, width) to updated ones."""
        edges, angles = self.line_attention(edges, angles, graph.line_graph)
        atoms, edges = self.atom_attention(atoms, edges, graph.atom_graph, graph.element)
        edges, angles = self.line_refinement(
            edges,
            angles,
            atoms,
            graph.line_basis,
            graph.line_graph,
            center=graph.angle_center,
            update_angles=not self.is_last,
        )
        atoms, edges = self.atom_refinement(
            atoms, edges, graph.pair_basis, graph.atom_graph, update_edges=not self.is_last
        )
        return atoms, edges, angles
