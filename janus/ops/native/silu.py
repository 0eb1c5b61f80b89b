"""SiLU and its derivatives, as `janus.ops.silu` has them."""

from __future__ import annotations

from torch import Tensor

from janus.ops.native.library import launch
from janus.ops.rowwise import empty_part, with_unit_stride


def value(x: Tensor, *, parts: int) -> tuple[Tensor, ...]:
    """Of x in any shape if it is one part, and otherwise of (N, parts d), (N, d) each."""
    return _launch("silu_value", x, [], [empty_part(x, parts) for _ in range(parts)], parts)


def first_derivative(x: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    """Gradient of x, in its shape."""
    return _launch("silu_first", x, grads, [x.new_empty(x.shape)], len(grads))


def second_derivative(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and of each part of the gradient; `rows` are these parts and the cotangent."""
    parts = len(rows) - 1
    return _launch("silu_second", x, rows, [x.new_empty(x.shape), *(empty_part(x, parts) for _ in range(parts))], parts)


def _launch(name: str, x: Tensor, others, outputs: list[Tensor], parts: int) -> tuple[Tensor, ...]:
    read = [value.reshape(len(x), -1) if value.ndim != 2 and len(x) else value for value in (x, *others)]
    width = x.numel() // len(x) // parts if len(x) else 0
    return launch(name, [*map(with_unit_stride, read)], outputs, num_rows=len(x), width=width, numbers=(parts,))
