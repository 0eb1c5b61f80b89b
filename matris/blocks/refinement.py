"""Refinement: messages under a learned envelope, summed at their target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus.comm.adjoint import all_gather, copy
from janus.ops.segment import gather_add, gather_rows
from matris.blocks.edges import EdgeSet
from matris.blocks.module import FeedForward, GatedMLP, MatRISConfig, MegatronModule, column_parallel


class _Refinement(MegatronModule):
    """What both refinements share: q_e = GatedMLP(...), feed-forward layers, residual scales, learned envelope V B."""

    def __init__(self, config: MatRISConfig, num_parts: int) -> None:
        super().__init__(config)
        width, self.tensor = config.model.hidden_size, config.mesh.tensor
        bias = config.model.ffn_bias
        self.message = GatedMLP(config, num_parts)
        self.node_ffn = FeedForward(config, width, bias=bias)
        self.edge_ffn = FeedForward(config, width, bias=bias)
        self.envelope = column_parallel(config, config.model.num_radial, width)
        self.node_residual = nn.Parameter(torch.ones(width))
        self.edge_residual = nn.Parameter(torch.ones(width))

    def _whole(self, rows: Tensor) -> Tensor:
        """The channels of all tensor ranks, (N, width / W) to (N, width)."""
        return all_gather(rows, self.tensor, dim=1)


class AtomRefinement(_Refinement):
    """x' = FFN(sum_e w_e q_e) + g x and y' = mean of FFN(q) + g' y on the atom graph, w_e = V basis(d_e)."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config, num_parts=3)
        self.enveloped_edge_update = config.model.enveloped_edge_update

    def forward(
        self, atoms: Tensor, edges: Tensor, basis: Tensor, graph: EdgeSet, *, update_edges: bool
    ) -> tuple[Tensor, Tensor]:
        """Owned atoms (N, width) and undirected edges (U, width), basis (local U, num_radial), to updated features.

        Exchanges atoms and edges once each, and returns the mean over both directions of an edge to its owner.
        """
        own_atoms = copy(atoms, self.tensor)
        coming_edges = graph.features.start_borrow(copy(edges, self.tensor))
        coming_atoms = graph.sources.start_borrow(own_atoms)
        at_target = self.message.project(1, own_atoms)  # targets are owned: needs nothing of other ranks
        envelope = graph.spread(self.envelope(basis))
        of_edges = self.message.project(0, coming_edges.wait())
        at_source = self.message.project(2, coming_atoms.wait())
        inner = gather_add((of_edges, at_target, at_source), (graph.undirected, graph.target, graph.source))
        message = self.message.finish(inner)
        enveloped = envelope * message
        received = self._whole(graph.targets.sum(enveloped, graph.target))
        if update_edges:
            delta = graph.average(self.edge_ffn(self._whole(enveloped if self.enveloped_edge_update else message)))
            edges = torch.addcmul(delta, self.edge_residual, edges)
        return torch.addcmul(self.node_ffn(received), self.node_residual, atoms), edges


class LineRefinement(_Refinement):
    """The same on the line graph, with the centre atom as one more input; the envelope is that of both edges, w_a w_b.

    The released models give this layer `num_angular` input columns but feed it the radial basis, so the two numbers
    have to be equal there; here it takes `num_radial` columns.
    """

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config, num_parts=4)

    def forward(
        self,
        edges: Tensor,
        angles: Tensor,
        atoms: Tensor,
        basis: Tensor,
        graph: EdgeSet,
        *,
        center: Tensor,
        update_angles: bool,
    ) -> tuple[Tensor, Tensor]:
        """Owned edges (U, width), angles (A, width), atoms (N, width), centre of each angle, to updated ones.

        Exchanges the edges once, and returns the sums over angles to the edges' owners.
        """
        coming = graph.sources.start_borrow(copy(edges, self.tensor))
        of_angles = self.message.project(0, copy(angles, self.tensor))
        at_center = self.message.project(1, copy(atoms, self.tensor))
        envelope = self.envelope(basis)
        local_edges = coming.wait()
        of_edges = (self.message.project(part, local_edges) for part in (2, 3))
        inner = gather_add((of_angles, at_center, *of_edges), (None, center, graph.target, graph.source))
        message = self.message.finish(inner)
        # The target's factor is the same for all its angles: it is applied to their sum.
        enveloped = gather_rows(envelope, graph.source) * message
        received = graph.targets.start_return(envelope * graph.targets.sum(enveloped, graph.target))
        if update_angles:
            angles = torch.addcmul(self.edge_ffn(self._whole(message)), self.edge_residual, angles)
        return torch.addcmul(self.node_ffn(self._whole(received.wait())), self.node_residual, edges), angles
