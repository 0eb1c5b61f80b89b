"""A model's weights as its ranks hold them, and the logical tensors, which depend on no layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from janus.checkpoint.shards import Shards
from janus.comm.adjoint import all_reduced
from janus.comm.collectives import broadcast_tensors, sum_gradients
from janus.mesh import Mesh
from janus.optim import gradient_norm, sum_of_squares
from janus.sharding.experts import ExpertUnit
from janus.sharding.logical import pieces_of, split_of, whole_shape, wholes_of
from janus.sharding.passes import Passes
from janus.sharding.unit import Run, Unit, make_units, members_of

Policy = Literal["regather", "keep"]

_SLICE = 1 << 18
"""Elements: a tensor that several ranks hold is saved in slices of at least so many."""


class Weights:
    """The parameters of a model, of which each rank may hold a part.

    Over the tensor axis parameters with Megatron's attributes are split, all others equal. Over the shard axis, if it
    has several ranks, the parameters of the modules `units` are flat buffers that are cut into equal pieces; they leave
    the modules, and come back while these compute. Over the expert axis, if it has several ranks, those of `experts`
    either are split already, whole experts to a rank, or every expert is cut into pieces in the same way. Nothing
    changes on one rank.

    Args:
        model: on its device, with its final choice of what is trainable.
        mesh: the ranks.
        units: modules in order of use, each gathered as a whole. None: the whole model is one.
        experts: modules inside of those, in order of use, whose own parameters have a first dimension of experts. What
            they hold besides, such as a router, all ranks of an expert axis have whole.
        policy: see `janus.sharding.passes`.

    Attributes:
        pieces: what this rank updates, by name: a trainable parameter, or its slice in this rank's shard, flat and
            maybe empty. All ranks have the same names.
        leaves: what a backward pass must add gradients to.
        groups: the same, grouped by what may be updated at once: parameters that no unit holds, then each unit's.
        ndims: dimensions of each parameter in `pieces`, whole.
        shapes: of the logical state dict, by name.
        num_parameters: of the logical model, frozen ones included.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        units: Sequence[nn.Module] | None = None,
        experts: Sequence[nn.Module] = (),
        policy: Policy = "regather",
    ) -> None:
        self.model = model
        self.mesh = mesh
        parameters = dict(model.named_parameters())
        self._splits = {name: split_of(parameter) for name, parameter in parameters.items()}
        self.ndims = {name: parameter.ndim for name, parameter in parameters.items() if parameter.requires_grad}
        self.shapes = {
            name: whole_shape(value.shape, self._splits.get(name), mesh) for name, value in model.state_dict().items()
        }
        self.num_parameters = sum(self.shapes[name].numel() for name in parameters)
        experts = experts if mesh.expert.size > 1 else ()
        self._units: list[Unit] = []
        if mesh.shard.size > 1:
            modules = [model] if units is None else units
            self._units += make_units(model, modules, mesh.shard, mesh.shard_replicas, without=experts)
        for module in experts:
            own = [member for member in members_of(model, module) if member[1] is module]
            if not any(self._is_at_home(member[0]) for member in own):
                self._units.append(ExpertUnit(module, own, mesh.expert, mesh.expert_replicas))
        if self._units or experts:
            model.__dict__["sharded_state_dict"] = _refuse_sharded_state_dict
        self._passes = Passes(self._units, keep=policy == "keep") if self._units else None
        held = dict(model.named_parameters())
        for unit in self._units:
            held |= unit.pieces
        self._places = {slot.name: (unit, slot) for unit in self._units for slot in unit.slots}
        self._part_shapes = {name: value.shape for name, value in model.state_dict().items()}
        self._summed: set[Unit] = set()
        self.pieces = {name: held[name] for name in self.ndims}
        inside = {name for unit in self._units for name in unit.pieces}
        outside = {name: piece for name, piece in self.pieces.items() if name not in inside}
        self._everywhere = [piece for name, piece in outside.items() if not self._is_at_home(name)]
        self._at_home = [piece for name, piece in outside.items() if self._is_at_home(name)]
        self.groups = [group for group in (outside, *(unit.pieces for unit in self._units)) if group]
        self.leaves = [*outside.values(), *(unit.shard for unit in self._units if unit.shard.requires_grad)]

    @property
    def passes(self) -> Passes | None:
        """Where gathered weights live; None if nothing is sharded."""
        return self._passes

    @property
    def has_replicas(self) -> bool:
        """Whether other ranks hold the same piece of some unit."""
        return any(unit.replicas.size > 1 for unit in self._units)

    def _is_at_home(self, name: str) -> bool:
        """Whether a parameter is that of whole experts, which other ranks of the expert axis do not have."""
        split = self._splits.get(name)
        return split is not None and split.expert

    def run(
        self, *, training: bool, complete: Callable[[Mapping[str, nn.Parameter]], None] | None = None
    ) -> AbstractContextManager[None]:
        """Around forward pass, force pass and second backward pass of a micro-batch, see `Passes.run`. All ranks of the
        axes shard and expert must run the same number of micro-batches.

        Args:
            complete: for the last micro-batch: is given each of `groups` that a unit holds as soon as its gradient is
                that of the global batch, while the backward pass goes on. It may change the pieces. Not with
                `has_replicas`, which may run other numbers of micro-batches.
        """
        if self._passes is None:
            return nullcontext()

        assert complete is None or not self.has_replicas

        def arrived(unit: Unit) -> None:
            assert complete is not None
            if unit.pieces:
                self._give_gradients(unit)
                self._summed.add(unit)
                complete(unit.pieces)

        return self._passes.run(training=training, arrived=None if complete is None else arrived)

    def changed(self) -> None:
        """Frees gathered weights. To be called whenever the weights were changed."""
        if self._passes is not None:
            self._passes.forget()

    # Gradients -------------------------------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Forgets all gradients."""
        self._summed.clear()
        for parameter in (*self.leaves, *self.pieces.values()):
            parameter.grad = None

    def sum_gradients(self) -> None:
        """From the gradients of this rank's micro-batches to those of the global batch, for all pieces.

        Parameters that every rank has are summed over all replicas, whole experts over the ranks that have the same.
        Shards have arrived summed over their axis, and are summed over the ranks that hold the same piece, unit by
        unit, unless `run` has done with them.
        """
        sum_gradients(self._everywhere, self.mesh.replicas)
        sum_gradients(self._at_home, self.mesh.expert_replicas)
        for unit in self._units:
            if unit.shard.requires_grad and unit not in self._summed:
                self._give_gradients(unit)

    def _give_gradients(self, unit: Unit) -> None:
        """Sums the gradient of a shard over its replicas, and gives each piece its slice."""
        if unit.shard.grad is None:  # on all ranks: this loss does not depend on the unit
            unit.shard.grad = torch.zeros_like(unit.shard)
        if unit.replicas.size > 1:
            unit.shard.grad.copy_(all_reduced(unit.shard.grad, unit.replicas))
        for slot in unit.slots:
            if slot.trainable:
                unit.pieces[slot.name].grad = unit.slice(slot, unit.shard.grad)

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradient of the global batch, float64, the same on all ranks.

        Every part counts once: pieces are summed over the axis that shares them, split parameters over the tensor axis.
        """
        shard, tensor, expert = self.mesh.shard, self.mesh.tensor, self.mesh.expert
        if shard.size == tensor.size == expert.size == 1:
            return gradient_norm(self.pieces.values())
        axis_of = {name: unit.axis for unit in self._units for name in unit.pieces}
        # Of all ranks', shards', experts' weights: those that tensor ranks split, and those that all of them have.
        gradients: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], []), ([], [])]
        for name, piece in self.pieces.items():
            assert piece.grad is not None
            kind = 2 if self._is_at_home(name) or axis_of.get(name) is expert else int(name in axis_of)
            gradients[kind][self._splits[name] is None].append(piece.grad)
        squares = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        for kind, (split, common) in enumerate(gradients):
            # What all ranks have counts a part for each, so that all get the same bits.
            for tensors, copies in ((split, 1), (common, tensor.size)):
                if tensors:
                    squares[kind] += sum_of_squares(tensors) / copies
        squares = all_reduced(squares, tensor)
        return (all_reduced(squares[0] / shard.size + squares[1], shard) + all_reduced(squares[2], expert)).sqrt()

    # Logical tensors -------------------------------------------------------------------------------------------------

    def gather(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logical tensors of something that belongs to each of `pieces` (values, gradients, averages, moments), on all
        ranks: the tensors themselves where nothing is split, else copies in the host's memory. All ranks call it."""
        found = dict(pieces)
        for unit in self._units:
            if not unit.pieces:
                continue
            flat = torch.zeros_like(unit.shard)
            for slot in unit.slots:
                if slot.trainable:
                    unit.slice(slot, flat).copy_(pieces[slot.name].reshape(-1))
            found |= {name: value for name, value in unit.whole(flat).items() if name in pieces}
        return wholes_of({name: found[name] for name in pieces}, self._splits, self.mesh)

    def state(self) -> dict[str, Tensor]:
        """The logical state dict of the model, on all ranks, as `gather` gives it. All ranks call it."""
        found: dict[str, Tensor] = dict(self.model.state_dict())
        for unit in self._units:
            found |= unit.whole(unit.shard.detach())
        return wholes_of({name: found[name] for name in self.shapes}, self._splits, self.mesh)

    # Logical tensors in pieces: nothing is sent ----------------------------------------------------------------------

    def held_state(self) -> dict[str, Tensor]:
        """What this rank holds of each entry of the logical state dict; views."""
        found: dict[str, Tensor] = {name: value.detach() for name, value in self.model.state_dict().items()}
        for unit in self._units:
            found |= {slot.name: unit.slice(slot, unit.shard.detach()) for slot in unit.slots}
        return {name: found[name] for name in self.shapes}

    def held_shards(self, held: Mapping[str, Tensor]) -> dict[str, Shards]:
        """Where something like `held_state` or like `pieces` (averages, moments) lies in the logical tensors.

        Args:
            held: name -> tensor of this rank; the blocks are views of it.
        """
        return {name: self._shards(name, self._runs(name, value)) for name, value in held.items()}

    def own_shards(self, held: Mapping[str, Tensor]) -> dict[str, Shards]:
        """The same without what other ranks hold as well, shared out evenly: each element is on one rank alone.

        Args:
            held: the same names on all ranks, in the same order.
        """
        return {
            name: self._shards(name, self._share(name, index, self._runs(name, value)))
            for index, (name, value) in enumerate(held.items())
        }

    def _shards(self, name: str, runs: Sequence[Run]) -> Shards:
        place, split = self._places.get(name), self._splits.get(name)
        shape = self._part_shapes[name] if place is None else place[1].shape
        pieces = [piece for first, values in runs for piece in pieces_of(shape, first, values, split, self.mesh)]
        return Shards(shape=self.shapes[name], pieces=tuple(pieces))

    def _runs(self, name: str, held: Tensor) -> list[Run]:
        """Consecutive elements of this rank's part of a parameter."""
        place = self._places.get(name)
        return [(0, held.view(-1))] if place is None else place[0].runs(place[1], held)

    def _share(self, name: str, index: int, runs: Sequence[Run]) -> list[Run]:
        """What this rank stands for, of runs that several ranks hold alike: one of equal slices, none of them small."""
        place, split = self._places.get(name), self._splits.get(name)
        if place is not None:
            copies = place[0].replicas
        else:
            copies = self.mesh.expert_replicas if self._is_at_home(name) else self.mesh.replicas
        rank, size = copies.rank, copies.size
        if split is None:  # all tensor ranks have it, too
            rank, size = rank * self.mesh.tensor.size + self.mesh.tensor.rank, size * self.mesh.tensor.size
        total = sum(len(values) for _, values in runs)
        slices = min(size, max(1, total // _SLICE))
        # Small tensors fall to one rank after the other.
        number = (rank - index) % size
        if number >= slices:
            return []
        lower, upper = total * number // slices, total * (number + 1) // slices
        found, position = [], 0
        for first, values in runs:
            begin, end = max(lower - position, 0), min(upper - position, len(values))
            if begin < end:
                found.append((first + begin, values[begin:end]))
            position += len(values)
        return found

    def broadcast(self) -> None:
        """Gives all ranks that hold the same weights those of the first of them."""
        state = self.model.state_dict()
        broadcast_tensors([value for name, value in state.items() if self._splits.get(name) is None], self.mesh.tensor)
        home = {name: value for name, value in state.items() if name in self._splits and self._is_at_home(name)}
        broadcast_tensors([value for name, value in state.items() if name not in home], self.mesh.replicas)
        broadcast_tensors(home.values(), self.mesh.expert_replicas)
        for unit in self._units:
            slices = [unit.slice(slot, unit.shard.detach()) for slot in unit.slots if slot.split is None]
            broadcast_tensors(slices, self.mesh.tensor)
            broadcast_tensors([unit.shard], unit.replicas)
        self.changed()


def _refuse_sharded_state_dict(*_: Any, **__: Any) -> NoReturn:
    """In place of Megatron's method, which would find only what is left in the modules."""
    raise RuntimeError(
        "sharded_state_dict of a model whose weights are sharded: its modules hold them only while they compute. Take "
        "`Weights.state` or a checkpoint, which hold whole tensors, or ask before the weights are sharded"
    )
