"""One interaction block: attention and refinement on the line graph and on the atom graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from janus.blockwise.again import MadeAgain
from janus.blockwise.function import Passes, Tensors, run_block
from janus.blockwise.weights import Weights
from janus.ops.recompute import recomputed_size
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

    @property
    def measured(self) -> Tensors:
        """What depends on the positions."""
        return self.atom_graph.envelope, self.line_graph.envelope, self.pair_basis, self.line_basis

    def with_measured(self, values: Sequence[Tensor]) -> Connectivity:
        """The same with other values of `measured`."""
        of_atoms, of_lines, pair_basis, line_basis = values
        return replace(
            self,
            atom_graph=replace(self.atom_graph, envelope=of_atoms),
            line_graph=replace(self.line_graph, envelope=of_lines),
            pair_basis=pair_basis,
            line_basis=line_basis,
        )


BlockFunction = Callable[[Tensors, Tensors], Tensors]
"""From inputs with gradients, and weights, to outputs."""


class InteractionBlock(MegatronModule):
    """Line attention, atom attention, line refinement, atom refinement, each with the features of the one before.

    Args:
        is_last: the energy reads atoms only, so the last block leaves the edges and angles of its refinements alone.

    Attributes:
        make_passes: gives the passes of this block on a batch; by default, and where it gives none, everything is left
            to autograd.
    """

    make_passes: Callable[[InteractionBlock, Connectivity], Passes | None] | None

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
        self.weights = Weights(self)
        self.make_passes = None

    def forward(
        self, atoms: Tensor, edges: Tensor, angles: Tensor, graph: Connectivity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of atoms (N, width), undirected edges (U, width) and angles (A, width) to updated ones."""
        passes = None if self.make_passes is None else self.make_passes(self, graph)
        if passes is None:
            return self._interact(atoms, edges, angles, graph)
        found = run_block(passes, (atoms, edges, angles, *graph.measured), self.weights.current())
        return (found[0], edges, angles) if self.is_last else (found[0], found[1], found[2])

    def function_on(self, graph: Connectivity) -> BlockFunction:
        """What the block does: features and `graph.measured`, and its weights, to the features that are read later."""

        def function(x: Tensors, w: Tensors) -> Tensors:
            with self.weights.given(w):
                atoms, edges, angles, *measured = x
                features = self._interact(atoms, edges, angles, graph.with_measured(measured))
            return features[:1] if self.is_last else features

        return function

    def _interact(
        self, atoms: Tensor, edges: Tensor, angles: Tensor, graph: Connectivity
    ) -> tuple[Tensor, Tensor, Tensor]:
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


def make_again(block: InteractionBlock, graph: Connectivity) -> Passes:
    """Full recomputation; what a pass makes again it holds as the whole model would."""
    return MadeAgain(function=block.function_on(graph), recompute_bytes=recomputed_size())
