"""The parameters of one module in one flat buffer, of which every rank of the shard axis holds an equal piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from janus.mesh import Axis
from janus.sharding.logical import Split, split_of


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a parameter lies.

    Attributes:
        name: in the model.
        owner, attribute: the module that reads it, and under which name.
        shape, stride: of the parameter, on one tensor rank.
        start, end: of its elements within the flat buffer.
        trainable: whether it has a gradient.
        split: over the tensor axis.
    """

    name: str
    owner: nn.Module
    attribute: str
    shape: torch.Size
    stride: tuple[int, ...]
    start: int
    end: int
    trainable: bool
    split: Split | None


class Unit:
    """Flat parameters of one number format of one module. They leave the module, whose code reads plain attributes that
    are there while its forward pass runs.

    Args:
        members: name in the model, owner, attribute and parameter.
        axis: the shard axis.

    Attributes:
        shard: this rank's piece, padded with zeros; a leaf of the graph.
        numel: elements of the gathered buffer, padding included.
    """

    def __init__(self, module: nn.Module, members: Sequence[tuple[str, nn.Module, str, nn.Parameter]], axis: Axis):
        self.module, self.axis = module, axis
        slots, start = [], 0
        for name, owner, attribute, parameter in members:
            end = start + parameter.numel()
            slots.append(
                Slot(
                    name=name,
                    owner=owner,
                    attribute=attribute,
                    shape=parameter.shape,
                    stride=torch.empty(parameter.shape, device="meta").stride(),
                    start=start,
                    end=end,
                    trainable=parameter.requires_grad,
                    split=split_of(parameter),
                )
            )
            start = end
        self.slots = tuple(slots)
        self.shard_size = -(-start // axis.size)
        self.numel = self.shard_size * axis.size
        first = members[0][3]
        self.shard = nn.Parameter(
            first.new_zeros(self.shard_size), requires_grad=any(slot.trainable for slot in self.slots)
        )
        self.fill(self.shard.detach(), {name: parameter.detach() for name, _, _, parameter in members})
        for slot in self.slots:
            del slot.owner._parameters[slot.attribute]
        # The optimizer sees each parameter's slice of the shard as a parameter, of which some are empty.
        self.pieces = {
            slot.name: nn.Parameter(self.slice(slot, self.shard.detach())) for slot in self.slots if slot.trainable
        }

    @property
    def nbytes(self) -> int:
        """Of the gathered buffer."""
        return self.numel * self.shard.element_size()

    def slice(self, slot: Slot, shard: Tensor) -> Tensor:
        """The elements of a parameter within this rank's piece of the flat buffer; a view, maybe empty."""
        start = self.axis.rank * self.shard_size
        first, last = (min(max(place - start, 0), self.shard_size) for place in (slot.start, slot.end))
        return shard[first:last]

    def part(self, slot: Slot, value: Tensor) -> Tensor:
        """The same elements of the parameter itself."""
        start = self.axis.rank * self.shard_size
        length = slot.end - slot.start
        first, last = (min(max(place - slot.start, 0), length) for place in (start, start + self.shard_size))
        return value.reshape(-1)[first:last]

    def fill(self, shard: Tensor, values: Mapping[str, Tensor]) -> None:
        """Copies this rank's piece of each parameter into `shard`."""
        for slot in self.slots:
            self.slice(slot, shard).copy_(self.part(slot, values[slot.name]))

    def weights(self, buffer: Tensor) -> list[Tensor]:
        """The parameters within a gathered buffer: the same storage, but no views for autograd, whose version counters
        would tie the weights of a buffer together."""
        storage = buffer.untyped_storage()
        return [buffer.new_empty(0).set_(storage, slot.start, slot.shape, slot.stride) for slot in self.slots]

    def flatten(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of `weights` as one flat buffer; zero where there is none. Recorded if gradients are."""
        rows = [
            self.shard.new_zeros(slot.end - slot.start) if gradient is None else gradient.reshape(-1)
            for slot, gradient in zip(self.slots, gradients, strict=True)
        ]
        return torch.cat([*rows, self.shard.new_zeros(self.numel - self.slots[-1].end)])

    def install(self, weights: Sequence[Tensor]) -> None:
        """Gives the module its weights."""
        for slot, weight in zip(self.slots, weights, strict=True):
            slot.owner.__dict__[slot.attribute] = weight

    def remove(self) -> None:
        """Takes them away again."""
        for slot in self.slots:
            slot.owner.__dict__.pop(slot.attribute, None)


def make_units(model: nn.Module, modules: Sequence[nn.Module], axis: Axis) -> list[Unit]:
    """Moves the parameters of each module into units, one per number format, in the order of the modules.

    Raises:
        ValueError: a module is not in the model, or a parameter has two names.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    units = []
    for module in modules:
        if module not in prefixes:
            raise ValueError(f"a sharded {type(module).__name__} is no module of the model: give modules of the model")
        by_type: dict[torch.dtype, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
        seen: set[nn.Parameter] = set()
        for path, owner in module.named_modules(prefix=prefixes[module]):
            for attribute, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                name = f"{path}.{attribute}" if path else attribute
                if parameter in seen:
                    raise ValueError(f"parameter {name} has another name as well: shared parameters cannot be sharded")
                seen.add(parameter)
                by_type.setdefault(parameter.dtype, []).append((name, owner, attribute, parameter))
        units += [Unit(module, members, axis) for members in by_type.values()]
    return units
