"""SiLU(norm(core)) * sigmoid(norm(gate)) as one function with hand-written first and second derivatives.

Both derivatives keep the two inputs and the incoming gradient, nothing else: everything between is computed again, a
slice of rows at a time and in place. Higher orders, and gradients of weight gradients, are recorded operations.
`tests/janus/ops` compares all of them with plain torch and runs gradcheck and gradgradcheck.

Notation, per row and half (core or gate), m() the mean over channels:
    x = r (z - m(z)),  r = (m((z - m(z))^2) + eps)^(-1/2)       (RMS norm: without the mean)
    a = w x + b,       y = silu(a_core) sigmoid(a_gate)
    J v = r (v - m(v) - x m(x v))                               dx/dz applied to v; J is symmetric
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.demand import wants_gradient
from janus.ops.fused import fusable
from janus.ops.recompute import recomputable
from janus.ops.recorded import recorded_gradients
from janus.ops.rowwise import map_rows

_aten = torch.ops.aten


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
    function = partial(_rows_value, eps=eps, center=center)
    return recomputable(_GatedNorm.apply(core, gate, weight, bias, eps, center), function, core, gate, weight, bias)


def plain_gated_norm(
    core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, center: bool
) -> Tensor:
    """The same in recorded torch operations; written out, as the third derivative of torch's layer norm is wrong."""

    def norm(z: Tensor, half: int) -> Tensor:
        z = z - _mean(z) if center else z
        x = z * (_mean(z * z) + eps).rsqrt() * weight[half]
        return x if bias is None else x + bias[half]

    a_core = norm(core, 0)
    return a_core * a_core.sigmoid() * norm(gate, 1).sigmoid()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool):
        ctx.save_for_backward(core, gate, weight, bias)
        ctx.norm = {"eps": eps, "center": center}
        return _rows_value(core, gate, weight, bias, **ctx.norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        core, gate, weight, bias = ctx.saved_tensors
        affine = wants_gradient(ctx, 2) or wants_gradient(ctx, 3)
        if not torch.is_grad_enabled():

            def first(core: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
                return _first_derivative(core, gate, weight, bias, grad, affine=affine, **ctx.norm)

            results = map_rows(first, (core, gate, grad), num_summed=2 if affine else 0)
            g_weight, g_bias = results[2:] or (None, None)
            return results[0], results[1], g_weight, None if bias is None else g_bias, None, None
        if not affine:
            inputs = (core, gate, weight, bias, grad)
            results = recomputable(_GatedNormGrad.apply(*inputs, ctx.norm), partial(_gradients, **ctx.norm), *inputs)
            return *results, None, None, None, None

        def plain(core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return plain_gated_norm(core, gate, weight, bias, **ctx.norm)

        return *recorded_gradients(plain, (core, gate, weight, bias), (grad,)), None, None


class _GatedNormGrad(torch.autograd.Function):
    """Gradients of the two inputs, (N, d) each, as a function of inputs, affine parameters and incoming gradient."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, norm: dict):
        ctx.save_for_backward(core, gate, weight, bias, grad)
        ctx.norm = norm
        return _gradients(core, gate, weight, bias, grad, **norm)

    @staticmethod
    def backward(ctx: Any, v_core: Tensor, v_gate: Tensor):
        core, gate, weight, bias, grad = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(core: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor):
                def value(*inputs: Tensor) -> Tensor:
                    return plain_gated_norm(*inputs, **ctx.norm)

                return recorded_gradients(value, (core, gate, weight, bias), (grad,), count=2)

            return *recorded_gradients(plain, (core, gate, weight, bias, grad), (v_core, v_gate)), None

        def second(core: Tensor, gate: Tensor, grad: Tensor, v_core: Tensor, v_gate: Tensor) -> tuple[Tensor, ...]:
            return _second_derivative(core, gate, weight, bias, grad, v_core, v_gate, **ctx.norm)

        rows = (core, gate, grad, v_core, v_gate)
        g_core, g_gate, g_grad, g_weight, g_bias = map_rows(second, rows, num_summed=2)
        return g_core, g_gate, g_weight, None if bias is None else g_bias, g_grad, None


def _rows_value(core, gate, weight, bias, *, eps: float, center: bool) -> Tensor:
    def value(core: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return _value(core, gate, weight, bias, eps=eps, center=center)

    return map_rows(value, (core, gate))[0]


def _gradients(core, gate, weight, bias, grad, *, eps: float, center: bool) -> tuple[Tensor, ...]:
    """Of core and gate alone."""

    def first(core: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return _first_derivative(core, gate, weight, bias, grad, affine=False, eps=eps, center=center)

    return map_rows(first, (core, gate, grad))


def _mean(v: Tensor) -> Tensor:
    return v.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """One half's norm: a = w x + b of the notation above, with what its derivatives need. Nothing is recorded.

    Attributes:
        z, out: input and output, (N, d).
        mean, inverse: m(z) (None for RMS norm) and r, (N, 1).
        weight, bias: (d,), bias may be None.
    """

    z: Tensor
    out: Tensor
    mean: Tensor | None
    inverse: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(z: Tensor, weights: Tensor, biases: Tensor | None, half: int, *, eps: float, center: bool) -> _Norm:
        weight, bias = weights[half], None if biases is None else biases[half]
        if center:
            out, mean, inverse = torch.native_layer_norm(z, z.shape[-1:], weight, bias, eps)
        else:
            mean, inverse = None, (_mean(z * z) + eps).rsqrt()
            out = (z * inverse).mul_(weight)
            out = out if bias is None else out.add_(bias)
        return _Norm(z=z, out=out, mean=mean, inverse=inverse, weight=weight, bias=bias)

    def normalised(self) -> Tensor:
        """x, (N, d)."""
        return self.z * self.inverse if self.mean is None else (self.z - self.mean).mul_(self.inverse)

    def jacobian(self, v: Tensor) -> Tensor:
        """J v, (N, d)."""
        if self.mean is not None:
            return self._fused_backward(v, None, affine=False)[0]
        x = self.normalised()
        return torch.addcmul(v, x, _mean(x * v), value=-1).mul_(self.inverse)

    def backward(self, grad: Tensor, *, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient of `out` those of z, weight and bias; the latter two undefined unless `affine`."""
        if self.mean is not None:
            return self._fused_backward(grad, self.weight, affine=affine)
        g_weight, g_bias = ((grad * self.normalised()).sum(0), grad.sum(0)) if affine else (grad, grad)
        return self.jacobian(grad * self.weight), g_weight, g_bias

    def second_backward(self, g: Tensor, v: Tensor, jacobian_v: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of <v, J (w g)> + <k, out> for z, weight and bias; `k` is overwritten.

        The first term's gradient for z is -r (m(w g J v) x + m(x w g) J v + m(x v) J (w g)).
        """
        x, inverse, mean_weight = self.normalised(), self.inverse, (self.weight / self.weight.shape[0])[:, None]
        product = g * jacobian_v
        from_x = product @ mean_weight
        from_jacobian_v = (x * g) @ mean_weight
        from_g = _mean(x * v)
        g_weight, g_bias = product.addcmul_(k, x).sum(0), k.sum(0)
        g_z = self.backward(k.addcmul_(g, inverse * from_g, value=-1), affine=False)[0]
        g_z = g_z.addcmul_(x, inverse * from_x, value=-1).addcmul_(jacobian_v, inverse * from_jacobian_v, value=-1)
        return g_z, g_weight, g_bias

    def _fused_backward(self, grad: Tensor, weight: Tensor | None, *, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
        bias = None if weight is None else self.bias
        return _aten.native_layer_norm_backward(
            grad, self.z, self.z.shape[-1:], self.mean, self.inverse, weight, bias, [True, affine, affine]
        )


@fusable("gated_norm.value")
def _value(core, gate, weight, bias, *, eps, center) -> tuple[Tensor, ...]:
    core_norm = _Norm.of(core, weight, bias, 0, eps=eps, center=center)
    gate_norm = _Norm.of(gate, weight, bias, 1, eps=eps, center=center)
    return (functional.silu(core_norm.out, inplace=True).mul_(gate_norm.out.sigmoid_()),)


@fusable("gated_norm.first_derivative")
def _first_derivative(core, gate, weight, bias, grad, *, eps, center, affine: bool) -> tuple[Tensor, ...]:
    """Gradients of core and gate, and of weight and bias (2, d) if asked for."""
    core_norm = _Norm.of(core, weight, bias, 0, eps=eps, center=center)
    gate_norm = _Norm.of(gate, weight, bias, 1, eps=eps, center=center)
    s_gate = gate_norm.out.sigmoid_()
    g_core = _aten.silu_backward(grad * s_gate, core_norm.out)
    g_gate = _aten.sigmoid_backward(functional.silu(core_norm.out, inplace=True).mul_(grad), s_gate)
    from_core, core_weight, core_bias = core_norm.backward(g_core, affine=affine)
    from_gate, gate_weight, gate_bias = gate_norm.backward(g_gate, affine=affine)
    if not affine:
        return from_core, from_gate
    return from_core, from_gate, torch.stack([core_weight, gate_weight]), torch.stack([core_bias, gate_bias])


@fusable("gated_norm.second_derivative")
def _second_derivative(core, gate, weight, bias, grad, v_core, v_gate, *, eps, center) -> tuple[Tensor, ...]:
    """Gradients of <v_core, dcore> + <v_gate, dgate> for core, gate, grad, weight and bias.

    dcore and dgate are the outputs of `_first_derivative`.
    """
    core_norm = _Norm.of(core, weight, bias, 0, eps=eps, center=center)
    gate_norm = _Norm.of(gate, weight, bias, 1, eps=eps, center=center)
    a_core = core_norm.out
    s_core, s_gate, silu = a_core.sigmoid(), gate_norm.out.sigmoid_(), functional.silu(a_core)
    u_core, u_gate = core_norm.jacobian(v_core), gate_norm.jacobian(v_gate)
    p_core = u_core * core_norm.weight

    core_slope = _aten.silu_backward(p_core, a_core)
    gate_slope = _aten.sigmoid_backward(u_gate * gate_norm.weight, s_gate)
    g_grad = (core_slope * s_gate).addcmul_(silu, gate_slope)

    graded = grad * s_gate
    graded_slope = gate_slope.mul_(grad)
    g_core = _aten.silu_backward(graded, a_core)
    g_gate = _aten.sigmoid_backward(silu * grad, s_gate)
    # silu''(a) = s (1 - s) (2 + a - 2 a s), sigmoid''(a) = s (1 - s) (1 - 2 s)
    bend = torch.addcmul(a_core, a_core, s_core, value=-2).add_(2)
    k_core = _aten.sigmoid_backward(p_core.mul_(graded), s_core).mul_(bend)
    k_core += _aten.silu_backward(graded_slope, a_core)
    turned = silu.mul_(graded_slope)
    k_gate = torch.addcmul(turned, turned, s_gate, value=-2)
    k_gate += _aten.sigmoid_backward(core_slope.mul_(grad), s_gate)

    from_core, core_weight, core_bias = core_norm.second_backward(g_core, v_core, u_core, k_core)
    from_gate, gate_weight, gate_bias = gate_norm.second_backward(g_gate, v_gate, u_gate, k_gate)
    return from_core, from_gate, g_grad, torch.stack([core_weight, gate_weight]), torch.stack([core_bias, gate_bias])
