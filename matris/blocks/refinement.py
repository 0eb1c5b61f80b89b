"""Refinement: messages under a learned envelope, summed at their target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus.ops.segment import segment_sum
from matris.blocks.edges import EdgeSet
from matris.blocks.module import MLP, GatedMLP, Linear, MatRISConfig, MegatronModule


class _Refinement(MegatronModule):
    """What both refinements share: q_e = GatedMLP(...), feed-forward layers, residual scales, learned envelope V B."""

    def __init__(self, config: MatRISConfig, num_parts: int) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        bias = config.model.ffn_bias
        self.message = GatedMLP(config, num_parts)
        self.node_ffn = MLP(config, (width, width, width), bias=bias)
        self.edge_ffn = MLP(config, (width, width, width), bias=bias)
        self.envelope = Linear(config, config.model.num_radial, width)
        self.node_residual = nn.Parameter(torch.ones(width))
        self.edge_residual = nn.Parameter(torch.ones(width))


class AtomRefinement(_Refinement):
    """x' = FFN(sum_e w_e q_e) + g x and y' = mean of FFN(q) + g' y on the atom graph, w_e = V basis(d_e)."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config, num_parts=3)
        self.enveloped_edge_update = config.model.enveloped_edge_update

    def forward(
        self, atoms: Tensor, edges: Tensor, basis: Tensor, graph: EdgeSet, *, update_edges: bool
    ) -> tuple[Tensor, Tensor]:
        """Atoms (N, width), undirected edges and their radial basis (U, ...) to updated atoms and edges."""
        inner = graph.spread(self.message.project(0, edges))
        inner = inner.add_(self.message.project(1, atoms).index_select(0, graph.target))
        inner = inner.add_(self.message.project(2, atoms).index_select(0, graph.source))
        message = self.message.finish(inner)
        enveloped = graph.spread(self.envelope(basis)) * message
        received = segment_sum(enveloped, graph.target, len(atoms))
        if update_edges:
            delta = graph.average(self.edge_ffn(enveloped if self.enveloped_edge_update else message))
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
        """Undirected edges (U, width), angles (A, width), atoms and centre index (A,) to updated edges and angles."""
        inner = self.message.project(0, angles)
        inner = inner.add_(self.message.project(1, atoms).index_select(0, center))
        inner = inner.add_(self.message.project(2, edges).index_select(0, graph.target))
        inner = inner.add_(self.message.project(3, edges).index_select(0, graph.source))
        message = self.message.finish(inner)
        envelope = self.envelope(basis)
        # The target's factor is the same for all its angles: it is applied to their sum.
        enveloped = envelope.index_select(0, graph.source) * message
        received = envelope * segment_sum(enveloped, graph.target, len(edges))
        if update_angles:
            angles = torch.addcmul(self.edge_ffn(message), self.edge_residual, angles)
        return torch.addcmul(self.node_ffn(received), self.node_residual, edges), angles
