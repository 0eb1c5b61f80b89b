"""Separable attention: a softmax over a node's edges for every channel, once as target and once as source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus.comm.adjoint import all_gather, copy, gather
from janus.ops.attention import attention_sums
from janus.ops.recompute import recomputable
from janus.ops.segment import gather_add, gather_rows
from matris.blocks.edges import EdgeSet, PendingHalo
from matris.blocks.module import GatedMLP, MatRISConfig, MegatronModule, column_parallel
from matris.blocks.moe import RoutedExperts, join

LOGIT_CAP = 10.0
"""Bound of the smooth attention's logits. exp(+-10) is far from the limits of fp32, so no running maximum is needed."""

DELTA = 1e-6
"""Keeps the smooth attention's denominator positive when a node's last edge reaches the cutoff."""


class SeparableAttention(MegatronModule):
    """Updates nodes by attention over their edges, and edges by their messages (arXiv 2603.02002).

    m_e = GatedMLP([y_e, x_target, x_source]); aggregates A_target and A_source of m, weighted per channel by
    softmax(W_t y) over the edges with the same target and softmax(W_s y) over those with the same source;
    x' = GatedMLP([x, A_target, A_source]) + g x; y' = mean over both directions of m + g' y.

    Args:
        has_experts: whether routed experts add to both gated perceptrons, as in `ExpertAttention`.
    """

    def __init__(self, config: MatRISConfig, *, has_experts: bool = False) -> None:
        super().__init__(config)
        width, self.tensor = config.model.hidden_size, config.mesh.tensor
        self.smooth = config.model.smooth_attention
        hidden = config.model.moe_ffn_hidden_size if has_experts else None
        self.message = GatedMLP(config, num_parts=3, hidden_size=hidden)
        self.message_experts = RoutedExperts(config, 3 * width) if has_experts else None
        self.logits = column_parallel(config, width, 2 * width, stride=2)
        self.width = width // self.tensor.size
        self.update = GatedMLP(config, num_parts=3, hidden_size=hidden)
        self.update_experts = RoutedExperts(config, 3 * width) if has_experts else None
        self.node_residual = nn.Parameter(torch.ones(width))
        self.edge_residual = nn.Parameter(torch.ones(width))

    def forward(
        self, nodes: Tensor, edges: Tensor, graph: EdgeSet, element: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Owned nodes and edge features, (..., width) each, and with experts the nodes' Z - 1, to updated features.

        Exchanges the nodes and, on the atom graph, the edge features once each, and returns the sums over edges to the
        nodes' owners. On W tensor ranks each has its own channels (heads) of messages, logits and sums.
        """
        own_nodes, own_edges = copy(nodes, self.tensor), copy(edges, self.tensor)
        coming_nodes, coming_edges = graph.sources.start_borrow(own_nodes), graph.features.start_borrow(own_edges)
        update = self.update.project(0, own_nodes)  # needs nothing of other ranks
        local_edges = coming_edges.wait()
        logits = graph.spread(self.logits(local_edges))
        of_edges = self.message.project(0, local_edges)
        local_nodes = coming_nodes.wait()
        of_nodes = (self.message.project(part, local_nodes) for part in (1, 2))
        inner = gather_add((of_edges, *of_nodes), (graph.undirected, graph.target, graph.source))
        routed = None
        if self.message_experts is not None:
            at_target, at_source = (gather_rows(local_nodes, node) for node in (graph.target, graph.source))
            token = join(graph.spread(local_edges), at_target, at_source)
            assert element is not None, "experts are chosen by element"
            routed = self.message_experts(token, element.index_select(0, graph.target))
        message = self.message.finish(inner, routed)
        from_target, from_source = self._start_sums(logits, message, graph)
        edge_update = graph.average(message)
        mean_target, mean_source = self._mean(from_target), self._mean(from_source)
        update = update + self.update.project(1, mean_target) + self.update.project(2, mean_source)
        routed = None
        if self.update_experts is not None:
            routed = self.update_experts(join(own_nodes, mean_target, mean_source), element)
        return (
            torch.addcmul(gather(self.update.finish(update, routed), self.tensor, dim=1), self.node_residual, nodes),
            torch.addcmul(gather(edge_update, self.tensor, dim=1), self.edge_residual, edges),
        )

    def _start_sums(
        self, logits: Tensor, message: Tensor, graph: EdgeSet
    ) -> tuple[tuple[PendingHalo, PendingHalo], tuple[PendingHalo, PendingHalo]]:
        """Numerator and denominator of the softmax-weighted mean over each node's edges, on the way to its owner; for
        edges as their target and as their source."""
        nodes = (graph.target, graph.targets), (graph.source, graph.sources)
        counted = [(node, rows.local) for node, rows in nodes]
        if self.smooth:
            value = recomputable(graph.envelope * message, torch.mul, graph.envelope, message)
            sums = attention_sums(logits, value, graph.envelope, counted, cap=LOGIT_CAP)
        else:
            # Released weights: no envelope and no bound, so the largest logit of each node is taken off. It cancels,
            # hence carries no gradient.
            parts = zip(logits.split(self.width, dim=1), nodes, strict=True)
            largest = [rows.max(part, node).index_select(0, node) for part, (node, rows) in parts]
            sums = attention_sums(logits - torch.cat(largest, dim=1), message, None, counted, cap=None)
        of_target, of_source = (
            (rows.start_return(value), rows.start_return(weight))
            for (weight, value), (_, rows) in zip(sums, nodes, strict=True)
        )
        return of_target, of_source

    def _mean(self, sums: tuple[PendingHalo, PendingHalo]) -> Tensor:
        """The mean for each owned node with the channels of all tensor ranks, (N, width)."""
        value, weight = (pending.wait() for pending in sums)
        return all_gather(value / (weight + (DELTA if self.smooth else (weight == 0))), self.tensor, dim=1)
