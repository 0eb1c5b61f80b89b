"""Gathering sharded weights inside of autograd's graph, for any order of derivative, and when they exist.

Gathering is a recorded operation whose adjoint is the reduce-scatter, so every derivative is exact. What decides the
memory is that autograd saves weights for the backward passes. Under `regather`, saved-tensor hooks keep in place of a
weight only where it lies, and gather its unit again when it is needed:

    forward pass      unit by unit; the unit's hooks gather before and free after it
    force pass        (recorded backward) from the last unit to the first; a unit goes when the next one comes
    second backward   first the force pass's nodes, units ascending, then the forward pass's, descending. Both need the
                      weights, so a unit stays from its first use to its last, which is where its gradient is complete

That is 3 gathers per unit and one reduce-scatter, and the next unit is gathered meanwhile in each pass. With P_u the
bytes of unit u and S ranks, P = sum of P_u, the largest live bytes of one rank are

    always                            5 P / S: weights, gradients, two moments, average
    forward and force pass            + P_u + P_(u+1), this unit and the next one
    turning point, second backward    + P gathered weights + P gradients of the force pass's nodes + max P_u, the flat
                                        gradient on its way

Under `keep` gathered weights stay until the update: one gather per unit and update, P always.

All ranks of the shard axis must run the same graph: collectives are matched by their order. The engine runs nodes in
the reverse order of their recording, so equal graphs have equal orders. Only a weight itself is recognised when it is
saved, not a converted copy of it: products convert inside (`janus.ops.product`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef

from janus.comm.collectives import PendingTensor
from janus.ops.recompute import saving
from janus.sharding.unit import Unit

_Saved = tuple[int, torch.Size, tuple[int, ...], int]
"""Unit, shape, stride and offset of a weight."""


class _When(Enum):
    """Why a unit is gathered."""

    forward = auto()
    again = auto()  # a forward pass inside of a backward pass: activation checkpointing
    evicting = auto()  # a backward pass that uses each unit once
    holding = auto()  # the second backward pass


class Passes:
    """The gathered weights of all units, through the passes of a step.

    Args:
        keep: hold gathered weights until `forget`.

    Attributes:
        peak_bytes: largest live bytes of gathered buffers so far; a test may set it to zero.
    """

    def __init__(self, units: Sequence[Unit], *, keep: bool) -> None:
        self.units, self.keep = tuple(units), keep
        self.peak_bytes = 0
        self._index = {unit: index for index, unit in enumerate(self.units)}
        self._resident: dict[int, Tensor] = {}
        self._coming: dict[int, PendingTensor] = {}
        # By the storage object, which its weak reference keeps from being used anew: an address alone would soon be
        # that of an activation, on some ranks only, and their collectives would no longer match.
        self._storages: dict[int, tuple[StorageWeakRef, int, int]] = {}  # with its unit and bytes
        self._leaving: tuple[Unit, PendingTensor] | None = None
        self._arrived: Callable[[Unit], None] | None = None
        self._uses: dict[Unit, int] = {}  # gathers for a forward pass of this run whose gradient has not arrived
        self._training: bool | None = None  # None outside of `run`
        self._callback_is_set = False
        # Gathers of the last run, with and without training, and of this one as long as it does the same.
        self._plans: dict[bool, list[tuple[int, _When]]] = {}
        self._plan: list[tuple[int, _When]] = []
        self._trace: list[tuple[int, _When]] = []
        for unit in self.units:
            unit.module.register_forward_pre_hook(self._before(unit))
            unit.module.register_forward_hook(self._after(unit), always_call=True)

    @property
    def live_bytes(self) -> int:
        """Of gathered buffers that anything still refers to."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(nbytes for _, _, nbytes in self._storages.values())

    @contextmanager
    def run(self, *, training: bool, arrived: Callable[[Unit], None] | None = None) -> Iterator[None]:
        """Around all passes of one micro-batch: what is recorded inside must be differentiated inside.

        With `training`, a backward pass that is not recorded adds to the shards' `.grad` what arrives from its
        reduce-scatters, which run meanwhile; all has arrived at the end.

        Args:
            arrived: is told each unit once its gradient has arrived from all its uses, while that of the next unit is
                on its way. Units that do not take part, or that activation checkpointing gathers anew, are left out.
        """
        self._training, self._callback_is_set = training, False
        self._arrived, self._uses = arrived, {}
        self._plan, self._trace = self._plans.get(training, []), []
        hooks = nullcontext() if self.keep else saving(self._pack, self._unpack)
        try:
            with hooks:
                yield
            self._plans[training] = self._trace
            self._tell(self._arrive())
        except BaseException:
            self._coming.clear()  # without waiting: other ranks may have failed too
            raise
        finally:
            self._training, self._leaving, self._arrived = None, None, None
            self.forget([unit for unit in self.units if unit.changes or not self.keep])

    def forget(self, units: Sequence[Unit] | None = None) -> None:
        """Frees gathered weights of these units, or of all: the next use gathers anew. To be called when shards have
        changed."""
        for unit in self.units if units is None else units:
            index = self._index[unit]
            self._resident.pop(index, None)
            if (pending := self._coming.pop(index, None)) is not None:
                pending.wait()

    # The weights' coming and going -----------------------------------------------------------------------------------

    def buffer(self, unit: Unit, when: _When) -> Tensor:
        """The gathered buffer of a unit; while it is awaited, that of the next unit of this pass starts."""
        index = self._index[unit]
        if index in self._resident:
            return self._resident[index]
        if when is _When.evicting:
            self._resident.clear()
        pending = self._coming.pop(index, None) or self._start(index)
        self._resident[index] = buffer = pending.wait()
        self._trace.append((index, when))
        # The last run's order, as long as this one repeats it: a gather too many would cost more than it hides.
        place = len(self._trace)
        if self._training is not None and self._trace == self._plan[:place] and place < len(self._plan):
            following, then = self._plan[place]
            if then is when and following not in self._resident and following not in self._coming:
                self._coming[following] = self._start(following)
        return buffer

    def _start(self, index: int) -> PendingTensor:
        pending = self.units[index].start_gather()
        reference = StorageWeakRef(pending.result.untyped_storage())
        self._storages[reference.cdata] = (reference, index, pending.result.nbytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return pending

    def _before(self, unit: Unit) -> Any:
        def hook(*_: Any) -> None:
            self._uses[unit] = self._uses.get(unit, 0) + 1
            unit.install(_Gather.apply(unit.shard, unit, self))

        return hook

    def _after(self, unit: Unit) -> Any:
        def hook(*_: Any) -> None:
            unit.remove()
            # Inside of a backward pass, its end or the arrival of the gradient frees the unit.
            if (unit.changes or not self.keep) and torch._C._current_graph_task_id() == -1:
                self._resident.pop(self._index[unit], None)

        return hook

    def _pack(self, saved: Tensor) -> Tensor | _Saved:
        entry = self._storages.get(saved.untyped_storage()._cdata)
        return saved if entry is None else (entry[1], saved.shape, saved.stride(), int(saved.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        index, shape, stride, offset = saved
        self.at_the_end_of_this_pass()
        holds = self._training and not torch.is_grad_enabled()
        buffer = self.buffer(self.units[index], _When.holding if holds else _When.evicting)
        return buffer.as_strided(shape, stride, offset)

    def at_the_end_of_this_pass(self) -> None:
        """Frees all gathered weights when the running backward pass ends."""
        if not self._callback_is_set:
            self._callback_is_set = True
            Variable._execution_engine.queue_callback(self._end_of_pass)

    def _end_of_pass(self) -> None:
        self._callback_is_set = False
        if not self.keep:
            self._resident.clear()

    # The gradients' way ----------------------------------------------------------------------------------------------

    @property
    def adds_gradients(self) -> bool:
        """Whether gradients go to `.grad` directly, while the backward pass goes on."""
        return bool(self._training) and not torch.is_grad_enabled()

    def send(self, unit: Unit, flat: Tensor) -> None:
        """Starts the reduce-scatter of a unit's gradient, after that of the unit before has arrived."""
        before = self._arrive()
        self._leaving = unit, unit.start_scatter(flat)
        self._tell(before)

    def complete(self, unit: Unit) -> None:
        """No node of this backward pass needs the unit's weights any more."""
        if not self.keep:
            self._resident.pop(self._index[unit], None)

    def _arrive(self) -> Unit | None:
        if self._leaving is None:
            return None
        (unit, pending), self._leaving = self._leaving, None
        gradient = pending.wait()
        unit.shard.grad = gradient if unit.shard.grad is None else unit.shard.grad.add_(gradient)
        return unit

    def _tell(self, unit: Unit | None) -> None:
        if unit is None:
            return
        self._uses[unit] -= 1
        if self._uses[unit] == 0 and self._arrived is not None:
            self._arrived(unit)


class _Gather(torch.autograd.Function):
    """A unit's shard to its weights."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, unit: Unit, passes: Passes) -> tuple[Tensor, ...]:
        ctx.unit, ctx.passes = unit, passes
        ctx.set_materialize_grads(False)
        again = torch._C._current_graph_task_id() != -1
        if again:
            passes.at_the_end_of_this_pass()
        weights = unit.weights(passes.buffer(unit, _When.again if again else _When.forward))
        ctx.mark_non_differentiable(*(w for w, slot in zip(weights, unit.slots, strict=True) if not slot.trainable))
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        unit, passes = ctx.unit, ctx.passes
        passes.complete(unit)
        flat = unit.flatten(gradients)
        if passes.adds_gradients:
            passes.send(unit, flat)
            return None, None, None
        return unit.scatter(flat), None, None
