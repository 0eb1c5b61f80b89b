"""Full recomputation: of a block nothing is kept but its inputs, and what arrives at it in each backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from janus.blockwise.function import Tensors
from janus.ops.recompute import recomputing


@dataclass(frozen=True, kw_only=True)
class MadeAgain:
    """The passes of a block, each of which makes all inner results again.

    In forward passes of matrix products, the four passes cost 1, 2, 3 and 6 in place of 1, 1, 2 and 2.

    Attributes:
        function: f, in recorded operations; as often as it is called, the collectives inside run again.
        recompute_bytes: as `janus.ops.recompute.recomputing` has it, for what a single pass holds meanwhile.
    """

    function: Callable[[Tensors, Tensors], Tensors]
    recompute_bytes: int | None

    def plain(self, x: Tensors, w: Tensors) -> Tensors:
        return self.function(x, w)

    def forward(self, x: Tensors, w: Tensors) -> tuple[Tensors, Tensors]:
        with torch.no_grad():
            return self.function(x, w), ()

    def force(self, x: Tensors, w: Tensors, kept: Tensors, g: Tensors) -> tuple[Tensors, Tensors]:
        with self._recording():
            inputs = _leaves(x)
            return _gradients(self.function(inputs, w), inputs, g), ()

    def second_of_force(
        self, x: Tensors, w: Tensors, kept: Tensors, kept_by_force: Tensors, g: Tensors, v: Tensors
    ) -> tuple[Tensors, Tensors]:
        with self._recording():
            inputs, arriving = _leaves(x), _leaves(g)
            forces = _gradients(self.function(inputs, w), inputs, arriving, create_graph=True)
            return _gradients(forces, arriving, v), (*g, *v)

    def second_of_forward(
        self, x: Tensors, w: Tensors, kept: Tensors, left: Tensors | None, h: Tensors
    ) -> tuple[Tensors, Tensors]:
        with self._recording():
            inputs, weights = _leaves(x), _leaves(w)
            outputs, arriving = self.function(inputs, weights), h
            if left is not None:
                g, v = left[: len(h)], left[len(h) :]
                outputs = (*outputs, *_gradients(outputs, inputs, g, create_graph=True))
                arriving = (*h, *v)
            found = _gradients(outputs, (*inputs, *weights), arriving)
        return found[: len(x)], found[len(x) :]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with torch.enable_grad(), recomputing(self.recompute_bytes):
            yield


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def _gradients(outputs: Tensors, inputs: Tensors, grads: Tensors, *, create_graph: bool = False) -> Tensors:
    # An output that depends on no input has no graph, and contributes nothing.
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [grad for _, grad in pairs],
        create_graph=create_graph,
        materialize_grads=True,
    )
