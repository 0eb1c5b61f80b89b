"""Multi-head attention over an atom's edges, with experts before and after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus.comm.adjoint import copy, gather
from janus.ops.recompute import recomputable
from janus.ops.segment import gather_add, gather_rows
from matris.blocks.attention import DELTA, LOGIT_CAP
from matris.blocks.edges import EdgeSet, PendingHalo, Rows
from matris.blocks.module import GatedMLP, MatRISConfig, MegatronModule, column_parallel, row_parallel
from matris.blocks.moe import RoutedExperts, join


class ExpertAttention(MegatronModule):
    """Message-update experts, multi-head self-attention over an atom's edges, feature-update experts.

    m_e = norm(shared([y, x_t, x_s]) + experts of the target), A_t and A_s the attention of an atom over the edges that
    it is the target and the source of, x' = norm(shared([x, A_t, A_s]) + experts of the atom) + g x, and edges as in
    `SeparableAttention`. With the envelope u of an edge, a head's weights are u exp(c(q k / sqrt(width))) over their
    sum plus delta, on values u v: an edge enters with weight and slope zero at the cutoff.
    """

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        hyper, self.tensor = config.model, config.mesh.tensor
        width, hidden = hyper.hidden_size, hyper.moe_ffn_hidden_size
        self.head_width, self.width = hyper.kv_channels, width // self.tensor.size
        if self.width % self.head_width:
            raise ValueError(
                f"{width // self.head_width} attention heads do not divide into {self.tensor.size} tensor-parallel "
                "ranks: choose fewer ranks or narrower heads (model.kv_channels)"
            )
        self.message = GatedMLP(config, num_parts=3, hidden_size=hidden)
        self.message_experts = RoutedExperts(config, 3 * width)
        # Each projection twice over: an atom attends as target and as source.
        self.query = column_parallel(config, width, 2 * width, stride=2)
        self.key = column_parallel(config, width, 2 * width, stride=2)
        self.value = column_parallel(config, width, width)
        self.target_output = row_parallel(config, width, width, bias=False, scatter_output=False)
        self.source_output = row_parallel(config, width, width, bias=False, scatter_output=False)
        self.update = GatedMLP(config, num_parts=3, hidden_size=hidden)
        self.update_experts = RoutedExperts(config, 3 * width)
        self.node_residual = nn.Parameter(torch.ones(width))
        self.edge_residual = nn.Parameter(torch.ones(width))

    def forward(self, nodes: Tensor, edges: Tensor, graph: EdgeSet, element: Tensor) -> tuple[Tensor, Tensor]:
        """Owned atoms and edge features, (..., width), and the atoms' Z - 1, to updated features."""
        own_nodes, own_edges = copy(nodes, self.tensor), copy(edges, self.tensor)
        coming_nodes, coming_edges = graph.sources.start_borrow(own_nodes), graph.features.start_borrow(own_edges)
        update = self.update.project(0, own_nodes)  # needs nothing of other ranks
        local_edges, local_nodes = coming_edges.wait(), coming_nodes.wait()
        of_nodes = (self.message.project(part, local_nodes) for part in (1, 2))
        of_edges = self.message.project(0, local_edges)
        inner = gather_add((of_edges, *of_nodes), (graph.undirected, graph.target, graph.source))
        token = join(
            graph.spread(local_edges), gather_rows(local_nodes, graph.target), gather_rows(local_nodes, graph.source)
        )
        routed = self.message_experts(token, element.index_select(0, graph.target))
        message = self.message.finish(inner, routed)
        whole = copy(gather(message, self.tensor, dim=1), self.tensor)
        queries, keys = self.query(local_nodes).split(self.width, dim=1), self.key(whole).split(self.width, dim=1)
        value = self.value(whole)
        value = recomputable(graph.envelope * value, torch.mul, graph.envelope, value)
        from_source = self._start_sums(queries[1], keys[1], value, graph.envelope, graph.source, graph.sources)
        from_target = self._start_sums(queries[0], keys[0], value, graph.envelope, graph.target, graph.targets)
        edge_update = graph.average(message)
        at_target = copy(self.target_output(self._mean(from_target)), self.tensor)
        at_source = copy(self.source_output(self._mean(from_source)), self.tensor)
        update = update + self.update.project(1, at_target) + self.update.project(2, at_source)
        routed = self.update_experts(join(own_nodes, at_target, at_source), element)
        return (
            torch.addcmul(gather(self.update.finish(update, routed), self.tensor, dim=1), self.node_residual, nodes),
            torch.addcmul(gather(edge_update, self.tensor, dim=1), self.edge_residual, edges),
        )

    def _start_sums(
        self, query: Tensor, key: Tensor, value: Tensor, envelope: Tensor, node: Tensor, rows: Rows
    ) -> tuple[PendingHalo, PendingHalo]:
        """Numerators (N, heads, width) and denominators (N, heads, 1) of the attention, on the way to their owners."""
        heads = (-1, self.width // self.head_width, self.head_width)
        logits = (gather_rows(query, node) * key).view(heads).sum(dim=2, keepdim=True) / self.head_width**0.5
        weight = envelope[:, :, None] * (LOGIT_CAP * (logits / LOGIT_CAP).tanh()).exp()
        return (
            rows.start_return(rows.sum(weight * value.view(heads), node)),
            rows.start_return(rows.sum(weight, node)),
        )

    def _mean(self, sums: tuple[PendingHalo, PendingHalo]) -> Tensor:
        """The heads of each owned atom, (N, width / W)."""
        value, weight = (pending.wait() for pending in sums)
        return (value / (weight + DELTA)).flatten(1)
