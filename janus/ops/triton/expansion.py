"""Bessel functions of a length and a Fourier series of an angle, and both derivatives; the notation is that of
`janus.ops.expansion`.

A program computes whole rows, and what only the row decides once for all its frequencies. Gradients of frequencies are
sums over rows: each program adds up those of its own rows, and torch the sums of the programs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from janus.ops.rowwise import with_unit_stride
from janus.ops.triton.tile import MAX_PROGRAMS, accumulator, row_tile

_ELEMENTS = 512
"""Of a program's piece: sines and cosines are long machine code, written out for every element of a thread."""
_NORM = 1 / math.sqrt(math.pi)


def bessel_value(length: Tensor, frequencies: Tensor, *, cutoff: float, exponent: int) -> tuple[Tensor]:
    """As `janus.ops.expansion`."""
    out = length.new_empty((len(length), frequencies.shape[1]))
    options = _tile("value", length, frequencies) | _bessel(cutoff, exponent)
    _bessel_value[(triton.cdiv(len(out), options["ROWS"]),)](
        length.contiguous(), frequencies.contiguous(), out, len(out), **options
    )
    return (out,)


def bessel_first_derivative(
    length: Tensor, frequencies: Tensor, grad: Tensor, *, cutoff: float, exponent: int, of_frequencies: bool
) -> tuple[Tensor, ...]:
    """As `janus.ops.expansion`."""
    of_length = torch.empty_like(length, memory_format=torch.contiguous_format)
    options = _tile("first derivative", length, frequencies) | _bessel(cutoff, exponent)
    programs, sums = _partial_sums(length, frequencies, options, of_frequencies)
    grad = with_unit_stride(grad)
    _bessel_first_derivative[(programs,)](
        *(length.contiguous(), frequencies.contiguous(), grad, of_length, sums, len(length), grad.stride(0)),
        OF_FREQUENCIES=of_frequencies,
        **options,
    )
    return of_length, *_total(sums, frequencies, of_frequencies)


def bessel_second_derivative(
    length, frequencies, grad, cotangent, *, cutoff: float, exponent: int, of_frequencies: bool
) -> tuple[Tensor, ...]:
    """As `janus.ops.expansion`."""
    of_length = torch.empty_like(length, memory_format=torch.contiguous_format)
    of_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    options = _tile("second derivative", length, frequencies) | _bessel(cutoff, exponent)
    programs, sums = _partial_sums(length, frequencies, options, of_frequencies)
    grad = with_unit_stride(grad)
    _bessel_second_derivative[(programs,)](
        *(length.contiguous(), frequencies.contiguous(), grad, cotangent.contiguous(), of_length, of_grad, sums),
        *(len(length), grad.stride(0)),
        OF_FREQUENCIES=of_frequencies,
        **options,
    )
    return of_length, of_grad, *_total(sums, frequencies, of_frequencies)


def fourier_value(x: Tensor, frequencies: Tensor) -> tuple[Tensor]:
    """As `janus.ops.expansion`. Triton has no arc cosine: torch computes the angles."""
    out = x.new_empty((len(x), 2 * frequencies.shape[1] + 1))
    options = _tile("value", x, frequencies)
    _fourier_value[(triton.cdiv(len(out), options["ROWS"]),)](
        _angle(x.contiguous()), frequencies.contiguous(), out, len(out), NORM=_NORM, **options
    )
    return (out,)


def fourier_first_derivative(x: Tensor, frequencies: Tensor, grad: Tensor, *, of_frequencies: bool):
    """As `janus.ops.expansion`."""
    x, grad = x.contiguous(), with_unit_stride(grad)
    of_x = torch.empty_like(x)
    options = _tile("first derivative", x, frequencies)
    programs, sums = _partial_sums(x, frequencies, options, of_frequencies)
    _fourier_first_derivative[(programs,)](
        *(x, _angle(x), frequencies.contiguous(), grad, of_x, sums, len(x), grad.stride(0)),
        OF_FREQUENCIES=of_frequencies,
        NORM=_NORM,
        **options,
    )
    return of_x, *_total(sums, frequencies, of_frequencies)


def fourier_second_derivative(x: Tensor, frequencies: Tensor, grad: Tensor, cotangent, *, of_frequencies: bool):
    """As `janus.ops.expansion`."""
    x, grad = x.contiguous(), with_unit_stride(grad)
    of_x, of_grad = torch.empty_like(x), torch.empty_like(grad, memory_format=torch.contiguous_format)
    options = _tile("second derivative", x, frequencies)
    programs, sums = _partial_sums(x, frequencies, options, of_frequencies)
    _fourier_second_derivative[(programs,)](
        *(x, _angle(x), frequencies.contiguous(), grad, cotangent.contiguous(), of_x, of_grad, sums),
        *(len(x), grad.stride(0)),
        OF_FREQUENCIES=of_frequencies,
        NORM=_NORM,
        **options,
    )
    return of_x, of_grad, *_total(sums, frequencies, of_frequencies)


def _angle(x: Tensor) -> Tensor:
    """In the format that kernels compute in, for phases are multiples of it."""
    return (x if x.dtype == torch.float64 else x.float()).acos()


def _tile(name: str, column: Tensor, frequencies: Tensor) -> dict[str, Any]:
    rows = column[:, None].expand(-1, frequencies.shape[1])
    return row_tile(f"the basis' {name}", rows, _ELEMENTS) | {"ACC": accumulator(column.dtype)}


def _bessel(cutoff: float, exponent: int) -> dict[str, Any]:
    factor = -exponent * (exponent + 1) * (exponent + 2) / 2
    return {"CUTOFF": cutoff, "EXPONENT": exponent, "FACTOR": factor, "SCALE": math.sqrt(2.0 / cutoff)}


def _partial_sums(column: Tensor, frequencies: Tensor, options: dict[str, Any], wanted: bool) -> tuple[int, Tensor]:
    """How many programs share the rows, and room for what each adds up; any pointer does where nothing is added."""
    programs = triton.cdiv(len(column), options["ROWS"])
    if not wanted:
        return programs, column
    programs = min(programs, MAX_PROGRAMS)
    dtype = torch.float64 if column.dtype == torch.float64 else torch.float32
    return programs, column.new_empty((programs, frequencies.shape[1]), dtype=dtype)


def _total(sums: Tensor, frequencies: Tensor, wanted: bool) -> tuple[Tensor, ...]:
    return (sums.sum(0, keepdim=True).to(frequencies.dtype),) if wanted else ()


@triton.jit
def _envelope(x, EXPONENT: tl.constexpr, FACTOR: tl.constexpr):
    """u, u' and u'' of x in [0, 1], by x."""
    rest = 1 - x
    series, power, power_slope = x * 0, x * 0 + 1, x * 0
    for step in tl.static_range(EXPONENT):
        series = series * x + (EXPONENT - step) * (EXPONENT - step + 1) / 2
        if step > 0:
            power_slope = power_slope * x + power
            power = power * x
    slope = FACTOR * power * rest * rest
    return rest * rest * rest * series, slope, FACTOR * rest * (power_slope * rest - 2 * power)


@triton.jit
def _bessel_factors(length, CUTOFF: tl.constexpr, EXPONENT: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr):
    """x, q, q' and q''."""
    x = length / CUTOFF
    # Compared before it is divided: a GPU's quotient may be an ulp or two below 1, where nothing would be exactly zero.
    inside = tl.where(length < CUTOFF, tl.minimum(x, 1.0), 1.0)
    u, u_slope, u_bend = _envelope(inside, EXPONENT, FACTOR)
    inverse = 1 / length
    scale = SCALE * inverse
    slope = u_slope / CUTOFF - u * inverse
    return x, scale * u, scale * slope, scale * (u_bend / (CUTOFF * CUTOFF) - 2 * inverse * slope)


@triton.jit
def _bessel_value(
    length,
    frequencies,
    out,
    num_rows,
    CUTOFF: tl.constexpr,
    EXPONENT: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)
    d = tl.load(length + rows, mask=rows < num_rows, other=1.0).to(ACC)
    x, q, _slope, _bend = _bessel_factors(d, CUTOFF, EXPONENT, FACTOR, SCALE)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], q[:, None] * tl.sin(x[:, None] * w[None, :]), mask=inside)


@triton.jit
def _bessel_first_derivative(
    length,
    frequencies,
    grad,
    of_length,
    sums,
    num_rows,
    grad_stride,
    OF_FREQUENCIES: tl.constexpr,
    CUTOFF: tl.constexpr,
    EXPONENT: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    w = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)[None, :]
    total = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        d = tl.load(length + rows, mask=rows < num_rows, other=1.0).to(ACC)
        g = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0).to(ACC)
        x, q, slope, _bend = _bessel_factors(d, CUTOFF, EXPONENT, FACTOR, SCALE)
        phase = x[:, None] * w
        along_cosine, along_sine = g * tl.cos(phase), g * tl.sin(phase)
        found = slope * tl.sum(along_sine, 1) + q / CUTOFF * tl.sum(along_cosine * w, 1)
        tl.store(of_length + rows, found, mask=rows < num_rows)
        if OF_FREQUENCIES:
            total += tl.sum(along_cosine * (q * x)[:, None], 0)
    if OF_FREQUENCIES:
        tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def _bessel_second_derivative(
    length,
    frequencies,
    grad,
    cotangent,
    of_length,
    of_grad,
    sums,
    num_rows,
    grad_stride,
    OF_FREQUENCIES: tl.constexpr,
    CUTOFF: tl.constexpr,
    EXPONENT: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    w = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)[None, :]
    wave = w / CUTOFF
    total = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        d = tl.load(length + rows, mask=rows < num_rows, other=1.0).to(ACC)
        v = tl.load(cotangent + rows, mask=rows < num_rows, other=0.0).to(ACC)
        g = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=inside, other=0.0).to(ACC)
        x, q, slope, bend = _bessel_factors(d, CUTOFF, EXPONENT, FACTOR, SCALE)
        phase = x[:, None] * w
        cosine, sine = tl.cos(phase), tl.sin(phase)
        moved = (v * slope)[:, None] * sine + (v * q)[:, None] * wave * cosine
        tl.store(of_grad + rows[:, None] * WIDTH + columns[None, :], moved, mask=inside)
        along_cosine, along_sine = g * cosine, g * sine
        curved = bend * tl.sum(along_sine, 1) - q * tl.sum(along_sine * wave * wave, 1)
        curved += 2 * slope * tl.sum(along_cosine * wave, 1)
        tl.store(of_length + rows, v * curved, mask=rows < num_rows)
        if OF_FREQUENCIES:
            mixed = along_cosine * (v * (slope * x + q / CUTOFF))[:, None] - along_sine * wave * (v * q * x)[:, None]
            total += tl.sum(mixed, 0)
    if OF_FREQUENCIES:
        tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def _fourier_value(
    angle,
    frequencies,
    out,
    num_rows,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)
    t = tl.load(angle + rows, mask=rows < num_rows, other=0.0).to(ACC)
    phase = t[:, None] * f[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    start = out + rows * (2 * WIDTH + 1)
    place = start[:, None] + 1 + columns[None, :]
    tl.store(start, t * 0 + NORM * 0.7071067811865476, mask=rows < num_rows)
    tl.store(place, NORM * tl.sin(phase), mask=inside)
    tl.store(place + WIDTH, NORM * tl.cos(phase), mask=inside)


@triton.jit
def _fourier_first_derivative(
    cosines,
    angle,
    frequencies,
    grad,
    of_x,
    sums,
    num_rows,
    grad_stride,
    OF_FREQUENCIES: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    f = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)[None, :]
    total = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(cosines + rows, mask=rows < num_rows, other=0.0).to(ACC)
        t = tl.load(angle + rows, mask=rows < num_rows, other=0.0).to(ACC)
        place = grad + rows[:, None] * grad_stride + 1 + columns[None, :]
        of_sine = tl.load(place, mask=inside, other=0.0).to(ACC)
        of_cosine = tl.load(place + WIDTH, mask=inside, other=0.0).to(ACC)
        phase = t[:, None] * f
        along = of_sine * tl.cos(phase) - of_cosine * tl.sin(phase)
        found = -NORM * tl.rsqrt((1 - x) * (1 + x)) * tl.sum(along * f, 1)
        tl.store(of_x + rows, found, mask=rows < num_rows)
        if OF_FREQUENCIES:
            total += tl.sum(along * (NORM * t)[:, None], 0)
    if OF_FREQUENCIES:
        tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def _fourier_second_derivative(
    cosines,
    angle,
    frequencies,
    grad,
    cotangent,
    of_x,
    of_grad,
    sums,
    num_rows,
    grad_stride,
    OF_FREQUENCIES: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    f = tl.load(frequencies + columns, mask=columns < WIDTH, other=0.0).to(ACC)[None, :]
    total = tl.zeros((BLOCK,), ACC)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(cosines + rows, mask=rows < num_rows, other=0.0).to(ACC)
        t = tl.load(angle + rows, mask=rows < num_rows, other=0.0).to(ACC)
        v = NORM * tl.load(cotangent + rows, mask=rows < num_rows, other=0.0).to(ACC)
        place = grad + rows[:, None] * grad_stride + 1 + columns[None, :]
        of_sine = tl.load(place, mask=inside, other=0.0).to(ACC)
        of_cosine = tl.load(place + WIDTH, mask=inside, other=0.0).to(ACC)
        slope = -tl.rsqrt((1 - x) * (1 + x))
        phase = t[:, None] * f
        cosine, sine = tl.cos(phase), tl.sin(phase)
        weight = (v * slope)[:, None] * f
        start = of_grad + rows * (2 * WIDTH + 1)
        moved = start[:, None] + 1 + columns[None, :]
        tl.store(start, x * 0, mask=rows < num_rows)
        tl.store(moved, weight * cosine, mask=inside)
        tl.store(moved + WIDTH, -weight * sine, mask=inside)
        along = of_sine * cosine - of_cosine * sine
        turned = (of_sine * sine + of_cosine * cosine) * f
        curved = x * slope * tl.sum(along * f, 1) - tl.sum(turned * f, 1)
        tl.store(of_x + rows, v * slope * slope * curved, mask=rows < num_rows)
        if OF_FREQUENCIES:
            total += tl.sum((along - turned * t[:, None]) * (v * slope)[:, None], 0)
    if OF_FREQUENCIES:
        tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)
