"""The per-edge terms of the attention's sums and both derivatives, as `janus.ops.attention` has them."""

from __future__ import annotations

from torch import Tensor

from janus.ops.native.library import launch
from janus.ops.rowwise import with_unit_stride


def value(logits: Tensor, message: Tensor, u: Tensor | None = None, *, cap: float | None) -> tuple[Tensor, ...]:
    """Weight and value of each node, (E, d)."""
    nodes = logits.shape[1] // message.shape[1]
    outputs = [message.new_empty(message.shape) for _ in range(2 * nodes)]
    return _launch("attention_value", (logits, message, u), outputs, message, nodes, cap)


def first_derivative(logits: Tensor, message: Tensor, *rows: Tensor, cap: float | None) -> tuple[Tensor, ...]:
    """Gradients of logits (E, k d), message (E, d) and, if there is one, envelope (E, 1)."""
    nodes = logits.shape[1] // message.shape[1]
    grads, envelope = rows[: 2 * nodes], rows[2 * nodes :]
    outputs = [logits.new_empty(logits.shape), message.new_empty(message.shape)]
    outputs += [message.new_empty(len(message), 1) for _ in envelope]
    read = (logits, message, *(envelope or (None,)), *grads)
    return _launch("attention_first", read, outputs, message, nodes, cap)


def second_derivative(logits: Tensor, message: Tensor, *rows: Tensor, cap: float | None) -> tuple[Tensor, ...]:
    """Gradients of logits, message, of weight and value of each node, and of the envelope if there is one."""
    nodes = logits.shape[1] // message.shape[1]
    grads, (v_s, v_m, *envelope) = rows[: 2 * nodes], rows[2 * nodes :]
    u, v_u = envelope or (None, None)
    of_grads = [message.new_empty(message.shape) for _ in grads]
    of_logits, of_message = logits.new_empty(logits.shape), message.new_empty(message.shape)
    of_envelope = None if u is None else message.new_empty(len(message), 1)
    read = (logits, message, u, *grads, v_s, v_m, v_u)
    _launch("attention_second", read, (of_logits, of_message, of_envelope, *of_grads), message, nodes, cap)
    return of_logits, of_message, *of_grads, *(() if of_envelope is None else (of_envelope,))


def _launch(name, read, outputs, message: Tensor, nodes: int, cap: float | None) -> tuple[Tensor, ...]:
    rows = [None if value is None else with_unit_stride(value) for value in read]
    num_rows, width = message.shape
    return launch(name, rows, outputs, num_rows=num_rows, width=width, numbers=(nodes, cap or 0.0))
