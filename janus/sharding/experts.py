"""Experts of which every rank of the expert axis holds an equal piece, and of which each gathers those that it needs.

With W ranks, a rank holds 1/W of every expert. A plan says for each micro-batch which experts every rank needs; each
rank sends its pieces of them, in one all-to-all. The adjoint sends the pieces of the gradients back to where they came
from, where they are added up. So to replicate an expert, or to move it, costs no more than to use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from janus.comm.adjoint import all_to_all
from janus.comm.collectives import PendingTensor, start_all_gather, start_all_to_all
from janus.expert_parallel.plan import ExpertPlan
from janus.mesh import Axis
from janus.sharding.unit import Member, Run, Slot, Unit


class ExpertUnit(Unit):
    """Parameters (experts, ...) of one module. Gathered they are those of some experts alone, in ascending order.

    The shard is one block after the other, (experts, piece) for each parameter: an expert's elements are flat, padded
    with zeros, and cut into a piece for each rank. On its way an expert is a row of its pieces of all parameters.

    Args:
        module: its `plan`, an `ExpertPlan`, says what is gathered. It must be set before the forward pass, alike on all
            ranks, and stay until the last backward pass has ended.
    """

    changes = True

    def __init__(self, module: nn.Module, members: Sequence[Member], axis: Axis, replicas: Axis) -> None:
        types = {parameter.dtype for _, _, _, parameter in members}
        if len(types) > 1:
            raise ValueError(f"experts of {type(module).__name__} have several number formats, {types}: choose one")
        super().__init__(module, members, axis, replicas)

    # What this rank holds --------------------------------------------------------------------------------------------

    def num_held(self) -> int:
        return sum(slot.shape[0] * self._piece(slot) for slot in self.slots)

    def slice(self, slot: Slot, shard: Tensor) -> Tensor:
        start = sum(other.shape[0] * self._piece(other) for other in self.slots[: self.slots.index(slot)])
        return shard[start : start + slot.shape[0] * self._piece(slot)]

    def part(self, slot: Slot, value: Tensor) -> Tensor:
        return self._cut(slot, value)[self.axis.rank].reshape(-1)

    def runs(self, slot: Slot, held: Tensor) -> list[Run]:
        """One for each expert, without the padding."""
        size, piece = slot.shape[1:].numel(), self._piece(slot)
        first = min(self.axis.rank * piece, size)
        count = min(piece, size - first)
        return [(expert * size + first, row[:count]) for expert, row in enumerate(held.view(slot.shape[0], piece))]

    def whole(self, shard: Tensor) -> dict[str, Tensor]:
        shards = start_all_gather(shard, self.axis).wait().cpu().view(self.axis.size, -1)
        found = {}
        for slot in self.slots:
            pieces = torch.stack([self.slice(slot, part).view(slot.shape[0], -1) for part in shards])
            found[slot.name] = self._joined(slot, pieces).reshape(slot.shape).clone()
        return found

    # What it gathers -------------------------------------------------------------------------------------------------

    def weights(self, buffer: Tensor) -> list[Tensor]:
        found, start, storage = [], 0, buffer.untyped_storage()
        for slot in self.slots:
            shape = torch.Size((len(self._needed(self.axis.rank)), *slot.shape[1:]))
            found.append(buffer.new_empty(0).set_(storage, start, shape, slot.stride))
            start += shape.numel()
        return found

    def flatten(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Rows for each rank in turn: its pieces of the gradients of the experts that this one has gathered."""
        needed = len(self._needed(self.axis.rank))
        return torch.cat(
            [
                self.shard.new_zeros(self.axis.size, needed, self._piece(slot))
                if gradient is None
                else self._cut(slot, gradient)
                for slot, gradient in zip(self.slots, gradients, strict=True)
            ],
            dim=2,
        ).flatten(0, 1)

    def start_gather(self) -> PendingTensor:
        needed, everyone = self._needed(self.axis.rank), self._needed_by_all()
        blocks = [self.slice(slot, self.shard.detach()).view(slot.shape[0], -1) for slot in self.slots]
        rows = torch.cat([block.index_select(0, self._index(everyone)) for block in blocks], dim=1)
        pending = start_all_to_all(
            rows, self.axis, send=[len(each) for each in everyone], receive=self.axis.size * [len(needed)]
        )
        size = sum(len(needed) * slot.shape[1:].numel() for slot in self.slots)
        return _GatheredExperts(
            result=self.shard.new_empty(size), work=pending, source=None, unit=self, needed=len(needed)
        )

    def start_scatter(self, flat: Tensor) -> PendingTensor:
        everyone = self._needed_by_all()
        pending = start_all_to_all(flat, self.axis, **self._back(everyone))
        return _SummedExperts(
            result=torch.zeros_like(self.shard), work=pending, source=None, unit=self, index=self._index(everyone)
        )

    def scatter(self, flat: Tensor) -> Tensor:
        everyone = self._needed_by_all()
        rows = all_to_all(flat, self.axis, **self._back(everyone))
        return self.summed(rows, self._index(everyone), torch.zeros_like(self.shard))

    def summed(self, rows: Tensor, index: Tensor, shard: Tensor) -> Tensor:
        """`shard` with rows of pieces added to the experts `index` that they belong to."""
        parts = rows.split([self._piece(slot) for slot in self.slots], dim=1)
        blocks = [self.slice(slot, shard).view(slot.shape[0], -1) for slot in self.slots]
        added = [block.index_add(0, index, part) for block, part in zip(blocks, parts, strict=True)]
        return torch.cat([block.flatten() for block in added])

    def arrange(self, rows: Tensor, needed: int, buffer: Tensor) -> None:
        """Fills a buffer of gathered weights with the rows of all ranks."""
        pieces = rows.view(self.axis.size, needed, -1).split([self._piece(slot) for slot in self.slots], dim=2)
        for slot, weight, piece in zip(self.slots, self.weights(buffer), pieces, strict=True):
            weight.flatten(1).copy_(self._joined(slot, piece))

    # Pieces of experts -----------------------------------------------------------------------------------------------

    def _piece(self, slot: Slot) -> int:
        """Elements of a rank's piece of one expert."""
        return -(-slot.shape[1:].numel() // self.axis.size)

    def _cut(self, slot: Slot, value: Tensor) -> Tensor:
        """(experts, ...) to (W, experts, piece)."""
        flat = value.flatten(1)
        padding = self._piece(slot) * self.axis.size - flat.shape[1]
        return functional.pad(flat, (0, padding)).view(len(flat), self.axis.size, -1).transpose(0, 1)

    def _joined(self, slot: Slot, pieces: Tensor) -> Tensor:
        """(W, experts, piece) to (experts, elements)."""
        return pieces.transpose(0, 1).flatten(1)[:, : slot.shape[1:].numel()]

    def _needed(self, rank: int) -> np.ndarray:
        """Experts that a rank gathers. At least one, so that all ranks record the same graph and meet in it."""
        experts = cast(ExpertPlan, self.module.plan).slots[rank]
        return np.maximum(experts[: max(1, int((experts >= 0).sum()))], 0)

    def _needed_by_all(self) -> list[np.ndarray]:
        return [self._needed(rank) for rank in range(self.axis.size)]

    def _back(self, everyone: Sequence[np.ndarray]) -> dict[str, list[int]]:
        """Splits of the exchange that is adjoint to gathering."""
        own = len(everyone[self.axis.rank])
        return {"send": self.axis.size * [own], "receive": [len(each) for each in everyone]}

    def _index(self, everyone: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(everyone)).to(self.shard.device)


@dataclass(kw_only=True)
class _GatheredExperts(PendingTensor):
    """Weights whose pieces are on their way."""

    unit: ExpertUnit
    needed: int

    def wait(self) -> Tensor:
        self.unit.arrange(self.work.wait(), self.needed, self.result)
        self.work = None
        return self.result


@dataclass(kw_only=True)
class _SummedExperts(PendingTensor):
    """A shard's gradient whose rows are on their way."""

    unit: ExpertUnit
    index: Tensor

    def wait(self) -> Tensor:
        gradient = self.unit.summed(self.work.wait(), self.index, self.result)
        self.work = None
        return gradient
