"""Separable attention: a softmax over a node's edges for every channel, once as target and once as source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus.ops.attention import attention_terms
from janus.ops.segment import segment_max, segment_sum
from matris.blocks.edges import EdgeSet
from matris.blocks.module import GatedMLP, Linear, MatRISConfig, MegatronModule

_LOGIT_CAP = 10.0
"""Bound of the smooth attention's logits. exp(+-10) is far from the limits of fp32, so no running maximum is needed."""

_DELTA = 1e-6
"""Keeps the smooth attention's denominator positive when a node's last edge reaches the cutoff."""


class SeparableAttention(MegatronModule):
    """Updates nodes by attention over their edges, and edges by their messages (arXiv 2603.02002).

    m_e = GatedMLP([y_e, x_target, x_source]); aggregates A_target and A_source of m, weighted per channel by
    softmax(W_t y) over the edges with the same target and softmax(W_s y) over those with the same source;
    x' = GatedMLP([x, A_target, A_source]) + g x; y' = mean over both directions of m + g' y.
    """

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        self.width = width
        self.smooth = config.model.smooth_attention
        self.message = GatedMLP(config, num_parts=3)
        self.logits = Linear(config, width, 2 * width)
        self.update = GatedMLP(config, num_parts=3)
        self.node_residual = nn.Parameter(torch.ones(width))
        self.edge_residual = nn.Parameter(torch.ones(width))

    def forward(self, nodes: Tensor, edges: Tensor, graph: EdgeSet) -> tuple[Tensor, Tensor]:
        """Nodes (N, width) and edge features (num_features, width) to updated ones."""
        inner = graph.spread(self.message.project(0, edges))
        inner = inner.add_(self.message.project(1, nodes).index_select(0, graph.target))
        inner = inner.add_(self.message.project(2, nodes).index_select(0, graph.source))
        message = self.message.finish(inner)
        target_logits, source_logits = graph.spread(self.logits(edges)).split(self.width, dim=1)
        value = graph.envelope * message if self.smooth else message
        to_target = self._aggregate(target_logits, value, graph.envelope, graph.target, len(nodes))
        to_source = self._aggregate(source_logits, value, graph.envelope, graph.source, len(nodes))
        update = self.update.project(0, nodes) + self.update.project(1, to_target) + self.update.project(2, to_source)
        return (
            torch.addcmul(self.update.finish(update), self.node_residual, nodes),
            torch.addcmul(graph.average(message), self.edge_residual, edges),
        )

    def _aggregate(self, logits: Tensor, value: Tensor, envelope: Tensor, node: Tensor, num_nodes: int) -> Tensor:
        """Softmax-weighted messages of each node's edges, (num_nodes, width)."""
        if self.smooth:
            weight, value = attention_terms(logits, value, envelope, cap=_LOGIT_CAP)
            return segment_sum(value, node, num_nodes) / (segment_sum(weight, node, num_nodes) + _DELTA)
        # Released weights: no envelope and no bound, so the largest logit of each node is taken off. It cancels, hence
        # carries no gradient.
        logits = logits - segment_max(logits, node, num_nodes).index_select(0, node)
        weight, value = attention_terms(logits, value, None, cap=None)
        total = segment_sum(weight, node, num_nodes)
        return segment_sum(value, node, num_nodes) / (total + (total == 0))
