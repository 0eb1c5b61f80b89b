"""SiLU(norm(core)) * sigmoid(norm(gate)) as one function with hand-written first and second derivatives.

Both derivatives keep the two inputs and the incoming gradient, nothing else: everything between is computed again, a
slice of rows at a time. `tests/janus/ops` compares them with plain torch and runs gradcheck and gradgradcheck.

Notation, per row and half (core or gate), m() the mean over channels:
    x = r (z - m(z)),  r = (m((z - m(z))^2) + eps)^(-1/2)       (RMS norm: without the mean)
    a = w x + b,       y = silu(a_core) sigmoid(a_gate)
    J v = r (v - m(v) - x m(x v))                               dx/dz applied to v; J is symmetric
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus.ops.demand import wants_gradient
from janus.ops.rowwise import map_rows


def gated_norm(core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, center: bool) -> Tensor:
    """SiLU(norm(core)) * sigmoid(norm(gate)), differentiable any number of times.

    Args:
        core, gate: (N, d).
        weight: (2, d), scale of the core's norm and of the gate's norm.
        bias: (2, d) shifts likewise, or None.
        eps: added to the variance (or mean square).
        center: True for layer norm, False for RMS norm.
    Returns:
        (N, d)
    """
    return _GatedNorm.apply(core, gate, weight, bias, eps, center)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool):
        ctx.save_for_backward(core, gate, weight, bias)
        ctx.norm = (eps, center)

        def output(core: Tensor, gate: Tensor) -> tuple[Tensor]:
            x_core, _ = _normalise(core, eps, center)
            x_gate, _ = _normalise(gate, eps, center)
            a_core, a_gate = _affine(x_core, weight, bias, 0), _affine(x_gate, weight, bias, 1)
            return (a_core.sigmoid().mul_(a_core).mul_(a_gate.sigmoid()),)

        return map_rows(output, (core, gate))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        core, gate, weight, bias = ctx.saved_tensors
        needs_affine = wants_gradient(ctx, 2) or wants_gradient(ctx, 3)
        if torch.is_grad_enabled():
            grads = _GatedNormGrad.apply(core, gate, weight, bias, grad, *ctx.norm)
            affine = _affine_gradients(core, gate, weight, bias, grad, *ctx.norm) if needs_affine else (None, None)
        else:

            def first(core: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
                return _first_derivative(core, gate, weight, bias, grad, *ctx.norm, affine=needs_affine)

            results = map_rows(first, (core, gate, grad), num_summed=2 if needs_affine else 0)
            grads, affine = results[:2], results[2:] or (None, None)
        return (*grads, affine[0], affine[1] if bias is not None else None, None, None)


class _GatedNormGrad(torch.autograd.Function):
    """Gradients of the two inputs, (N, d) each, as a function of inputs, affine parameters and incoming gradient."""

    @staticmethod
    def forward(ctx: Any, core, gate, weight, bias, grad, eps: float, center: bool):
        ctx.save_for_backward(core, gate, weight, bias, grad)
        ctx.norm = (eps, center)

        def first(core: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            return _first_derivative(core, gate, weight, bias, grad, eps, center, affine=False)

        return map_rows(first, (core, gate, grad))

    @staticmethod
    def backward(ctx: Any, v_core: Tensor, v_gate: Tensor):
        core, gate, weight, bias, grad = ctx.saved_tensors

        def second(core: Tensor, gate: Tensor, grad: Tensor, v_core: Tensor, v_gate: Tensor) -> tuple[Tensor, ...]:
            return _second_derivative(core, gate, weight, bias, grad, v_core, v_gate, *ctx.norm)

        rows = (core, gate, grad, v_core, v_gate)
        g_core, g_gate, g_grad, g_weight, g_bias = map_rows(second, rows, num_summed=2)
        return g_core, g_gate, g_weight, g_bias if bias is not None else None, g_grad, None, None


def _mean(v: Tensor) -> Tensor:
    return v.mean(dim=-1, keepdim=True)


def _normalise(z: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """x and r of the notation above, (N, d) and (N, 1)."""
    centered = z - _mean(z) if center else z
    inverse = (_mean(centered * centered) + eps).rsqrt()
    return centered * inverse, inverse


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, half: int) -> Tensor:
    return x * weight[half] if bias is None else torch.addcmul(bias[half], x, weight[half])


def _apply_jacobian(x: Tensor, inverse: Tensor, v: Tensor, center: bool) -> Tensor:
    projected = v - _mean(v) if center else v
    return inverse * torch.addcmul(projected, x, _mean(x * v), value=-1.0)


def _first_derivative(core, gate, weight, bias, grad, eps, center, *, affine: bool) -> tuple[Tensor, ...]:
    """Gradients of core and gate, and of weight and bias (2, d) if asked for."""
    x_core, r_core = _normalise(core, eps, center)
    x_gate, r_gate = _normalise(gate, eps, center)
    a_core, a_gate = _affine(x_core, weight, bias, 0), _affine(x_gate, weight, bias, 1)
    s_core, s_gate = a_core.sigmoid(), a_gate.sigmoid()
    silu = a_core * s_core
    g_core = grad * (s_core + silu * (1 - s_core)) * s_gate
    g_gate = grad * silu * s_gate * (1 - s_gate)
    grads = (
        _apply_jacobian(x_core, r_core, g_core * weight[0], center),
        _apply_jacobian(x_gate, r_gate, g_gate * weight[1], center),
    )
    if not affine:
        return grads
    g_weight = torch.stack([(g_core * x_core).sum(0), (g_gate * x_gate).sum(0)])
    return (*grads, g_weight, torch.stack([g_core.sum(0), g_gate.sum(0)]))


def _affine_gradients(core, gate, weight, bias, grad, eps, center) -> tuple[Tensor, Tensor]:
    """Weight and bias gradients as recorded torch operations, for derivatives of weight gradients themselves."""
    return _first_derivative(core, gate, weight, bias, grad, eps, center, affine=True)[2:]  # type: ignore[return-value]


def _second_derivative(core, gate, weight, bias, grad, v_core, v_gate, eps, center) -> tuple[Tensor, ...]:
    """Gradients of <v_core, dcore> + <v_gate, dgate> for core, gate, grad, weight and bias.

    dcore and dgate are the outputs of `_first_derivative`.
    """
    x_core, r_core = _normalise(core, eps, center)
    x_gate, r_gate = _normalise(gate, eps, center)
    a_core, a_gate = _affine(x_core, weight, bias, 0), _affine(x_gate, weight, bias, 1)
    s_core, s_gate = a_core.sigmoid(), a_gate.sigmoid()
    t_core = 1 - s_core
    silu = a_core * s_core
    silu1 = s_core + silu * t_core
    silu2 = s_core * t_core * (2 + a_core * (t_core - s_core))
    gate1 = s_gate * (1 - s_gate)
    gate2 = gate1 * (1 - 2 * s_gate)
    y_core, y_gate = silu1 * s_gate, silu * gate1

    u_core = _apply_jacobian(x_core, r_core, v_core, center)
    u_gate = _apply_jacobian(x_gate, r_gate, v_gate, center)
    p_core, p_gate = u_core * weight[0], u_gate * weight[1]
    g_grad = p_core * y_core + p_gate * y_gate
    mixed = silu1 * gate1
    k_core = grad * (p_core * silu2 * s_gate + p_gate * mixed)
    k_gate = grad * (p_core * mixed + p_gate * silu * gate2)
    g_core, g_gate = grad * y_core, grad * y_gate
    return (
        _apply_jacobian(x_core, r_core, k_core * weight[0], center)
        + _jacobian_derivative(x_core, r_core, g_core * weight[0], v_core, center),
        _apply_jacobian(x_gate, r_gate, k_gate * weight[1], center)
        + _jacobian_derivative(x_gate, r_gate, g_gate * weight[1], v_gate, center),
        g_grad,
        torch.stack([(k_core * x_core + u_core * g_core).sum(0), (k_gate * x_gate + u_gate * g_gate).sum(0)]),
        torch.stack([k_core.sum(0), k_gate.sum(0)]),
    )


def _jacobian_derivative(x: Tensor, inverse: Tensor, g: Tensor, v: Tensor, center: bool) -> Tensor:
    """Gradient of <v, J g> for z: -r^2 (x (m(v g) - 3 m(x g) m(x v)) + m(x v) g + m(x g) v), v and g centred."""
    if center:
        g, v = g - _mean(g), v - _mean(v)
    xg, xv = _mean(x * g), _mean(x * v)
    return -inverse * inverse * (x * (_mean(v * g) - 3 * xg * xv) + xv * g + xg * v)
