"""Layouts of ranks by name, as `janus-matris verify` takes them. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from matris.train_config import ParallelConfig

_FACTOR = re.compile(r"(dp|tp|gp|fsdp|ep)(\d+)(-keep|-home)?")
_SYNTAX = (
    "a layout is made of dp (replicas), tp (tensor), gp (graph), fsdp (sharded parameters; ZeRO-3, or ZeRO-2 with "
    "-keep) and ep (how many of the ranks of dp, fsdp and gp share the experts: in pieces, or whole ones with -home), "
    "each with its number of ranks and joined by x: dp2, tp2xgp2, fsdp2-keepxdp2, ep2xtp2"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes of the rank grid.

    Attributes:
        data, shard, graph, tensor: numbers of ranks.
        expert: how many of the ranks of data, shard and graph share the experts.
        policy: of the sharded parameters.
        placement: of the experts.
    """

    data: int = 1
    shard: int = 1
    graph: int = 1
    tensor: int = 1
    expert: int = 1
    policy: Literal["regather", "keep"] = "regather"
    placement: Literal["sharded", "fixed"] = "sharded"

    @property
    def num_ranks(self) -> int:
        """Of all axes together."""
        return self.data * self.shard * self.graph * self.tensor

    @property
    def name(self) -> str:
        """As `parse_layout` reads it; `one` for a single rank."""
        keep = "-keep" if self.policy == "keep" else ""
        fixed = "-home" if self.placement == "fixed" else ""
        factors = (
            ("dp", self.data if self.data > self._least_data() else 1, ""),
            ("fsdp", self.shard, keep),
            ("gp", self.graph, ""),
            ("tp", self.tensor, ""),
            ("ep", self.expert, fixed),
        )
        return "x".join(f"{axis}{size}{suffix}" for axis, size, suffix in factors if size > 1) or "one"

    def _least_data(self) -> int:
        """Replicas that a name without them has: as many as the experts' ranks need."""
        return self.expert // math.gcd(self.expert, self.shard * self.graph)

    def filled(self, world_size: int) -> Layout | None:
        """With as many replicas as so many ranks allow; None where they do not divide."""
        copies, rest = divmod(world_size, self.num_ranks)
        return None if rest else replace(self, data=self.data * copies)

    def applied(self, parallel: ParallelConfig) -> ParallelConfig:
        """Settings of a run with this layout, otherwise as given."""
        return replace(
            parallel,
            fully_sharded_size=self.shard,
            sharding_policy=self.policy,
            context_parallel_size=self.graph,
            tensor_model_parallel_size=self.tensor,
            expert_model_parallel_size=self.expert,
            expert_placement=self.placement,
        )


def parse_layouts(text: str) -> tuple[Layout, ...]:
    """Layouts separated by commas, in the order given.

    Raises:
        ValueError: what is wrong with which of them, and how layouts are written.
    """
    return tuple(parse_layout(name) for name in text.split(","))


def parse_layout(text: str) -> Layout:
    """One layout, such as `tp2xgp2`.

    Raises:
        ValueError: what is wrong with it, and how layouts are written.
    """
    sizes: dict[str, int] = {}
    suffixes: set[str] = set()
    for factor in text.strip().split("x"):
        match = _FACTOR.fullmatch(factor)
        if match is None:
            raise ValueError(f"layout {text.strip()!r}: {factor!r} is no axis with a number of ranks; {_SYNTAX}")
        axis, size, suffix = match.group(1), int(match.group(2)), match.group(3)
        if axis in sizes:
            raise ValueError(f"layout {text.strip()!r} names {axis} twice; {_SYNTAX}")
        if size < 1:
            raise ValueError(f"layout {text.strip()!r}: {axis}{size} has no rank; sizes are at least 1")
        if suffix is not None and (axis, suffix) not in (("fsdp", "-keep"), ("ep", "-home")):
            raise ValueError(
                f"layout {text.strip()!r}: -keep is about sharded parameters, so it follows fsdp alone; -home about "
                "experts, so it follows ep alone"
            )
        sizes[axis] = size
        suffixes.add(suffix or "")
    layout = Layout(
        shard=sizes.get("fsdp", 1),
        graph=sizes.get("gp", 1),
        tensor=sizes.get("tp", 1),
        expert=sizes.get("ep", 1),
        policy="keep" if "-keep" in suffixes else "regather",
        placement="fixed" if "-home" in suffixes else "sharded",
    )
    data = sizes.get("dp", layout._least_data())
    if data % layout._least_data():
        raise ValueError(
            f"layout {text.strip()!r}: dp{data} x fsdp{layout.shard} x gp{layout.graph} ranks do not divide into runs "
            f"of {layout.expert} that share the experts: choose dp as a multiple of {layout._least_data()}, or none"
        )
    return replace(layout, data=data)
