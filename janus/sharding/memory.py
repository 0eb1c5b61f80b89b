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
        gathered: at most beside that, in a step: where the force pass turns back into the forward pass, the whole
            weights of all units are there with their gradients, and one flat gradient is on its way
            (`janus.sharding.passes`); 0 where nothing is sharded.
        gathered_experts: likewise of sharded experts, of which a rank gathers those that its plan names: counted for a
            plan that gives each rank equally many, and all of them at worst.
        waiting: likewise of weights that are not gathered: their gradients by the force pass's nodes, which wait for
            those by the forward pass's, and one that is on its way. Not where whole blocks are made again, each in a
            pass of its own.
    """

    held: int
    gathered: int
    gathered_experts: int
    waiting: int


@dataclass(frozen=True, kw_only=True)
class WeightSizes:
    """Bytes of weights on one tensor rank, by what the ranks share.

    Attributes:
        everywhere: trainable ones that all ranks have; frozen: likewise, not trained; largest: of one module.
        units: of each module that the shard axis shares; none without that axis.
        experts: of all experts of each site, if an expert axis shares them; num_experts: how many a site has.
    """

    everywhere: int
    frozen: int
    largest: int
    units: tuple[int, ...]
    experts: tuple[int, ...]
    num_experts: tuple[int, ...]

    @staticmethod
    def of(
        model: nn.Module, units: Sequence[nn.Module], *, tensor: int, experts: Sequence[nn.Module] = ()
    ) -> WeightSizes:
        """Of a model on one rank without a mesh; it may be on the meta device.

        Args:
            units, experts: modules as for `Weights`, and none where no such axis is; all of their weights count as
                trainable.
            tensor: size of the axis.
        """

        def on_a_rank(parameter: nn.Parameter) -> int:
            return parameter.numel() * parameter.element_size() // (1 if split_of(parameter) is None else tensor)

        apart = {parameter for module in experts for parameter in module.parameters()}  # with their routers
        shared = [{p for p in unit.parameters() if p not in apart} for unit in units]
        owned = [set(module.parameters(recurse=False)) for module in experts]
        outside = set(model.parameters()).difference(*shared, *owned)
        trained = {parameter for parameter in outside if parameter.requires_grad}
        of_modules = (trained.intersection(module.parameters(recurse=False)) for module in model.modules())
        return WeightSizes(
            everywhere=sum(map(on_a_rank, trained)),
            largest=max(sum(map(on_a_rank, parameters)) for parameters in of_modules),
            frozen=sum(on_a_rank(parameter) for parameter in outside if not parameter.requires_grad),
            units=tuple(sum(map(on_a_rank, parameters)) for parameters in shared),
            experts=tuple(sum(map(on_a_rank, parameters)) for parameters in owned),
            # The weights of all experts of a site lie in one parameter, an expert to a row.
            num_experts=tuple(next(iter(parameters)).shape[0] for parameters in owned),
        )

    def memory(self, *, shards: int, expert_ranks: int, at_home: bool) -> WeightMemory:
        """Of one rank of axes of these sizes."""
        planned = [
            size // count * -(-count // expert_ranks)
            for size, count in zip(self.experts, self.num_experts, strict=True)
            if not at_home
        ]
        owned = [-(-size // expert_ranks) for size in self.experts]
        home = owned if at_home else []
        return WeightMemory(
            held=COPIES * self.everywhere
            + self.frozen
            + sum(COPIES * -(-size // shards) for size in self.units)
            + COPIES * sum(owned),
            gathered=2 * sum(self.units) + max(self.units, default=0),
            gathered_experts=2 * sum(planned) + max(planned, default=0),
            waiting=self.everywhere + sum(home) + max([self.largest, *home]),
        )


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
    sizes = WeightSizes.of(
        model, units if shards > 1 else (), tensor=tensor, experts=experts if expert_ranks > 1 else ()
    )
    return sizes.memory(shards=shards, expert_ranks=expert_ranks, at_home=at_home)
