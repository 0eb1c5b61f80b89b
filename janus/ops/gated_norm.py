"""SiLU(norm(core)) * sigmoid(norm(gate)) as one function with hand-written first and second derivatives.

Both derivatives keep the two inputs and the incoming gradient, nothing else: everything between is computed again, a
slice of rows at a time. `tests/janus/ops` compares them with plain torch and runs gradcheck and gradgradcheck.

Notation, per row and half (core or gate), m() the mean over channels:
    x = r (z - m(z)),  r = (m((z - m(z))^2) + eps)^(-1/2)       (RMS norm: without the mean)
    a = w x + b,       y = silu(a_core) sigmoid(a_gate)
    J v = r (v - m(v) - x m(x v))                               dx/dz applied to v; J is symmetric

Layer norm uses torch's fused kernels while nothing is recorded. When derivatives are themselves recorded, and for RMS
norm, the formulas are written out: torch's own derivatives of layer norm are not right beyond the second order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
            core_norm = _Norm.of(core, weight, bias, 0, eps, center)
            gate_norm = _Norm.of(gate, weight, bias, 1, eps, center)
            return (functional.silu(core_norm.out) * gate_norm.out.sigmoid(),)

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


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """One half's norm: a = w x + b of the notation above, with what its derivatives need.

    Attributes:
        z, out: input and output, (N, d).
        mean, inverse: m(z) (None for RMS norm) and r, (N, 1).
        weight, bias: (d,), bias may be None.
        fused: whether torch's kernels serve.
    """

    z: Tensor
    out: Tensor
    mean: Tensor | None
    inverse: Tensor
    weight: Tensor
    bias: Tensor | None
    fused: bool

    @staticmethod
    def of(z: Tensor, weights: Tensor, biases: Tensor | None, half: int, eps: float, center: bool) -> _Norm:
        weight, bias = weights[half], None if biases is None else biases[half]
        fused = center and not torch.is_grad_enabled()
        mean: Tensor | None
        if fused:
            out, mean, inverse = torch.native_layer_norm(z, z.shape[-1:], weight, bias, eps)
        else:
            mean = _mean(z) if center else None
            centered = z if mean is None else z - mean
            inverse = (_mean(centered * centered) + eps).rsqrt()
            out = centered * inverse * weight
            out = out if bias is None else out + bias
        return _Norm(z=z, out=out, mean=mean, inverse=inverse, weight=weight, bias=bias, fused=fused)

    def normalised(self) -> Tensor:
        """x, (N, d)."""
        return (self.z if self.mean is None else self.z - self.mean) * self.inverse

    def jacobian(self, v: Tensor) -> Tensor:
        """J v, (N, d)."""
        if self.fused:
            return self._fused_backward(v, None, [True, False, False])[0]
        x = self.normalised()
        projected = v if self.mean is None else v - _mean(v)
        return self.inverse * (projected - x * _mean(x * v))

    def backward(self, grad: Tensor, *, affine: bool) -> tuple[Any, ...]:
        """From the gradient of `out` those of z, weight and bias; the latter two None unless `affine`."""
        if self.fused:
            return self._fused_backward(grad, self.weight, [True, affine, affine])
        gradients = (grad * self.normalised()).sum(0), grad.sum(0)
        return self.jacobian(grad * self.weight), *(gradients if affine else (None, None))

    def jacobian_derivative(self, g: Tensor, v: Tensor) -> Tensor:
        """Gradient of <v, J g> for z: -r^2 C(x (m(C v C g) - 3 m(x g) m(x v)) + m(x v) g + m(x g) v), Cv = v - m(v)."""
        x = self.normalised()
        xg, xv, vg = _mean(x * g), _mean(x * v), _mean(v * g)
        if self.mean is not None:
            vg = vg - _mean(v) * _mean(g)
        total = torch.addcmul(torch.addcmul(x * (vg - 3 * xg * xv), g, xv), v, xg)
        if self.mean is not None:
            total = total - _mean(total)
        return -self.inverse.square() * total

    def _fused_backward(self, grad: Tensor, weight: Tensor | None, mask: list[bool]) -> tuple[Any, ...]:
        return torch.ops.aten.native_layer_norm_backward(
            grad,
            self.z,
            self.z.shape[-1:],
            self.mean,
            self.inverse,
            weight,
            None if weight is None else self.bias,
            mask,
        )


def _first_derivative(core, gate, weight, bias, grad, eps, center, *, affine: bool) -> tuple[Tensor, ...]:
    """Gradients of core and gate, and of weight and bias (2, d) if asked for."""
    core_norm = _Norm.of(core, weight, bias, 0, eps, center)
    gate_norm = _Norm.of(gate, weight, bias, 1, eps, center)
    s_gate = gate_norm.out.sigmoid()
    g_core = _silu_backward(grad * s_gate, core_norm.out)
    g_gate = _sigmoid_backward(grad * functional.silu(core_norm.out), s_gate)
    core, core_weight, core_bias = core_norm.backward(g_core, affine=affine)
    gate, gate_weight, gate_bias = gate_norm.backward(g_gate, affine=affine)
    if not affine:
        return core, gate
    return core, gate, torch.stack([core_weight, gate_weight]), torch.stack([core_bias, gate_bias])


def _affine_gradients(core, gate, weight, bias, grad, eps, center) -> tuple[Tensor, Tensor]:
    """Weight and bias gradients as recorded torch operations, for derivatives of weight gradients themselves."""
    return _first_derivative(core, gate, weight, bias, grad, eps, center, affine=True)[2:]  # type: ignore[return-value]


def _second_derivative(core, gate, weight, bias, grad, v_core, v_gate, eps, center) -> tuple[Tensor, ...]:
    """Gradients of <v_core, dcore> + <v_gate, dgate> for core, gate, grad, weight and bias.

    dcore and dgate are the outputs of `_first_derivative`.
    """
    core_norm = _Norm.of(core, weight, bias, 0, eps, center)
    gate_norm = _Norm.of(gate, weight, bias, 1, eps, center)
    a_core, s_core, s_gate = core_norm.out, core_norm.out.sigmoid(), gate_norm.out.sigmoid()
    silu = functional.silu(a_core)
    u_core, u_gate = core_norm.jacobian(v_core), gate_norm.jacobian(v_gate)
    p_core, p_gate = u_core * core_norm.weight, u_gate * gate_norm.weight

    core_slope = _silu_backward(p_core, a_core)
    gate_slope = _sigmoid_backward(p_gate, s_gate)
    g_grad = torch.addcmul(core_slope * s_gate, silu, gate_slope)

    graded, graded_slope = grad * s_gate, grad * gate_slope
    # silu''(a) = s (1 - s) (2 + a - 2 a s), sigmoid''(a) = s (1 - s) (1 - 2 s)
    bend = torch.addcmul(a_core + 2, a_core, s_core, value=-2)
    k_core = _sigmoid_backward(p_core * graded, s_core) * bend + _silu_backward(graded_slope, a_core)
    turned = graded_slope * silu
    k_gate = torch.addcmul(turned, turned, s_gate, value=-2) + _sigmoid_backward(grad * core_slope, s_gate)
    g_core = _silu_backward(graded, a_core)
    g_gate = _sigmoid_backward(grad * silu, s_gate)

    from_core, core_weight, core_bias = core_norm.backward(k_core, affine=True)
    from_gate, gate_weight, gate_bias = gate_norm.backward(k_gate, affine=True)
    return (
        from_core + core_norm.jacobian_derivative(g_core * core_norm.weight, v_core),
        from_gate + gate_norm.jacobian_derivative(g_gate * gate_norm.weight, v_gate),
        g_grad,
        torch.stack([core_weight + (u_core * g_core).sum(0), gate_weight + (u_gate * g_gate).sum(0)]),
        torch.stack([core_bias, gate_bias]),
    )


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad silu'(x)."""
    if torch.is_grad_enabled():
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))
    return torch.ops.aten.silu_backward(grad, x)


def _sigmoid_backward(grad: Tensor, sigmoid: Tensor) -> Tensor:
    """grad sigmoid'(x), given sigmoid(x)."""
    return torch.ops.aten.sigmoid_backward(grad, sigmoid)
