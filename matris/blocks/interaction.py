"""One interaction block: attention and refinement on the line graph and on the atom graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    def measured(self) -> dict[str, Tensor]:
        """What depends on the positions."""
        return {
            "atom envelope": self.atom_graph.envelope,
            "line envelope": self.line_graph.envelope,
            "pair basis": self.pair_basis,
            "line basis": self.line_basis,
        }

    def with_measured(self, values: Mapping[str, Tensor]) -> Connectivity:
        """The same with other values of some or all of `measured`."""
        found = {**self.measured, **values}
        return replace(
            self,
            atom_graph=replace(self.atom_graph, envelope=found["atom envelope"]),
            line_graph=replace(self.line_graph, envelope=found["line envelope"]),
            pair_basis=found["pair basis"],
            line_basis=found["line basis"],
        )


class Part:
    """What may run by passes of its own (`janus.blockwise.function`): layers of a block, or all of them.

    Args:
        name: the same for parts that differ in their weights alone.
        function: from features, and the graph, to features.
        weights: that it reads.
        features, measured: names of what it reads of features and of `Connectivity.measured`.

    Attributes:
        make_passes: gives the passes on a batch; by default, and where it gives none, all is left to autograd.
    """

    make_passes: Callable[[Part, Connectivity], Passes | None] | None

    def __init__(
        self,
        name: str,
        function: Callable[[Tensors, Connectivity], Tensors],
        weights: Weights,
        *,
        features: Sequence[str],
        measured: Sequence[str],
    ) -> None:
        self.name, self.weights = name, weights
        self.features, self.measured = tuple(features), tuple(measured)
        self._function = function
        self.make_passes = None

    def __call__(self, features: Tensors, graph: Connectivity) -> Tensors:
        passes = None if self.make_passes is None else self.make_passes(self, graph)
        if passes is None:
            return self._function(features, graph)
        return run_block(passes, (*features, *self.measured_of(graph)), self.weights.current())

    def measured_of(self, graph: Connectivity) -> Tensors:
        """What it reads of `graph.measured`."""
        found = graph.measured
        return tuple(found[name] for name in self.measured)

    def on(self, graph: Connectivity) -> Callable[[Tensors, Tensors], Tensors]:
        """The function of features with what was measured, and of weights."""

        def function(x: Tensors, w: Tensors) -> Tensors:
            features, measured = x[: len(self.features)], x[len(self.features) :]
            with self.weights.given(w):
                return self._function(features, graph.with_measured(dict(zip(self.measured, measured, strict=True))))

        return function


class InteractionBlock(MegatronModule):
    """Line attention, atom attention, line refinement, atom refinement, each with the features of the one before.

    Args:
        is_last: the energy reads atoms only, so the last block leaves the edges and angles of its refinements alone.

    Attributes:
        whole, lines, refinements: all layers, the line attention, and both refinements as parts. The last two have all
            layers but those with experts.
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
        envelopes, bases = ("atom envelope", "line envelope"), ("pair basis", "line basis")
        features, last = ("atoms", "edges", "angles"), " of the last block" if is_last else ""
        self.whole = Part(
            f"block{last}", self._interact, Weights(self), features=features, measured=(*envelopes, *bases)
        )
        self.lines = Part(
            "line attention",
            self._attend_lines,
            Weights(self.line_attention),
            features=features[1:],
            measured=envelopes[1:],
        )
        self.refinements = Part(
            f"refinements{last}",
            self._refine,
            Weights(self.line_refinement, self.atom_refinement),
            features=features,
            measured=bases,
        )

    def forward(
        self, atoms: Tensor, edges: Tensor, angles: Tensor, graph: Connectivity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of atoms (N, width), undirected edges (U, width) and angles (A, width) to updated ones.

        The last block gives those of edges and angles back as they were.
        """
        atoms, *others = self.whole((atoms, edges, angles), graph)
        edges, angles = others or (edges, angles)
        return atoms, edges, angles

    def _interact(self, features: Tensors, graph: Connectivity) -> Tensors:
        atoms, edges, angles = features
        edges, angles = self.lines((edges, angles), graph)
        atoms, edges = self.atom_attention(atoms, edges, graph.atom_graph, graph.element)
        return self.refinements((atoms, edges, angles), graph)

    def _attend_lines(self, features: Tensors, graph: Connectivity) -> Tensors:
        edges, angles = features
        return self.line_attention(edges, angles, graph.line_graph)

    def _refine(self, features: Tensors, graph: Connectivity) -> Tensors:
        atoms, edges, angles = features
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
        return (atoms,) if self.is_last else (atoms, edges, angles)


def make_again(part: Part, graph: Connectivity) -> Passes:
    """Full recomputation; what a pass makes again it holds as the whole model would."""
    return MadeAgain(function=part.on(graph), recompute_bytes=recomputed_size())
