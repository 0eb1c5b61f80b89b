"""A mixture of experts that is routed by chemical element alone.

The element of a token decides which experts serve it, never its geometry, so the active experts do not change along a
trajectory and the energy stays as smooth as each expert is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from janus.comm.adjoint import copy
from janus.comm.collectives import start_all_gather
from janus.expert_parallel.dispatcher import PlannedTokenDispatcher
from janus.expert_parallel.plan import ExpertPlan, expert_load, fixed_plan, plan_experts
from janus.ops.grouped import grouped_linear
from janus.ops.recompute import recomputable
from janus.ops.segment import gather_rows, segment_sum
from janus.ops.silu import silu
from matris.blocks.module import MatRISConfig, MegatronModule, ShardedTensor, SplitModule, split_parameter


class ElementRouter(MegatronModule):
    """A learned table (elements, experts): an element's experts are the top-k of its row, its gates their softmax."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        hyper = config.model
        self.topk = hyper.moe_router_topk
        self.table = nn.Parameter(torch.randn(hyper.num_elements, hyper.num_moe_experts))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Experts (num_elements, topk) int64 and their gates, which add up to one, for Z - 1 = 0, 1, ..."""
        logits, experts = self.table.topk(self.topk, dim=1)
        return experts, logits.softmax(dim=1)


class RoutedExperts(SplitModule):
    """sum_k g_k expert_k(x), each expert two perceptrons W2 SiLU(W1 x), for the core and for the gate of a gated norm.

    Without biases and norms, so that experts are matrix products grouped by expert; the norm is shared and comes after
    the sum. Over W tensor ranks each has hidden_size / W hidden channels of every expert. Over an expert axis tokens
    travel to the ranks that have their experts at hand: those whose homes they are, or as planned (`plan_sites`).

    Args:
        in_features: width of a token.

    Attributes:
        plan: of the micro-batch, over an expert axis.
        token_bytes: of one token, there and back.
        expert_bytes: of the weights of one expert.
    """

    plan: ExpertPlan | None

    def __init__(self, config: MatRISConfig, in_features: int) -> None:
        super().__init__(config)
        hyper, tensor = config.model, self.tensor
        self.num_experts, self.matmul_dtype = hyper.num_moe_experts, config.matmul_dtype
        hidden, width = hyper.moe_ffn_hidden_size, hyper.hidden_size
        self.router = ElementRouter(config)
        self.axis, self.plan, self.fp16_wire = config.mesh.expert, None, config.experts.fp16_wire
        self.has_homes = self.axis.size > 1 and config.experts.placement == "fixed"
        experts, home = self.num_experts, self.axis if self.has_homes else None
        self.inner = split_parameter(_uniform(in_features, experts, 2, hidden, in_features), tensor, dim=2, home=home)
        self.core = split_parameter(_uniform(hidden, experts, width, hidden), tensor, dim=2, home=home)
        self.gate = split_parameter(_uniform(hidden, experts, width, hidden), tensor, dim=2, home=home)
        self.hidden = hidden // tensor.size
        number_bytes = config.params_dtype.itemsize
        self.token_bytes = number_bytes * (in_features + 2 * width)
        self.expert_bytes = number_bytes * self.hidden * (2 * in_features + 2 * width)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        """Megatron's, with experts at home as parts of all of them."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.has_homes:
            return found
        for name in ("inner", "core", "gate"):
            key, value = f"{prefix}{name}", getattr(self, name)
            found[key] = ShardedTensor.from_rank_offsets(
                key,
                value,
                (0, self.axis.rank, self.axis.size),
                (value.partition_dim, self.tensor.rank, self.tensor.size),
                replica_id=(0, 0, self.config.mesh.expert_replicas.rank),
            )
        return found

    def forward(self, x: Tensor, element: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (T, in_features) and their Z - 1 (T,) to sums for core and gate, (T, width), partial over ranks."""
        experts, gates = self.router()
        gates = copy(gates, self.tensor)
        if self.axis.size > 1:
            return self._over_ranks(x, element, experts, gates)
        expert = experts.index_select(0, element).flatten()
        order = expert.argsort(stable=True)
        token = order.div(self.router.topk, rounding_mode="floor")
        counts = torch.bincount(expert, minlength=self.num_experts)
        gate = gates.index_select(0, element).flatten().index_select(0, order)
        core, gated = self._products(gather_rows(x, token), gate, counts)
        return segment_sum(core, token, len(x)), segment_sum(gated, token, len(x))

    def _over_ranks(self, x: Tensor, element: Tensor, experts: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        assert self.plan is not None, "plan_sites comes before the blocks"
        if isinstance(self.inner, nn.Parameter) and not self.has_homes:
            raise RuntimeError(
                "a model with experts over several ranks computes once janus.sharding.Weights (in a Learner) shares "
                "them; give MatRIS a mesh without an expert axis to have all experts on each rank"
            )
        dispatcher = PlannedTokenDispatcher(
            self.plan, self.router.topk, self.axis, num_kinds=len(gates), fp16=self.fp16_wire
        )
        rows, kind = dispatcher.dispatch(x, element, experts.index_select(0, element))
        # Slots without an expert come last, and get no tokens.
        counts = torch.from_numpy(dispatcher.counts[: len(self.inner)]).to(x.device)
        expert = torch.from_numpy(np.repeat(self.plan.slots[self.axis.rank], dispatcher.counts)).to(x.device)
        gate = gates.new_zeros(len(gates), self.num_experts).scatter(1, experts, gates)
        gate = gate.flatten().index_select(0, kind * self.num_experts + expert)
        core, gated = dispatcher.combine(torch.cat(self._products(rows, gate, counts), dim=1)).chunk(2, dim=1)
        return core, gated

    def _products(self, rows: Tensor, gate: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, in_features) in the order of their experts, with the gates (N,) of these, to core and gate."""
        inner = grouped_linear(rows, self.inner.flatten(1, 2), counts, dtype=self.matmul_dtype)
        hidden, gate = silu(inner), gate[:, None]
        for_core, for_gate = recomputable(hidden * gate, torch.mul, hidden, gate).split(self.hidden, dim=1)
        core = grouped_linear(for_core, self.core, counts, dtype=self.matmul_dtype)
        return core, grouped_linear(for_gate, self.gate, counts, dtype=self.matmul_dtype)


def join(*features: Tensor) -> Tensor:
    """Tokens (T, in_features), from features of the same rows; not kept for backward passes."""
    return recomputable(torch.cat(features, dim=1), lambda *parts: torch.cat(parts, dim=1), *features)


def plan_sites(sites: Sequence[RoutedExperts], tokens: Sequence[Tensor]) -> None:
    """Plans a micro-batch, before any of its blocks; gathers the numbers of its tokens over the expert axis.

    Args:
        sites: all of a model.
        tokens: Z - 1 of the tokens of each site; sites with the same tokens have the same tensor.
    """
    axis = sites[0].axis
    num_elements = len(sites[0].router.table)
    kinds = list({id(elements): elements for elements in tokens}.values())
    own = torch.stack([torch.bincount(elements, minlength=num_elements) for elements in kinds])
    histograms = start_all_gather(own.flatten(), axis).wait().view(axis.size, *own.shape).cpu().numpy()
    tables = torch.stack([site.router.table.detach() for site in sites])
    routing = tables.topk(sites[0].router.topk, dim=2).indices.cpu().numpy()
    for site, elements, experts in zip(sites, tokens, routing, strict=True):
        which = next(index for index, kind in enumerate(kinds) if kind is elements)
        load = expert_load(histograms[:, which], experts, site.num_experts)
        site.plan = (
            fixed_plan(load, axis.size)
            if site.has_homes
            else plan_experts(load, token_bytes=site.token_bytes, expert_bytes=site.expert_bytes)
        )


_ROUTER, _OF_EXPERTS = ".router.table", (".inner", ".core", ".gate")
"""Ends of the names of `RoutedExperts`'s parameters; the first dimension of the latter is the expert."""


def experts_of_elements(tables: Mapping[str, Tensor], topk: int, elements: Sequence[int]) -> dict[str, Tensor]:
    """Which experts a model for these elements alone must have: as many at each site, in their old order.

    Sites where fewer are used than at others keep some that are not.

    Args:
        tables: (num_elements, experts) of the router of each site, by the site's name.
        elements: atomic numbers.
    """
    rows = torch.tensor(elements) - 1
    used = {name: table.topk(topk, dim=1).indices[rows].unique() for name, table in tables.items()}
    size = max(map(len, used.values()))
    kept = {}
    for name, experts in used.items():
        idle = sorted(set(range(tables[name].shape[1])) - set(experts.tolist()))
        filling = torch.tensor(idle[: size - len(experts)], dtype=torch.int64)
        kept[name] = torch.cat([experts, filling]).sort().values
    return kept


def reader_of_elements(
    names: Iterable[str],
    whole: Callable[[str], Tensor],
    some: Callable[[str, Tensor], Tensor],
    topk: int,
    elements: Sequence[int],
) -> tuple[Callable[[str], Tensor], int]:
    """What gives the weights, by name, of a model for these elements alone; and how many experts that has at each site.

    Args:
        names: of the state of the whole model.
        whole, some: give a tensor of it, or the experts (n,) of one.
    """
    tables = {name.removesuffix(_ROUTER): whole(name) for name in names if name.endswith(_ROUTER)}
    kept = experts_of_elements(tables, topk, elements)

    def read(name: str) -> Tensor:
        site, end = name.rpartition(".")[0], f".{name.rpartition('.')[2]}"
        if name.endswith(_ROUTER):
            site = name.removesuffix(_ROUTER)
            return tables[site][:, kept[site]]
        return some(name, kept[site]) if site in kept and end in _OF_EXPERTS else whole(name)

    return read, len(next(iter(kept.values())))


def _uniform(fan_in: int, *shape: int) -> Tensor:
    return nn.init.uniform_(torch.empty(shape), -(fan_in**-0.5), fan_in**-0.5)
