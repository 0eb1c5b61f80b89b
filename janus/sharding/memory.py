"""Bytes that the weights of a model cost one rank in training, counted from their shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from janus.sharding.logical import split_of

COPIES = 5
"""Tensors of the size of the weights: weights, gradients, two moments of the optimizer, moving average."""


@dataclass(frozen=True, kw_only=True)
class WeightMemory:
    """Bytes on one rank. Activations, which depend on the batch, come on top.

    Attributes:
        held: all the time.
        gathered: at most beside that, in a step: whole weights, their gradients, and one flat gradient on its way
            (`janus.sharding.passes`); 0 where nothing is sharded. Of sharded experts a rank gathers those that its
            plans name; counted as if these were all.
    """

    held: int
    gathered: int


def weight_memory(
    model: nn.Module,
    units: Sequence[nn.Module],
    *,
    shards: int,
    tensor: int,
    experts: Sequence[nn.Module] = (),
    expert_ranks: int = 1,
    at_home: bool = False,
) -> WeightMemory:
    """Of a model on one rank without a mesh, as it would be on many; it may be on the meta device.

    Args:
        units, experts: modules as for `Weights`; all of their weights count as trainable.
        shards, tensor, expert_ranks: sizes of the axes.
        at_home: whether whole experts are on home ranks.
    """
    experts = experts if expert_ranks > 1 else ()

    def on_a_rank(parameter: nn.Parameter) -> int:
        return parameter.numel() * parameter.element_size() // (1 if split_of(parameter) is None else tensor)

    apart = {parameter for module in experts for parameter in module.parameters()}  # with their routers
    shared = [{p for p in unit.parameters() if p not in apart} for unit in units] if shards > 1 else []
    owned = [set(module.parameters(recurse=False)) for module in experts]
    outside = set(model.parameters()).difference(*shared, *owned)
    sizes = [sum(map(on_a_rank, parameters)) for parameters in shared]
    of_experts = [sum(map(on_a_rank, parameters)) for parameters in owned]
    gathered = sizes if at_home else sizes + of_experts
    return WeightMemory(
        held=sum((COPIES if parameter.requires_grad else 1) * on_a_rank(parameter) for parameter in outside)
        + sum(COPIES * -(-size // shards) for size in sizes)
        + sum(COPIES * -(-size // expert_ranks) for size in of_experts),
        gathered=2 * sum(gathered) + max(gathered, default=0),
    )
