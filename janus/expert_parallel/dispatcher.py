"""Megatron's all-to-all token dispatcher, following a plan, and differentiable any number of times."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from janus.comm.adjoint import all_to_all
from janus.comm.collectives import start_all_to_all
from janus.expert_parallel.plan import ExpertPlan
from janus.expert_parallel.wire import compressed_all_to_all
from janus.megatron_import import megatron_import
from janus.mesh import Axis

with megatron_import():
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig


class PlannedTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """The tokens of one micro-batch to the ranks that hold their experts, and the results back.

    What Megatron calls an expert is a slot here: a place for an expert on a rank. All ranks have the same number of
    slots, and the plan says which expert lies in which; so an expert may have replicas, and be anywhere.

    Megatron's permutations are used as they are. In its place are: the counts, which the plan knows on all ranks, so
    that none are exchanged; and the exchanges, because its own are not right in every derivative.

    Args:
        plan: of this micro-batch.
        topk: experts of a token.
        axis: the expert axis.
        num_kinds: of tokens; at most 256.
        fp16: send tokens rounded, see `janus.expert_parallel.wire`.
    """

    hidden_shape: torch.Size

    def __init__(self, plan: ExpertPlan, topk: int, axis: Axis, *, num_kinds: int = 256, fp16: bool = False) -> None:
        num_slots = plan.slots.shape[1]
        if not torch.cuda.is_available():  # Megatron makes a stream for copies to the host, of which there are none
            MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
        groups = ProcessGroupCollection()
        groups.ep, groups.expt_tp, groups.tp_ep = axis.group, None, axis.group
        super().__init__(
            num_slots,
            list(range(axis.rank * num_slots, (axis.rank + 1) * num_slots)),
            _config(axis.size * num_slots, topk),
            groups,
        )
        self.plan, self.axis, self.num_kinds, self.fp16 = plan, axis, num_kinds, fp16
        quota = plan.quota(axis.rank)
        filled = plan.slots >= 0
        self._slot_of = np.full(quota.shape, -1)  # (E, W): the slot, among those of all ranks
        self._slot_of[plan.slots[filled], np.nonzero(filled)[0]] = np.flatnonzero(filled)
        self._quota = quota
        # (W, slots) tokens that come from each rank for each slot of this one
        self._arrivals = np.where(filled[axis.rank], plan.arrivals(axis.rank)[:, plan.slots[axis.rank]], 0)

    @property
    def counts(self) -> np.ndarray:
        """(slots,) tokens that this rank gets for each of its slots."""
        return self._arrivals.sum(axis=0)

    def dispatch(self, tokens: Tensor, kinds: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Each token to a replica of each of its experts.

        Args:
            tokens: (T, width).
            kinds: (T,) int64 below `num_kinds`, what a token's experts follow from.
            experts: (T, topk) int64.
        Returns:
            Tokens (N, width) of this rank's slots in turn, and their kinds (N,).
        """
        routing_map = self._routing_map(experts)
        # Kinds go where Megatron sends probabilities, which are known from them.
        column = kinds.to(torch.uint8)[:, None].expand(-1, routing_map.shape[1])
        rows, kind = self.token_dispatch(*self.dispatch_preprocess(tokens, routing_map, column))
        rows, _, kind = self.dispatch_postprocess(rows, kind)
        return rows, kind.long()

    def combine(self, rows: Tensor) -> Tensor:
        """What the experts made of the tokens of `dispatch`, (N, any width), summed for each token: (T, that width)."""
        # Megatron's experts do not change the width.
        self.hidden_shape = self.hidden_shape_before_permute = torch.Size((self.hidden_shape[0], rows.shape[1]))
        return self.combine_postprocess(self.token_combine(self.combine_preprocess(rows)))

    def _routing_map(self, experts: Tensor) -> Tensor:
        """(T, slots of all ranks): the copies of an expert's tokens, in order, to its replicas as the plan says."""
        expert, order = experts.flatten().sort(stable=True)
        slots = np.repeat(self._slot_of.ravel(), self._quota.ravel())
        if len(slots) != len(expert):
            raise ValueError(
                f"{len(expert)} token copies, but the plan is for {len(slots)}: plan each micro-batch anew"
            )
        routing_map = torch.zeros(len(experts), self.num_experts, dtype=torch.bool, device=experts.device)
        token = order.div(experts.shape[1], rounding_mode="floor")
        routing_map[token, torch.from_numpy(slots).to(experts.device)] = True
        return routing_map

    # In place of Megatron's -------------------------------------------------------------------------------------------

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Tokens of each slot of this rank, (slots,); sets the splits of the exchange."""
        self.num_out_tokens = int(self._quota.sum())
        self.input_splits = self._quota.sum(axis=0).tolist()
        self.output_splits = self._arrivals.sum(axis=1).tolist()
        self.num_global_tokens_per_local_expert = torch.from_numpy(self._arrivals)
        return torch.from_numpy(self.counts)

    def token_dispatch(self, tokens: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and their kinds, grouped by receiver, to those, grouped by sender."""
        coming = start_all_to_all(kinds, self.axis, send=self.input_splits, receive=self.output_splits).wait()
        self._kinds = kinds.long(), coming.long()
        return self._exchanged(tokens, back=False), coming

    def token_combine(self, rows: Tensor) -> Tensor:
        """The way back."""
        return self._exchanged(rows, back=True)

    def _exchanged(self, rows: Tensor, *, back: bool) -> Tensor:
        turn = -1 if back else 1
        send, receive = (self.input_splits, self.output_splits)[::turn]
        if not self.fp16:
            return all_to_all(rows, self.axis, send=send, receive=receive)
        sent, received = self._kinds[::turn]
        return compressed_all_to_all(
            rows,
            self.axis,
            send=send,
            receive=receive,
            kind_sent=sent,
            kind_received=received,
            num_kinds=self.num_kinds,
        )

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        """All counts are on the host."""
        return tokens_per_expert


@lru_cache
def _config(num_slots: int, topk: int) -> TransformerConfig:
    """What the dispatcher reads; the sizes of layers it does not."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        num_moe_experts=num_slots,
        moe_router_topk=topk,
        moe_ffn_hidden_size=1,
        moe_router_pre_softmax=True,  # which it demands for one expert; the router is none of Megatron's
        cuda_graph_scope=[],
    )
