"""SiLU and its derivatives. The columns of x are parts, whose values and gradients are tensors of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from janus.ops.rowwise import empty_part
from janus.ops.triton.tile import accumulator

_BLOCK = 1024


def value(x: Tensor, *, parts: int) -> tuple[Tensor, ...]:
    """As `janus.ops.silu`, any shape if it is one part."""
    outputs = tuple(empty_part(x, parts) for _ in range(parts))
    _launch(_value, x, parts, (), (outputs,))
    return outputs


def first_derivative(x: Tensor, *grads: Tensor) -> tuple[Tensor]:
    """As `janus.ops.silu`."""
    out = x.new_empty(x.shape)
    _launch(_first_derivative, x, len(grads), (_contiguous(grads),), (out,))
    return (out,)


def second_derivative(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """As `janus.ops.silu`."""
    *grads, cotangent = rows
    curvature, slopes = x.new_empty(x.shape), tuple(empty_part(x, len(grads)) for _ in grads)
    read = (_contiguous(grads), cotangent.contiguous())
    _launch(_second_derivative, x, len(grads), read, (curvature, slopes))
    return curvature, *slopes


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.contiguous() for value in tensors)


def _launch(kernel: Any, x: Tensor, parts: int, read: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Programs go over the numbers of a part, and do all parts."""
    size = x.numel() // parts
    width = size if parts == 1 else x.shape[1] // parts
    options = {"PARTS": parts, "ACC": accumulator(x.dtype), "BLOCK": _BLOCK}
    kernel[(triton.cdiv(size, _BLOCK),)](x.contiguous(), *read, *outputs, size, max(1, width), **options)


@triton.jit
def _places(width, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Of numbers in the tensor of a part, and in x."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return own, own + (own // width * (PARTS - 1) + part) * width


@triton.jit
def _value(x, outputs, size, width, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    for part in tl.static_range(PARTS):
        own, place = _places(width, part, PARTS, BLOCK)
        a = tl.load(x + place, mask=own < size, other=0.0).to(ACC)
        tl.store(outputs[part] + own, a * tl.sigmoid(a), mask=own < size)


@triton.jit
def _first_derivative(x, grads, out, size, width, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    for part in tl.static_range(PARTS):
        own, place = _places(width, part, PARTS, BLOCK)
        a = tl.load(x + place, mask=own < size, other=0.0).to(ACC)
        g = tl.load(grads[part] + own, mask=own < size, other=0.0).to(ACC)
        s = tl.sigmoid(a)
        tl.store(out + place, g * s * (1 + a * (1 - s)), mask=own < size)


@triton.jit
def _second_derivative(
    x, grads, cotangent, curvature, slopes, size, width, PARTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    for part in tl.static_range(PARTS):
        own, place = _places(width, part, PARTS, BLOCK)
        a = tl.load(x + place, mask=own < size, other=0.0).to(ACC)
        g = tl.load(grads[part] + own, mask=own < size, other=0.0).to(ACC)
        v = tl.load(cotangent + place, mask=own < size, other=0.0).to(ACC)
        s = tl.sigmoid(a)
        tl.store(curvature + place, v * g * s * (1 - s) * (2 + a * (1 - 2 * s)), mask=own < size)
        tl.store(slopes[part] + own, v * s * (1 + a * (1 - s)), mask=own < size)
