"""The per-edge terms of the attention's sums and both derivatives; the notation is that of `janus.ops.attention`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from janus.ops.rowwise import with_unit_stride
from janus.ops.triton.tile import accumulator, row_tile

_ELEMENTS = {"value": 2048, "first derivative": 1024, "second derivative": 512}
"""Of a program's piece, so that what it holds at once stays in registers."""


def value(logits: Tensor, message: Tensor, u: Tensor | None = None, *, cap: float | None) -> tuple[Tensor, ...]:
    """As `janus.ops.attention`."""
    logits, message = with_unit_stride(logits), with_unit_stride(message)
    options = _options("value", logits, message, u, cap)
    terms = tuple(_like(message) for _ in range(2 * options["NODES"]))
    envelope = message if u is None else u
    _value[_grid(message, options)](
        *(logits, message, envelope, terms, len(message)),
        *(logits.stride(0), message.stride(0), envelope.stride(0)),
        **options,
    )
    return terms


def first_derivative(logits: Tensor, message: Tensor, *rows: Tensor, cap: float | None) -> tuple[Tensor, ...]:
    """As `janus.ops.attention`."""
    count = 2 * logits.shape[1] // message.shape[1]
    grads, u = tuple(row.contiguous() for row in rows[:count]), rows[count] if len(rows) > count else None
    logits, message = with_unit_stride(logits), with_unit_stride(message)
    options = _options("first derivative", logits, message, u, cap)
    of_logits, of_message = _like(logits), _like(message)
    envelope = message if u is None else u
    of_envelope = None if u is None else _like(u)
    _first_derivative[_grid(message, options)](
        *(logits, message, envelope, grads, of_logits, of_message),
        *(message if of_envelope is None else of_envelope, len(message)),
        *(logits.stride(0), message.stride(0), envelope.stride(0)),
        **options,
    )
    return (of_logits, of_message) if of_envelope is None else (of_logits, of_message, of_envelope)


def second_derivative(logits: Tensor, message: Tensor, *rows: Tensor, cap: float | None) -> tuple[Tensor, ...]:
    """As `janus.ops.attention`."""
    count = 2 * logits.shape[1] // message.shape[1]
    grads, (v_s, v_m) = tuple(row.contiguous() for row in rows[:count]), rows[count : count + 2]
    u, v_u = rows[count + 2 :] or (None, message)
    logits, message, v_s, v_m = (with_unit_stride(rows) for rows in (logits, message, v_s, v_m))
    options = _options("second derivative", logits, message, u, cap)
    of_logits, of_message, of_grads = _like(logits), _like(message), tuple(_like(grad) for grad in grads)
    of_envelope = None if u is None else _like(u)
    envelope = message if u is None else u
    _second_derivative[_grid(message, options)](
        *(logits, message, envelope, grads, v_s, v_m, v_u, of_logits, of_message, of_grads),
        *(message if of_envelope is None else of_envelope, len(message)),
        *(tensor.stride(0) for tensor in (logits, message, envelope, v_s, v_m, v_u)),
        **options,
    )
    return (of_logits, of_message, *of_grads, *(() if of_envelope is None else (of_envelope,)))


def _options(name: str, logits: Tensor, message: Tensor, u: Tensor | None, cap: float | None) -> dict[str, Any]:
    return {
        **row_tile(f"the attention's {name}", message, _ELEMENTS[name]),
        "ACC": accumulator(message.dtype),
        "NODES": logits.shape[1] // message.shape[1],
        "ENVELOPED": u is not None,
        "CAPPED": cap is not None,
        "CAP": 1.0 if cap is None else float(cap),
    }


def _grid(message: Tensor, options: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(len(message), options["ROWS"]),)


def _like(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@triton.jit
def _tanh(x):
    """Near zero 1 - 2 / (exp(2 x) + 1) cancels; there eight steps of Lambert's continued fraction, right to 1e-17."""
    near = tl.abs(x) < 0.625
    z = tl.where(near, x * x, 0.0)
    above = 2027025 + z * (270270 + z * (6930 + z * 36))
    below = 2027025 + z * (945945 + z * (51975 + z * (630 + z)))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(near, x * above / below, tl.where(x < 0, -far, far))


@triton.jit
def _exponential(s, CAPPED: tl.constexpr, CAP: tl.constexpr):
    """exp(c(s)), c'(s) and tanh(s / cap)."""
    if CAPPED:
        tanh = _tanh(s / CAP)
        return tl.exp(CAP * tanh), 1 - tanh * tanh, tanh
    return tl.exp(s), s * 0 + 1, s * 0


@triton.jit
def _value(
    logits,
    message,
    envelope,
    terms,
    num_rows,
    logits_stride,
    message_stride,
    envelope_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    NODES: tl.constexpr,
    ENVELOPED: tl.constexpr,
    CAPPED: tl.constexpr,
    CAP: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], columns[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    m = tl.load(message + row * message_stride + column, mask=inside, other=0.0).to(ACC)
    place = row * WIDTH + column
    for node in tl.static_range(NODES):
        at = logits + row * logits_stride + node * WIDTH + column
        exp, _slope, _tanh_s = _exponential(tl.load(at, mask=inside, other=0.0).to(ACC), CAPPED, CAP)
        if ENVELOPED:
            at = envelope + rows * envelope_stride
            exp *= tl.load(at, mask=rows < num_rows, other=0.0).to(ACC)[:, None]
        tl.store(terms[2 * node] + place, exp, mask=inside)
        tl.store(terms[2 * node + 1] + place, exp * m, mask=inside)


@triton.jit
def _first_derivative(
    logits,
    message,
    envelope,
    grads,
    of_logits,
    of_message,
    of_envelope,
    num_rows,
    logits_stride,
    message_stride,
    envelope_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    NODES: tl.constexpr,
    ENVELOPED: tl.constexpr,
    CAPPED: tl.constexpr,
    CAP: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], columns[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    m = tl.load(message + row * message_stride + column, mask=inside, other=0.0).to(ACC)
    place = row * WIDTH + column
    sum_message = tl.zeros((ROWS, BLOCK), ACC)
    sum_envelope = tl.zeros((ROWS, BLOCK), ACC)
    for node in tl.static_range(NODES):
        at = logits + row * logits_stride + node * WIDTH + column
        exp, slope, _tanh_s = _exponential(tl.load(at, mask=inside, other=0.0).to(ACC), CAPPED, CAP)
        g_weight = tl.load(grads[2 * node] + place, mask=inside, other=0.0).to(ACC)
        g_value = tl.load(grads[2 * node + 1] + place, mask=inside, other=0.0).to(ACC)
        h = exp * (g_weight + m * g_value)
        if ENVELOPED:
            at = envelope + rows * envelope_stride
            u = tl.load(at, mask=rows < num_rows, other=0.0).to(ACC)[:, None]
            sum_envelope += h
            h *= u
            exp *= u
        sum_message += exp * g_value
        tl.store(of_logits + row * (NODES * WIDTH) + node * WIDTH + column, h * slope, mask=inside)
    tl.store(of_message + place, sum_message, mask=inside)
    if ENVELOPED:
        tl.store(of_envelope + rows, tl.sum(sum_envelope, 1), mask=rows < num_rows)


@triton.jit
def _second_derivative(
    logits,
    message,
    envelope,
    grads,
    v_s,
    v_m,
    v_u,
    of_logits,
    of_message,
    of_grads,
    of_envelope,
    num_rows,
    logits_stride,
    message_stride,
    envelope_stride,
    v_s_stride,
    v_m_stride,
    v_u_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    NODES: tl.constexpr,
    ENVELOPED: tl.constexpr,
    CAPPED: tl.constexpr,
    CAP: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], columns[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    m = tl.load(message + row * message_stride + column, mask=inside, other=0.0).to(ACC)
    to_m = tl.load(v_m + row * v_m_stride + column, mask=inside, other=0.0).to(ACC)
    place = row * WIDTH + column
    sum_message = tl.zeros((ROWS, BLOCK), ACC)
    sum_envelope = tl.zeros((ROWS, BLOCK), ACC)
    for node in tl.static_range(NODES):
        at = logits + row * logits_stride + node * WIDTH + column
        exp, slope, tanh = _exponential(tl.load(at, mask=inside, other=0.0).to(ACC), CAPPED, CAP)
        at = v_s + row * v_s_stride + node * WIDTH + column
        to_s = tl.load(at, mask=inside, other=0.0).to(ACC)
        g_weight = tl.load(grads[2 * node] + place, mask=inside, other=0.0).to(ACC)
        g_value = tl.load(grads[2 * node + 1] + place, mask=inside, other=0.0).to(ACC)
        h = g_weight + m * g_value
        # p and its derivative by s, of which c'' = -2 / cap tanh c' is a part.
        p, bent, from_m, to_value = slope * to_s, tanh * to_s, to_m * g_value, to_m
        if ENVELOPED:
            at = envelope + rows * envelope_stride
            u = tl.load(at, mask=rows < num_rows, other=0.0).to(ACC)[:, None]
            at = v_u + rows * v_u_stride
            to_u = tl.load(at, mask=rows < num_rows, other=0.0).to(ACC)[:, None]
            sum_envelope += exp * (p * h + from_m)
            p, bent, from_m, to_value = u * p + to_u, u * bent, u * from_m, u * to_m
        turn = p
        if CAPPED:
            turn = p - (2 / CAP) * bent
        at = row * (NODES * WIDTH) + node * WIDTH + column
        tl.store(of_logits + at, exp * slope * (turn * h + from_m), mask=inside)
        sum_message += exp * p * g_value
        tl.store(of_grads[2 * node] + place, exp * p, mask=inside)
        tl.store(of_grads[2 * node + 1] + place, exp * (to_value + p * m), mask=inside)
    tl.store(of_message + place, sum_message, mask=inside)
    if ENVELOPED:
        tl.store(of_envelope + rows, tl.sum(sum_envelope, 1), mask=rows < num_rows)
