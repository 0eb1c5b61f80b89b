"""Layouts of ranks by name, as `janus-matris verify` takes them. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from matris.train_config import ParallelConfig

_FACTOR = re.compile(r"(dp|tp|gp|fsdp)(\d+)(-keep)?")
_SYNTAX = (
    "a layout is made of dp (replicas), tp (tensor), gp (graph) and fsdp (sharded parameters; ZeRO-3, or ZeRO-2 with "
    "-keep), each with its number of ranks and joined by x: dp2, tp2xgp2, fsdp2-keepxdp2"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes of the rank grid.

    Attributes:
        data, shard, graph, tensor: numbers of ranks.
        policy: of the sharded parameters.
    """

    data: int = 1
    shard: int = 1
    graph: int = 1
    tensor: int = 1
    policy: Literal["regather", "keep"] = "regather"

    @property
    def num_ranks(self) -> int:
        """Of all axes together."""
        return self.data * self.shard * self.graph * self.tensor

    @property
    def name(self) -> str:
        """As `parse_layout` reads it; `one` for a single rank."""
        keep = "-keep" if self.policy == "keep" else ""
        factors = (("dp", self.data, ""), ("fsdp", self.shard, keep), ("gp", self.graph, ""), ("tp", self.tensor, ""))
        return "x".join(f"{axis}{size}{suffix}" for axis, size, suffix in factors if size > 1) or "one"

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
    policy: Literal["regather", "keep"] = "regather"
    for factor in text.strip().split("x"):
        match = _FACTOR.fullmatch(factor)
        if match is None:
            raise ValueError(f"layout {text.strip()!r}: {factor!r} is no axis with a number of ranks; {_SYNTAX}")
        axis, size, keep = match.group(1), int(match.group(2)), match.group(3)
        if axis in sizes:
            raise ValueError(f"layout {text.strip()!r} names {axis} twice; {_SYNTAX}")
        if size < 1:
            raise ValueError(f"layout {text.strip()!r}: {axis}{size} has no rank; sizes are at least 1")
        if keep and axis != "fsdp":
            raise ValueError(f"layout {text.strip()!r}: -keep is about sharded parameters, so it follows fsdp alone")
        sizes[axis] = size
        policy = "keep" if keep else policy
    return Layout(
        data=sizes.get("dp", 1),
        shard=sizes.get("fsdp", 1),
        graph=sizes.get("gp", 1),
        tensor=sizes.get("tp", 1),
        policy=policy,
    )
