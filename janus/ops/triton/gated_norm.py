"""SiLU(norm(core)) * sigmoid(norm(gate)) and both derivatives; the notation is that of `janus.ops.gated_norm`.

A program computes whole rows, so every row is read once and every result written once. Gradients of weight and bias
are sums over rows: each program adds up those of its own rows, and torch the sums of the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from janus.ops.rowwise import with_unit_stride
from janus.ops.triton.tile import MAX_PROGRAMS, accumulator, row_tile

_ELEMENTS = {"value": 2048, "first derivative": 1024, "second derivative": 512}
"""Of a program's piece, so that what it holds at once stays in registers."""


def value(core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, center: bool):
    """As `janus.ops.gated_norm`."""
    core, gate = with_unit_stride(core), with_unit_stride(gate)
    out = torch.empty_like(core, memory_format=torch.contiguous_format)
    options = _options("value", core, bias, eps, center)
    _value[(triton.cdiv(len(core), options["ROWS"]),)](
        core, gate, *_affine(weight, bias), out, len(core), core.stride(0), gate.stride(0), **options
    )
    return (out,)


def first_derivative(
    core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, *, eps, center, affine: bool
) -> tuple[Tensor, ...]:
    """As `janus.ops.gated_norm`."""
    core, gate, grad = (with_unit_stride(rows) for rows in (core, gate, grad))
    options = _options("first derivative", core, bias, eps, center)
    g_core, g_gate = (torch.empty_like(core, memory_format=torch.contiguous_format) for _ in range(2))
    programs = triton.cdiv(len(core), options["ROWS"])
    programs, sums = _partial_sums(core, programs) if affine else (programs, core)
    _first_derivative[(programs,)](
        *(core, gate, *_affine(weight, bias), grad, g_core, g_gate, sums, len(core)),
        *(core.stride(0), gate.stride(0), grad.stride(0)),
        AFFINE=affine,
        **options,
    )
    return (g_core, g_gate, *_total(sums, weight)) if affine else (g_core, g_gate)


def second_derivative(
    core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, grad, v_core, v_gate, *, eps, center
) -> tuple[Tensor, ...]:
    """As `janus.ops.gated_norm`."""
    rows = tuple(with_unit_stride(rows) for rows in (core, gate, grad, v_core, v_gate))
    options = _options("second derivative", core, bias, eps, center)
    results = tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for like in rows[:3])
    programs, sums = _partial_sums(core, triton.cdiv(len(core), options["ROWS"]))
    _second_derivative[(programs,)](
        *(*rows, *_affine(weight, bias), *results, sums, len(core)), *(tensor.stride(0) for tensor in rows), **options
    )
    return (*results, *_total(sums, weight))


def _options(name: str, core: Tensor, bias: Tensor | None, eps: float, center: bool) -> dict[str, Any]:
    return {
        **row_tile(f"the gated norm's {name}", core, _ELEMENTS[name]),
        "ACC": accumulator(core.dtype),
        "EPS": eps,
        "CENTER": center,
        "HAS_BIAS": bias is not None,
    }


def _affine(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without a bias any pointer does, for it is not read."""
    return weight.contiguous(), weight if bias is None else bias.contiguous()


def _partial_sums(core: Tensor, programs: int) -> tuple[int, Tensor]:
    """How many programs share the rows, and room for what each adds up: weights of core and gate, then their biases."""
    programs = min(programs, MAX_PROGRAMS)
    dtype = torch.float64 if core.dtype == torch.float64 else torch.float32
    return programs, core.new_empty((programs, 4, core.shape[1]), dtype=dtype)


def _total(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = sums.sum(0).to(weight.dtype)
    return total[:2], total[2:]


@triton.jit
def _scale(weight, bias, columns, HALF: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr):
    """w and b of one half, (1, BLOCK); zero beyond the row."""
    inside = columns < WIDTH
    w = tl.load(weight + HALF * WIDTH + columns, mask=inside, other=0.0).to(ACC)
    b = w * 0
    if HAS_BIAS:
        b = tl.load(bias + HALF * WIDTH + columns, mask=inside, other=0.0).to(ACC)
    return w[None, :], b[None, :]


@triton.jit
def _normalised(z, inside, EPS: tl.constexpr, CENTER: tl.constexpr, WIDTH: tl.constexpr):
    """x and r. `z` is zero beyond the row."""
    if CENTER:
        z = tl.where(inside, z - tl.sum(z, 1)[:, None] / WIDTH, 0.0)
    inverse = tl.rsqrt(tl.sum(z * z, 1) / WIDTH + EPS)[:, None]
    return z * inverse, inverse


@triton.jit
def _jacobian(v, x, inverse, CENTER: tl.constexpr, WIDTH: tl.constexpr):
    """J v; `v` is zero beyond the row."""
    moved = v - x * (tl.sum(x * v, 1)[:, None] / WIDTH)
    if CENTER:
        moved -= tl.sum(v, 1)[:, None] / WIDTH
    return moved * inverse


@triton.jit
def _value(
    core,
    gate,
    weight,
    bias,
    out,
    num_rows,
    core_stride,
    gate_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], columns[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    w_core, b_core = _scale(weight, bias, columns, 0, HAS_BIAS, ACC, WIDTH)
    w_gate, b_gate = _scale(weight, bias, columns, 1, HAS_BIAS, ACC, WIDTH)
    z_core = tl.load(core + row * core_stride + column, mask=inside, other=0.0).to(ACC)
    z_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(ACC)
    x_core, _r_core = _normalised(z_core, inside, EPS, CENTER, WIDTH)
    x_gate, _r_gate = _normalised(z_gate, inside, EPS, CENTER, WIDTH)
    a_core, a_gate = w_core * x_core + b_core, w_gate * x_gate + b_gate
    tl.store(out + row * WIDTH + column, a_core * tl.sigmoid(a_core) * tl.sigmoid(a_gate), mask=inside)


@triton.jit
def _first_derivative(
    core,
    gate,
    weight,
    bias,
    grad,
    of_core,
    of_gate,
    sums,
    num_rows,
    core_stride,
    gate_stride,
    grad_stride,
    AFFINE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    w_core, b_core = _scale(weight, bias, columns, 0, HAS_BIAS, ACC, WIDTH)
    w_gate, b_gate = _scale(weight, bias, columns, 1, HAS_BIAS, ACC, WIDTH)
    sum_w_core = tl.zeros((BLOCK,), ACC)
    sum_w_gate = tl.zeros((BLOCK,), ACC)
    sum_b_core = tl.zeros((BLOCK,), ACC)
    sum_b_gate = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        row, column = rows[:, None], columns[None, :]
        inside = (row < num_rows) & (column < WIDTH)
        z_core = tl.load(core + row * core_stride + column, mask=inside, other=0.0).to(ACC)
        z_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(ACC)
        incoming = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(ACC)
        x_core, r_core = _normalised(z_core, inside, EPS, CENTER, WIDTH)
        x_gate, r_gate = _normalised(z_gate, inside, EPS, CENTER, WIDTH)
        a_core = w_core * x_core + b_core
        s_core, s_gate = tl.sigmoid(a_core), tl.sigmoid(w_gate * x_gate + b_gate)
        g_core = incoming * s_gate * s_core * (1 + a_core * (1 - s_core))
        g_gate = incoming * a_core * s_core * s_gate * (1 - s_gate)
        place = row * WIDTH + column
        tl.store(of_core + place, _jacobian(w_core * g_core, x_core, r_core, CENTER, WIDTH), mask=inside)
        tl.store(of_gate + place, _jacobian(w_gate * g_gate, x_gate, r_gate, CENTER, WIDTH), mask=inside)
        if AFFINE:
            sum_w_core += tl.sum(g_core * x_core, 0)
            sum_w_gate += tl.sum(g_gate * x_gate, 0)
            sum_b_core += tl.sum(g_core, 0)
            sum_b_gate += tl.sum(g_gate, 0)
    if AFFINE:
        place = sums + tl.program_id(0) * 4 * WIDTH + columns
        tl.store(place, sum_w_core, mask=columns < WIDTH)
        tl.store(place + WIDTH, sum_w_gate, mask=columns < WIDTH)
        tl.store(place + 2 * WIDTH, sum_b_core, mask=columns < WIDTH)
        tl.store(place + 3 * WIDTH, sum_b_gate, mask=columns < WIDTH)


@triton.jit
def _turned(g, v, u, k, x, inverse, w, CENTER: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient of <v, J (w g)> + <k, a> for z, with u = J v."""
    from_x = tl.sum(w * g * u, 1)[:, None] / WIDTH
    from_u = tl.sum(x * w * g, 1)[:, None] / WIDTH
    from_g = tl.sum(x * v, 1)[:, None] / WIDTH
    direct = _jacobian(w * (k - g * (inverse * from_g)), x, inverse, CENTER, WIDTH)
    return direct - inverse * (x * from_x + u * from_u)


@triton.jit
def _second_derivative(
    core,
    gate,
    grad,
    v_core,
    v_gate,
    weight,
    bias,
    of_core,
    of_gate,
    of_grad,
    sums,
    num_rows,
    core_stride,
    gate_stride,
    grad_stride,
    v_core_stride,
    v_gate_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    w_core, b_core = _scale(weight, bias, columns, 0, HAS_BIAS, ACC, WIDTH)
    w_gate, b_gate = _scale(weight, bias, columns, 1, HAS_BIAS, ACC, WIDTH)
    sum_w_core = tl.zeros((BLOCK,), ACC)
    sum_w_gate = tl.zeros((BLOCK,), ACC)
    sum_b_core = tl.zeros((BLOCK,), ACC)
    sum_b_gate = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        row, column = rows[:, None], columns[None, :]
        inside = (row < num_rows) & (column < WIDTH)
        z_core = tl.load(core + row * core_stride + column, mask=inside, other=0.0).to(ACC)
        z_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(ACC)
        incoming = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(ACC)
        to_core = tl.load(v_core + row * v_core_stride + column, mask=inside, other=0.0).to(ACC)
        to_gate = tl.load(v_gate + row * v_gate_stride + column, mask=inside, other=0.0).to(ACC)
        x_core, r_core = _normalised(z_core, inside, EPS, CENTER, WIDTH)
        x_gate, r_gate = _normalised(z_gate, inside, EPS, CENTER, WIDTH)
        a_core = w_core * x_core + b_core
        s_core, s_gate = tl.sigmoid(a_core), tl.sigmoid(w_gate * x_gate + b_gate)
        silu, silu_slope = a_core * s_core, s_core * (1 + a_core * (1 - s_core))
        silu_bend = s_core * (1 - s_core) * (2 + a_core * (1 - 2 * s_core))
        gate_slope = s_gate * (1 - s_gate)
        u_core = _jacobian(to_core, x_core, r_core, CENTER, WIDTH)
        u_gate = _jacobian(to_gate, x_gate, r_gate, CENTER, WIDTH)
        p_core, p_gate = u_core * w_core, u_gate * w_gate

        place = row * WIDTH + column
        tl.store(of_grad + place, p_core * silu_slope * s_gate + p_gate * silu * gate_slope, mask=inside)
        # Gradients of a_core and a_gate, once of the output and once of what the store above weights with `grad`.
        g_core, g_gate = incoming * s_gate * silu_slope, incoming * silu * gate_slope
        k_core = incoming * (p_core * s_gate * silu_bend + p_gate * silu_slope * gate_slope)
        k_gate = incoming * gate_slope * (p_core * silu_slope + p_gate * silu * (1 - 2 * s_gate))
        from_core = _turned(g_core, to_core, u_core, k_core, x_core, r_core, w_core, CENTER, WIDTH)
        from_gate = _turned(g_gate, to_gate, u_gate, k_gate, x_gate, r_gate, w_gate, CENTER, WIDTH)
        tl.store(of_core + place, from_core, mask=inside)
        tl.store(of_gate + place, from_gate, mask=inside)
        sum_w_core += tl.sum(g_core * u_core + k_core * x_core, 0)
        sum_w_gate += tl.sum(g_gate * u_gate + k_gate * x_gate, 0)
        sum_b_core += tl.sum(k_core, 0)
        sum_b_gate += tl.sum(k_gate, 0)
    place = sums + tl.program_id(0) * 4 * WIDTH + columns
    tl.store(place, sum_w_core, mask=columns < WIDTH)
    tl.store(place + WIDTH, sum_w_gate, mask=columns < WIDTH)
    tl.store(place + 2 * WIDTH, sum_b_core, mask=columns < WIDTH)
    tl.store(place + 3 * WIDTH, sum_b_gate, mask=columns < WIDTH)
