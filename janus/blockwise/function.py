"""A block of a model as one operation with four passes, so that one place decides what it keeps between them.

A training step with forces uses a block y = f(x, w) four times. With g the gradient that arrives at y, and v what the
loss says of the derivative:

    forward            y = f(x, w)
    force              g_x = <g, df/dx>
    second, of force   v_g = the derivative of <v, g_x> for g; the rest of its derivatives waits for the next pass
    second, of forward h_x, h_w = the derivatives of <v, g_x> + <h, y> for x and w, with h what arrives at y

Blocks run in the order 1 ... n, n ... 1, 1 ... n, n ... 1. Both second passes of a block differentiate the same inner
results, so the first leaves its part to the last, which goes through them once.
Derivatives of higher order, and recorded weight gradients, are those of the plain function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from janus.ops.demand import wants_gradient
from janus.ops.recorded import recorded_gradients

Tensors = tuple[Tensor, ...]


class Passes(Protocol):
    """What computes the passes of a block; nothing is recorded while it does.

    Everywhere `x` are the inputs that have gradients, `w` the weights, and `kept` what the forward pass has kept.
    """

    def forward(self, x: Tensors, w: Tensors) -> tuple[Tensors, Tensors]:
        """y, and what to keep until the last pass."""

    def force(self, x: Tensors, w: Tensors, kept: Tensors, g: Tensors) -> tuple[Tensors, Tensors]:
        """g_x, and what to keep until the next pass."""

    def second_of_force(
        self, x: Tensors, w: Tensors, kept: Tensors, kept_by_force: Tensors, g: Tensors, v: Tensors
    ) -> tuple[Tensors, Tensors]:
        """v_g, and what to leave for the last pass."""

    def second_of_forward(
        self, x: Tensors, w: Tensors, kept: Tensors, left: Tensors | None, h: Tensors
    ) -> tuple[Tensors, Tensors]:
        """h_x and h_w; `left` is None where the pass before was not run: <v, g_x> is absent then."""

    def plain(self, x: Tensors, w: Tensors) -> Tensors:
        """f in recorded operations."""


def run_block(passes: Passes, x: Sequence[Tensor], w: Sequence[Tensor]) -> Tensors:
    """y = f(x, w), differentiable any number of times."""
    if not torch.is_grad_enabled():
        return passes.forward(tuple(x), tuple(w))[0]
    *y, _ = _Forward.apply(*x, *w, _Call(passes=passes, num_inputs=len(x), num_weights=len(w)))
    return tuple(y)


@dataclass(kw_only=True)
class _Call:
    """What the passes of one call share.

    Attributes:
        shapes: of y.
        left: by the second passes of force passes, each with the run of autograd's engine that it was in.
    """

    passes: Passes
    num_inputs: int
    num_weights: int
    shapes: tuple[torch.Size, ...] = ()
    left: list[tuple[int, Tensors]] = field(default_factory=list)

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
        """Into x, w and what follows."""
        num_tensors = self.num_inputs + self.num_weights
        x, w, others = tensors[: self.num_inputs], tensors[self.num_inputs : num_tensors], tensors[num_tensors:]
        return tuple(x), tuple(w), tuple(others)

    def plain(self, *tensors: Tensor) -> Tensors:
        """f of x and w."""
        x, w, _ = self.split(tensors)
        return self.passes.plain(x, w)

    def plain_force(self, *tensors: Tensor) -> Tensors:
        """g_x of x, w and g."""
        x, w, g = self.split(tensors)
        return recorded_gradients(self.plain, (*x, *w), g, count=len(x))  # type: ignore[return-value]  # none is None

    def take_left(self) -> list[Tensors]:
        """What the running pass of the engine has left: once, unless a force pass was itself differentiated."""
        found, self.left = self.left, []
        return [left for run, left in found if run == torch._C._current_graph_task_id()]


class _Forward(torch.autograd.Function):
    """Its last output is a ticket without content: the force pass takes it, so that its second pass comes first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        *tensors, call = arguments
        ctx.call = call
        x, w, _ = call.split(tensors)
        y, kept = call.passes.forward(x, w)
        call.shapes = tuple(value.shape for value in y)
        ticket = x[0].new_zeros(())
        ctx.save_for_backward(*tensors, ticket, *kept)
        ctx.set_materialize_grads(False)
        return *y, ticket

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        x, w, (ticket, *kept) = call.split(ctx.saved_tensors)
        g = tuple(
            x[0].new_zeros(shape) if grad is None else grad for grad, shape in zip(grads[:-1], call.shapes, strict=True)
        )
        for_weights = any(wants_gradient(ctx, len(x) + index) for index in range(len(w)))
        without_weights = (None,) * (len(w) + 1)
        if torch.is_grad_enabled():
            if for_weights:
                return *recorded_gradients(call.plain, (*x, *w), g), None
            return *_Force.apply(*x, *w, ticket, *g, *kept, call), *without_weights
        found = call.take_left()
        if not found and not for_weights:
            return *call.passes.force(x, w, tuple(kept), g)[0], *without_weights
        first, *others = found or [None]
        gradients = _flat(call.passes.second_of_forward(x, w, tuple(kept), first, g))
        for left in others:  # all is linear in what arrives
            nothing = tuple(torch.zeros_like(grad) for grad in g)
            more = _flat(call.passes.second_of_forward(x, w, tuple(kept), left, nothing))
            gradients = tuple(one + two for one, two in zip(gradients, more, strict=True))
        return *gradients, None


class _Force(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        *tensors, call = arguments
        ctx.call = call
        x, w, (_, *others) = call.split(tensors)
        g, kept = tuple(others[: len(call.shapes)]), tuple(others[len(call.shapes) :])
        g_x, kept_by_force = call.passes.force(x, w, kept, g)
        ctx.num_kept = len(kept)
        ctx.save_for_backward(*x, *w, *g, *kept, *kept_by_force)
        return g_x

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        x, w, others = call.split(ctx.saved_tensors)
        num_outputs = len(call.shapes)
        g, kept = others[:num_outputs], others[num_outputs : num_outputs + ctx.num_kept]
        for_kept = (None,) * (ctx.num_kept + 1)
        if torch.is_grad_enabled():
            g_x, g_w, g_g = call.split(recorded_gradients(call.plain_force, (*x, *w, *g), v))
            return *g_x, *g_w, None, *g_g, *for_kept
        v_g, left = call.passes.second_of_force(x, w, kept, others[num_outputs + ctx.num_kept :], g, v)
        call.left.append((torch._C._current_graph_task_id(), left))
        return *(None,) * (len(x) + len(w) + 1), *v_g, *for_kept


def _flat(groups: tuple[Tensors, Tensors]) -> Tensors:
    return *groups[0], *groups[1]
