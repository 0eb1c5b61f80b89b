"""The attention's sums over the edges of a node and both derivatives, as `janus.ops.attention` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from janus.ops.native.library import launch
from janus.ops.rowwise import with_unit_stride


def sums(logits: Tensor, message: Tensor, u: Tensor | None, *nodes: Any, cap: float | None) -> tuple[Tensor, ...]:
    """Weight and value of each kind, (n, d); `nodes` are the indices of each kind, then their numbers."""
    kinds = len(nodes) // 2
    outputs = [message.new_zeros((count, message.shape[1])) for count in nodes[kinds:] for _ in range(2)]
    return _launch("attention_sums", (logits, message, u), nodes[:kinds], (), outputs, cap)


def sums_first_derivative(
    logits: Tensor, message: Tensor, u: Tensor | None, *rest: Tensor, cap: float | None
) -> tuple[Tensor, ...]:
    """Gradients of logits (E, k d), message (E, d) and, if there is one, envelope (E, 1)."""
    kinds = len(rest) // 3
    outputs = _like(logits, message, u)
    return _launch("attention_sums_first", (logits, message, u), rest[:kinds], rest[kinds:], outputs, cap)


def sums_second_derivative(
    logits: Tensor,
    message: Tensor,
    u: Tensor | None,
    v_s: Tensor,
    v_m: Tensor,
    v_u: Tensor | None,
    *rest: Tensor,
    cap: float | None,
) -> tuple[Tensor, ...]:
    """Gradients of logits, message, the envelope if there is one, and of the gradients of each kind's sums (n, d)."""
    kinds = len(rest) // 3
    read, grads = (logits, message, u, v_s, v_m, v_u), rest[kinds:]
    outputs = [*_like(logits, message, u), *(grad.new_zeros(grad.shape) for grad in grads)]
    return _launch("attention_sums_second", read, rest[:kinds], grads, outputs, cap)


def _like(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.new_empty(value.shape) for value in tensors]


def _launch(
    name: str,
    of_edges: Sequence[Tensor | None],
    indices: Sequence[Tensor],
    of_nodes: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    cap: float | None,
) -> tuple[Tensor, ...]:
    read = [None if value is None else with_unit_stride(value) for value in of_edges]
    read += [index.long().contiguous() for index in indices]
    read += map(with_unit_stride, of_nodes)
    assert read[1] is not None
    num_rows, width = read[1].shape
    return launch(name, read, outputs, num_rows=num_rows, width=width, numbers=(len(indices), cap or 0.0))
