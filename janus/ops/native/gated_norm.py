"""SiLU(norm(core)) * sigmoid(norm(gate)) and both derivatives, as `janus.ops.gated_norm` has them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from janus.ops.native.library import launch
from janus.ops.rowwise import with_unit_stride


def value(
    core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, center: bool
) -> tuple[Tensor, ...]:
    """(N, d)."""
    return _launch("gated_norm_value", (core, gate), weight, bias, (), [core.new_empty(core.shape)], eps, center)


def first_derivative(
    core: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    *,
    eps: float,
    center: bool,
    affine: bool,
) -> tuple[Tensor, ...]:
    """Gradients of core and gate (N, d), and of weight and bias (2, d) if asked for."""
    of_affine = [weight.new_empty(weight.shape) if affine else None for _ in range(2)]
    outputs = [core.new_empty(core.shape), core.new_empty(core.shape), *of_affine]
    return _launch("gated_norm_first", (core, gate), weight, bias, (grad,), outputs, eps, center)


def second_derivative(
    core: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    v_core: Tensor,
    v_gate: Tensor,
    *,
    eps: float,
    center: bool,
) -> tuple[Tensor, ...]:
    """Gradients of core, gate and grad (N, d), of weight and bias (2, d)."""
    outputs = [core.new_empty(core.shape) for _ in range(3)] + [weight.new_empty(weight.shape) for _ in range(2)]
    return _launch("gated_norm_second", (core, gate), weight, bias, (grad, v_core, v_gate), outputs, eps, center)


def _launch(
    name: str,
    halves: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    others: tuple[Tensor, ...],
    outputs: Sequence[Tensor | None],
    eps: float,
    center: bool,
) -> tuple[Tensor, ...]:
    num_rows, width = halves[0].shape
    bias = None if bias is None else bias.contiguous()
    read = (*map(with_unit_stride, halves), weight.contiguous(), bias, *map(with_unit_stride, others))
    return launch(name, read, outputs, num_rows=num_rows, width=width, numbers=(eps, float(center)))
