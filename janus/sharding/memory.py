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
            (`janus.sharding.passes`); 0 where nothing is sharded.
    """

    held: int
    gathered: int


def weight_memory(model: nn.Module, units: Sequence[nn.Module], *, shards: int, tensor: int) -> WeightMemory:
    """Of a model on one rank without a mesh, as it would be on many; it may be on the meta device.

    Args:
        units: modules that are gathered as a whole, as for `Weights`; all of their weights count as trainable.
        shards, tensor: sizes of the axes.
    """

    def on_a_rank(parameter: nn.Parameter) -> int:
        return parameter.numel() * parameter.element_size() // (1 if split_of(parameter) is None else tensor)

    inside = {parameter for unit in units for parameter in unit.parameters()} if shards > 1 else set()
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    sizes = [sum(map(on_a_rank, unit.parameters())) for unit in units] if shards > 1 else []
    return WeightMemory(
        held=sum((COPIES if parameter.requires_grad else 1) * on_a_rank(parameter) for parameter in outside)
        + sum(COPIES * -(-size // shards) for size in sizes),
        gathered=2 * sum(sizes) + max(sizes, default=0),
    )
