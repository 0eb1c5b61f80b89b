"""Bessel functions of a length and a Fourier series of an angle, with hand-written first and second derivatives.

Both derivatives keep the column they expand, the frequencies and the incoming gradient; sines and cosines are computed
again. Higher orders, and gradients of frequency gradients, are recorded operations of the plain functions.
`tests/janus/ops` compares all of them with plain torch and runs gradcheck and gradgradcheck.

Notation, per row and frequency w or f:
    x = d / rc,   q = sqrt(2 / rc) u(x) / d,   b = q sin(w x)                      (Bessel; q', q'' by d)
    t = acos(x),  [1 / sqrt 2, sin(f t), cos(f t)] / sqrt pi                       (Fourier)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from janus.ops.demand import wants_gradient
from janus.ops.fused import fusable
from janus.ops.recorded import recorded_gradients
from janus.ops.rowwise import map_rows

_NORM = 1 / math.sqrt(math.pi)


def bessel_expansion(length: Tensor, frequencies: Tensor, *, cutoff: float, exponent: int) -> Tensor:
    """sqrt(2 / rc) sin(w_n d / rc) / d u(d), differentiable any number of times; 0 from the cutoff on.

    Args:
        length: d, (E,), positive.
        frequencies: w_n, (K,).
        cutoff: rc, in the unit of `length`.
        exponent: of the envelope u, `polynomial_envelope`.
    Returns:
        (E, K)
    """
    shape: dict[str, Any] = {"cutoff": cutoff, "exponent": exponent}
    kind = _Kind(
        value=partial(_bessel_value, **shape),
        first_derivative=partial(_bessel_first_derivative, **shape),
        second_derivative=partial(_bessel_second_derivative, **shape),
        plain=partial(plain_bessel_expansion, **shape),
    )
    return _Expansion.apply(length, frequencies[None], kind)


def fourier_expansion(cosine: Tensor, frequencies: Tensor, *, scale: float) -> Tensor:
    """[1 / sqrt 2, sin(f_k t), cos(f_k t)] / sqrt pi with t = acos(scale cosine), differentiable any number of times.

    Args:
        cosine: (A,).
        frequencies: f_k, (K,).
        scale: slightly below 1, so that straight angles have derivatives.
    Returns:
        (A, 2K + 1)
    """
    # Scaled here: a compiler that merged the product with 1 - x, tiny for straight angles, would change its digits.
    kind = _Kind(_fourier_value, _fourier_first_derivative, _fourier_second_derivative, plain_fourier_expansion)
    return _Expansion.apply(scale * cosine, frequencies[None], kind)


def polynomial_envelope(length: Tensor, cutoff: float, exponent: int) -> Tensor:
    """u(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2) with x = length / cutoff; 0 beyond.

    Evaluated as (1-x)^3 sum_{k<p} (k+1)(k+2)/2 x^k, which keeps its relative precision near the cutoff. u has two
    continuous derivatives there. Source: Gasteiger et al., arXiv 2003.03123, eq. 8.

    Args:
        length: any shape.
        cutoff: in the same unit.
        exponent: p >= 1.
    Returns:
        as `length`.
    """
    return _envelope((length / cutoff).clamp(max=1.0), exponent)


def plain_bessel_expansion(length: Tensor, frequencies: Tensor, *, cutoff: float, exponent: int) -> Tensor:
    """`bessel_expansion` in recorded torch operations."""
    length = length[:, None]
    scale = math.sqrt(2.0 / cutoff) * polynomial_envelope(length, cutoff, exponent) / length
    return scale * torch.sin(frequencies * (length / cutoff))


def plain_fourier_expansion(cosine: Tensor, frequencies: Tensor, *, scale: float = 1.0) -> Tensor:
    """`fourier_expansion` in recorded torch operations."""
    phase = torch.acos(scale * cosine)[:, None] * frequencies
    constant = torch.full_like(cosine, math.sqrt(0.5))[:, None]
    return torch.cat([constant, phase.sin(), phase.cos()], dim=1) * _NORM


class _Kind(NamedTuple):
    """An expansion of a column, (n,), by frequencies, which are (1, K) here and below: a row that all rows share."""

    value: Callable[..., tuple[Tensor, ...]]
    first_derivative: Callable[..., tuple[Tensor, ...]]
    second_derivative: Callable[..., tuple[Tensor, ...]]
    plain: Callable[[Tensor, Tensor], Tensor]


class _Expansion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, column: Tensor, frequencies: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(column, frequencies)
        ctx.kind = kind

        def value(_: Tensor, column: Tensor) -> tuple[Tensor, ...]:
            return kind.value(column, frequencies)

        return map_rows(value, (_as_wide_as(frequencies, column), column))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        column, frequencies = ctx.saved_tensors
        of_frequencies = wants_gradient(ctx, 1)
        if not torch.is_grad_enabled():
            g_column, *rest = _gradients(ctx.kind, column, frequencies, grad, of_frequencies)
            return g_column, rest[0] if rest else None, None
        if not of_frequencies:
            return _ExpansionGrad.apply(column, frequencies, grad, ctx.kind), None, None
        return *recorded_gradients(ctx.kind.plain, (column, frequencies), (grad,)), None


class _ExpansionGrad(torch.autograd.Function):
    """The gradient of the column, (n,), as a function of column, frequencies and incoming gradient."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, frequencies: Tensor, grad: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(column, frequencies, grad)
        ctx.kind = kind
        (g_column,) = _gradients(kind, column, frequencies, grad, False)
        return g_column

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor):
        column, frequencies, grad = ctx.saved_tensors
        kind: _Kind = ctx.kind
        if torch.is_grad_enabled():

            def plain(column: Tensor, frequencies: Tensor, grad: Tensor):
                return recorded_gradients(kind.plain, (column, frequencies), (grad,), count=1)

            return *recorded_gradients(plain, (column, frequencies, grad), (cotangent,)), None

        of_frequencies = wants_gradient(ctx, 1)

        def second(grad: Tensor, column: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            return kind.second_derivative(column, frequencies, grad, cotangent, of_frequencies=of_frequencies)

        g_column, g_grad, *rest = map_rows(second, (grad, column, cotangent), num_summed=int(of_frequencies))
        return g_column, rest[0] if rest else None, g_grad, None


def _gradients(kind: _Kind, column, frequencies, grad, of_frequencies: bool) -> tuple[Tensor, ...]:
    def first(grad: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        return kind.first_derivative(column, frequencies, grad, of_frequencies=of_frequencies)

    return map_rows(first, (grad, column), num_summed=int(of_frequencies))


def _as_wide_as(frequencies: Tensor, column: Tensor) -> Tensor:
    """Takes no memory; its size makes `map_rows` cut slices by the size of the result instead of the column's."""
    return column.detach()[:, None].expand(-1, frequencies.shape[1])


@fusable("expansion.bessel_value", ("compiled", "triton"))
def _bessel_value(length, frequencies, *, cutoff: float, exponent: int) -> tuple[Tensor, ...]:
    scale = polynomial_envelope(length, cutoff, exponent) * math.sqrt(2.0 / cutoff) / length
    return (((length / cutoff)[:, None] * frequencies).sin_().mul_(scale[:, None]),)


@fusable("expansion.bessel_first_derivative", ("compiled", "triton"))
def _bessel_first_derivative(
    length, frequencies, grad, *, cutoff, exponent, of_frequencies: bool
) -> tuple[Tensor, ...]:
    """Gradient of length (E,), and of frequencies (1, K) if asked for."""
    x, q, slope = _bessel_factors(length, cutoff, exponent, order=1)
    phase = x[:, None] * frequencies
    along_cosine, along_sine = phase.cos().mul_(grad), phase.sin_().mul_(grad)
    g_frequencies = (along_cosine * (q * x)[:, None]).sum(0, keepdim=True) if of_frequencies else None
    g_length = slope * along_sine.sum(1) + q / cutoff * along_cosine.mul_(frequencies).sum(1)
    return (g_length,) if g_frequencies is None else (g_length, g_frequencies)


@fusable("expansion.bessel_second_derivative", ("compiled", "triton"))
def _bessel_second_derivative(
    length, frequencies, grad, cotangent, *, cutoff, exponent, of_frequencies: bool
) -> tuple[Tensor, ...]:
    """Gradients of <cotangent, dlength> for length, grad and, if asked for, frequencies.

    dlength is the output of `_bessel_first_derivative`; with s and c the sine and cosine and k = w / rc,
    b' = q' s + q k c,  b'' = q'' s + 2 q' k c - q k^2 s,  db'/dw = (q' x + q / rc) c - q k x s.
    """
    x, q, slope, bend = (factor[:, None] for factor in _bessel_factors(length, cutoff, exponent, order=2))
    wave, v = frequencies / cutoff, cotangent[:, None]
    phase = x * frequencies
    cosine, sine = phase.cos(), phase.sin_()
    g_grad = (cosine * wave).mul_(v * q).addcmul_(sine, v * slope)
    along_cosine, along_sine = cosine.mul_(grad), sine.mul_(grad)
    turned = along_sine * wave
    rest: tuple[Tensor, ...] = ()
    if of_frequencies:
        rest = ((along_cosine * (v * (slope * x + q / cutoff))).sub_(turned * (v * q * x)).sum(0, keepdim=True),)
    of_sine = bend[:, 0] * along_sine.sum(1) - q[:, 0] * turned.mul_(wave).sum(1)
    of_cosine = 2 * slope[:, 0] * along_cosine.mul_(wave).sum(1)
    return cotangent * (of_sine + of_cosine), g_grad, *rest


@fusable("expansion.fourier_value", ("compiled", "triton"))
def _fourier_value(x, frequencies) -> tuple[Tensor, ...]:
    phase = x.acos()[:, None] * frequencies
    constant = torch.full_like(x, math.sqrt(0.5))[:, None]
    return (torch.cat([constant, phase.sin(), phase.cos()], dim=1).mul_(_NORM),)


@fusable("expansion.fourier_first_derivative", ("compiled", "triton"))
def _fourier_first_derivative(x, frequencies, grad, *, of_frequencies: bool) -> tuple[Tensor, ...]:
    """Gradient of x (A,), and of frequencies (1, K) if asked for."""
    angle = x.acos()
    phase = angle[:, None] * frequencies
    of_sine, of_cosine = grad[:, 1:].tensor_split(2, dim=1)
    along = phase.cos().mul_(of_sine).addcmul_(phase.sin_(), of_cosine, value=-1)
    rest = ((along * (_NORM * angle)[:, None]).sum(0, keepdim=True),) if of_frequencies else ()
    return along.mul_(frequencies).sum(1) * ((1 - x) * (1 + x)).rsqrt() * -_NORM, *rest


@fusable("expansion.fourier_second_derivative", ("compiled", "triton"))
def _fourier_second_derivative(x, frequencies, grad, cotangent, *, of_frequencies: bool) -> tuple[Tensor, ...]:
    """Gradients of <cotangent, dx> for x, grad and, if asked for, frequencies.

    dx is the output of `_fourier_first_derivative`; t' = -(1 - x^2)^(-1/2), t'' = x t'^3.
    """
    angle, slope = x.acos(), -((1 - x) * (1 + x)).rsqrt()
    phase = angle[:, None] * frequencies
    of_sine, of_cosine = grad[:, 1:].tensor_split(2, dim=1)
    cosine, sine = phase.cos(), phase.sin_()
    v = _NORM * cotangent
    weight = (v * slope)[:, None] * frequencies
    g_grad = torch.cat([torch.zeros_like(x)[:, None], weight * cosine, (weight * sine).neg_()], dim=1)
    along = (cosine * of_sine).addcmul_(sine, of_cosine, value=-1)
    turned = sine.mul_(of_sine).addcmul_(cosine, of_cosine).mul_(frequencies)  # minus the next derivative by t
    rest: tuple[Tensor, ...] = ()
    if of_frequencies:
        rest = (torch.addcmul(along, turned, angle[:, None], value=-1).mul_((v * slope)[:, None]).sum(0, keepdim=True),)
    curved = x * slope * along.mul_(frequencies).sum(1) - turned.mul_(frequencies).sum(1)
    return v * slope * slope * curved, g_grad, *rest


def _bessel_factors(length: Tensor, cutoff: float, exponent: int, *, order: int) -> tuple[Tensor, ...]:
    """x, q, q' and, if `order` is 2, q'' of the notation above, (E,) each; all but x are exactly zero from rc on.

    With u' = -p(p+1)(p+2)/2 x^(p-1) (1-x)^2 and its derivative.
    """
    x = length / cutoff
    inside = x.clamp(max=1.0)
    rest = 1 - inside
    lower = inside ** max(0, exponent - 2)
    power = lower * inside if exponent > 1 else lower
    u = _envelope(inside, exponent)
    inverse = 1 / length
    scale = math.sqrt(2.0 / cutoff) * inverse
    steep = -exponent * (exponent + 1) * (exponent + 2) / 2 * rest
    slope = steep * rest * power / cutoff - u * inverse
    if order == 1:
        return x, scale * u, scale * slope
    bend = steep * ((exponent - 1) * lower * rest - 2 * power) / cutoff**2
    return x, scale * u, scale * slope, scale * (bend - 2 * inverse * slope)


def _envelope(x: Tensor, exponent: int) -> Tensor:
    """Of x in [0, 1]."""
    series = torch.zeros_like(x)
    for k in reversed(range(exponent)):
        series = series * x + (k + 1) * (k + 2) / 2
    return (1 - x) ** 3 * series
