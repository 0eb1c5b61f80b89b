"""Exchanges of one site of experts in a micro-batch, by formula, from what a plan says or what is expected of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from janus.comm.traffic import SizedAxis, Traffic
from janus.expert_parallel.plan import ExpertPlan


@dataclass(frozen=True, kw_only=True)
class SiteLoad:
    """Of one rank. Numbers of a plan are whole, those of an estimate need not be.

    Attributes:
        sent: copies of its tokens, one for each expert of a token.
        come: copies that it computes.
        stays: those of both that it has itself.
        held: experts that it computes with.
        held_by_all: sum of that over all ranks.
    """

    sent: float
    come: float
    stays: float
    held: float
    held_by_all: float

    @staticmethod
    def of(plan: ExpertPlan, rank: int) -> SiteLoad:
        """What a plan gives a rank. Experts are gathered by all: at least one each."""
        held = np.maximum((plan.slots >= 0).sum(axis=1), 1)
        return SiteLoad(
            sent=int(plan.tokens[rank].sum()),
            come=int((plan.kept + plan.taken)[rank].sum()),
            stays=int(plan.kept[rank].sum()),
            held=int(held[rank]),
            held_by_all=int(held.sum()),
        )


def token_traffic(load: SiteLoad, axis: SizedAxis, *, token_bytes: int) -> Traffic:
    """Tokens to their experts and back, with both adjoints, once in the first two passes and twice in the second
    backward pass; and once a byte for each copy that says its kind.

    Args:
        token_bytes: of one copy, there and back.
    """
    traffic = Traffic()
    traffic.all_to_all(axis, 1, load.sent, wire_bytes=load.sent - load.stays)
    ways, away = load.sent + load.come, load.sent + load.come - 2 * load.stays
    traffic.all_to_all(axis, 8, ways * token_bytes / 4, wire_bytes=away * token_bytes / 4)
    return traffic


def expert_traffic(
    load: SiteLoad, axis: SizedAxis, *, expert_bytes: int, policy: Literal["regather", "keep"]
) -> Traffic:
    """Pieces of the weights of the experts that each rank needs, and of their gradients.

    Args:
        expert_bytes: of one expert.
    """
    traffic, piece = Traffic(), -(-expert_bytes // axis.size)
    gathers = 1 if policy == "keep" else 3
    traffic.all_to_all(axis, gathers, load.held_by_all * piece, wire_bytes=(load.held_by_all - load.held) * piece)
    traffic.all_to_all(axis, 1, axis.size * load.held * piece, wire_bytes=(axis.size - 1) * load.held * piece)
    return traffic
