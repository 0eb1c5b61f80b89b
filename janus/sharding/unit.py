"""The parameters of one module in one flat buffer, of which every rank of the shard axis holds an equal piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from janus.comm.adjoint import reduce_scatter
from janus.comm.collectives import PendingTensor, start_all_gather, start_reduce_scatter
from janus.mesh import Axis
from janus.sharding.logical import Split, split_of

Run = tuple[int, Tensor]
"""Consecutive elements of a flattened tensor: where they begin, and themselves."""

Member = tuple[str, nn.Module, str, nn.Parameter]
"""A parameter: its name in the model, the module that reads it, under which name, and itself."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a parameter lies.

    Attributes:
        name: in the model.
        owner, attribute: the module that reads it, and under which name.
        shape, stride: of the parameter, on one tensor rank.
        start, end: of its elements within the whole flat buffer.
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
        axis: the ranks that share the buffer.
        replicas: the ranks that hold the same piece of it.

    Attributes:
        shard: this rank's piece, padded with zeros; a leaf of the graph.
        pieces: each trainable parameter's slice of the shard, flat and maybe empty: what the optimizer updates.
        changes: whether what is gathered depends on the micro-batch.
    """

    changes = False

    def __init__(self, module: nn.Module, members: Sequence[Member], axis: Axis, replicas: Axis) -> None:
        self.module, self.axis, self.replicas = module, axis, replicas
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
        first = members[0][3]
        self.shard = nn.Parameter(
            first.new_zeros(self.num_held()), requires_grad=any(slot.trainable for slot in self.slots)
        )
        self.fill(self.shard.detach(), {name: parameter.detach() for name, _, _, parameter in members})
        for slot in self.slots:
            del slot.owner._parameters[slot.attribute]
        self.pieces = {
            slot.name: nn.Parameter(self.slice(slot, self.shard.detach())) for slot in self.slots if slot.trainable
        }

    def num_held(self) -> int:
        """Elements of a rank's piece."""
        return -(-self.slots[-1].end // self.axis.size)

    def slice(self, slot: Slot, shard: Tensor) -> Tensor:
        """The elements of a parameter within this rank's piece of the flat buffer; a view, maybe empty."""
        held = self.num_held()
        start = self.axis.rank * held
        first, last = (min(max(place - start, 0), held) for place in (slot.start, slot.end))
        return shard[first:last]

    def part(self, slot: Slot, value: Tensor) -> Tensor:
        """The same elements of the parameter itself, flat."""
        first, last = self._range(slot)
        return value.reshape(-1)[first:last]

    def runs(self, slot: Slot, held: Tensor) -> list[Run]:
        """Where the elements of something like `slice` lie in the parameter."""
        return [(self._range(slot)[0], held)]

    def _range(self, slot: Slot) -> tuple[int, int]:
        """First and last element of the parameter, flat, that this rank has."""
        held = self.num_held()
        start, length = self.axis.rank * held, slot.end - slot.start
        first, last = (min(max(place - slot.start, 0), length) for place in (start, start + held))
        return first, last

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
        return torch.cat([*rows, self.shard.new_zeros(self.num_held() * self.axis.size - self.slots[-1].end)])

    def start_gather(self) -> PendingTensor:
        """Starts to make the buffer that `weights` reads; all ranks of the axis call it."""
        return start_all_gather(self.shard, self.axis)

    def start_scatter(self, flat: Tensor) -> PendingTensor:
        """Starts to make the gradient of the shard from those that all ranks have `flatten`ed."""
        return start_reduce_scatter(flat, self.axis)

    def scatter(self, flat: Tensor) -> Tensor:
        """The same at once and recorded."""
        return reduce_scatter(flat, self.axis)

    def whole(self, shard: Tensor) -> dict[str, Tensor]:
        """The parameters (of one tensor rank) that a tensor like the shard belongs to, in the host's memory."""
        buffer = start_all_gather(shard, self.axis).wait().cpu()
        return {slot.name: buffer[slot.start : slot.end].view(slot.shape).clone() for slot in self.slots}

    def install(self, weights: Sequence[Tensor]) -> None:
        """Gives the module its weights."""
        for slot, weight in zip(self.slots, weights, strict=True):
            slot.owner.__dict__[slot.attribute] = weight

    def remove(self) -> None:
        """Takes them away again."""
        for slot in self.slots:
            slot.owner.__dict__.pop(slot.attribute, None)


def make_units(
    model: nn.Module, modules: Sequence[nn.Module], axis: Axis, replicas: Axis, *, without: Sequence[nn.Module] = ()
) -> list[Unit]:
    """Moves the parameters of each module into units, one per number format, in the order of the modules.

    Args:
        without: modules inside whose parameters stay where they are.

    Raises:
        ValueError: a module is not in the model, or a parameter has two names.
    """
    left = {parameter for module in without for parameter in module.parameters()}
    units = []
    for module in modules:
        by_type: dict[torch.dtype, list[Member]] = {}
        for member in members_of(model, module):
            if member[3] not in left:
                by_type.setdefault(member[3].dtype, []).append(member)
        units += [Unit(module, members, axis, replicas) for members in by_type.values()]
    return units


def members_of(model: nn.Module, module: nn.Module) -> list[Member]:
    """All parameters of a module of the model.

    Raises:
        ValueError: it is not in the model, or a parameter has two names.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    if module not in prefixes:
        raise ValueError(f"a sharded {type(module).__name__} is no module of the model: give modules of the model")
    members: list[Member] = []
    seen: set[nn.Parameter] = set()
    for path, owner in module.named_modules(prefix=prefixes[module]):
        for attribute, parameter in owner._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if parameter in seen:
                raise ValueError(f"parameter {name} has another name as well: shared parameters cannot be sharded")
            seen.add(parameter)
            members.append((name, owner, attribute, parameter))
    return members
