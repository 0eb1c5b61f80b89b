"""Numerator and denominator of an enveloped, channel-wise softmax over the edges of a node.

With logits s, envelope u and message m of an edge, a node's aggregate is

    sum_e u_e exp(c(s_e)) u_e m_e / (sum_e u_e exp(c(s_e)) + delta),     c(s) = cap tanh(s / cap)

Both sums are linear in per-edge terms, so they may be formed in any order and in parts. Because the logits are capped,
no running maximum is needed, and an edge enters both sums with weight zero and slope zero at the cutoff.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from janus.ops.fused import fusable
from janus.ops.recorded import recorded_gradients
from janus.ops.rowwise import map_rows


def attention_terms(
    logits: Tensor, message: Tensor, envelope: Tensor | None, *, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Per-edge terms of the two sums, differentiable any number of times.

    Args:
        logits: (E, d).
        message: (E, d), u m of the sums above.
        envelope: (E, 1), u of each edge; None for u = 1.
        cap: bound of the logits, or None to take them as they are.
    Returns:
        u exp(c(s)) and u exp(c(s)) message, (E, d) each.
    """
    return _Terms.apply(logits, message, envelope, cap)


def plain_attention_terms(
    logits: Tensor, message: Tensor, envelope: Tensor | None, *, cap: float | None
) -> tuple[Tensor, Tensor]:
    """The same in recorded torch operations."""
    weight = (logits if cap is None else cap * (logits / cap).tanh()).exp()
    weight = weight if envelope is None else weight * envelope
    return weight, weight * message


def _exponential(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """exp(c(s)) and tanh(s / cap)."""
    if cap is None:
        return logits.exp(), None
    tanh = (logits / cap).tanh_()
    return (cap * tanh).exp_(), tanh


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, message: Tensor, envelope: Tensor | None, cap: float | None):
        ctx.save_for_backward(logits, message, envelope)
        ctx.cap = cap

        return map_rows(partial(_value, cap=cap), _present(logits, message, envelope))

    @staticmethod
    def backward(ctx: Any, g_weight: Tensor, g_value: Tensor):
        logits, message, envelope = ctx.saved_tensors
        grads = _TermsGrad.apply(logits, message, envelope, g_weight, g_value, ctx.cap)
        return grads[0], grads[1], None if envelope is None else grads[2], None


class _TermsGrad(torch.autograd.Function):
    """Gradients of logits, message and (if there is one) envelope, as a function of the incoming gradients."""

    @staticmethod
    def forward(ctx: Any, logits, message, envelope, g_weight, g_value, cap: float | None):
        ctx.save_for_backward(logits, message, envelope, g_weight, g_value)
        ctx.cap = cap

        return map_rows(partial(_first_derivative, cap=cap), _present(logits, message, g_weight, g_value, envelope))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):
        """Gradients of <v_s, dlogits> + <v_m, dmessage> + <v_u, denvelope>.

        With e = exp(c(s)), h = g_weight + m g_value and p = u c'(s) v_s + v_u, those three inner products sum to
        e h p + e u g_value v_m, of which the lines below are the derivatives.
        """
        logits, message, envelope, g_weight, g_value = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(logits, message, envelope, g_weight, g_value):
                def value(*inputs):
                    return plain_attention_terms(*inputs, cap=ctx.cap)

                grads = recorded_gradients(value, (logits, message, envelope), (g_weight, g_value))
                return _present(*grads)

            return *recorded_gradients(plain, (logits, message, envelope, g_weight, g_value), cotangents), None

        v_s, v_m, *v_u = cotangents
        second = partial(_second_derivative, cap=ctx.cap)
        rows = _present(logits, message, g_weight, g_value, v_s, v_m, envelope, *v_u)
        g_logits, g_message, g_g_weight, g_g_value, *g_envelope = map_rows(second, rows)
        return g_logits, g_message, (g_envelope or [None])[0], g_g_weight, g_g_value, None


@fusable
def _value(logits, message, u=None, *, cap) -> tuple[Tensor, ...]:
    exp, _ = _exponential(logits, cap)
    weight = exp if u is None else exp.mul_(u)
    return weight, weight * message


@fusable
def _first_derivative(logits, message, g_weight, g_value, u=None, *, cap) -> tuple[Tensor, ...]:
    exp, tanh = _exponential(logits, cap)
    g_logits = torch.addcmul(g_weight, message, g_value).mul_(exp)
    g_envelope = () if u is None else (g_logits.sum(dim=1, keepdim=True),)
    if u is not None:
        exp.mul_(u)
        g_logits.mul_(u)
    if tanh is not None:
        g_logits.mul_(tanh.square_().neg_().add_(1))
    return g_logits, exp.mul_(g_value), *g_envelope


@fusable
def _second_derivative(logits, message, g_weight, g_value, v_s, v_m, u=None, v_u=None, *, cap) -> tuple[Tensor, ...]:
    exp, tanh = _exponential(logits, cap)
    h = torch.addcmul(g_weight, message, g_value)
    slope = None if tanh is None else (1 - tanh.square())
    vs_slope = v_s if slope is None else v_s * slope
    p = vs_slope if u is None else torch.addcmul(v_u, vs_slope, u)
    ep = exp * p
    vm_g = v_m * g_value
    g_envelope: tuple[Tensor, ...] = ()
    if u is not None:
        g_envelope = ((vs_slope * h).add_(vm_g).mul_(exp).sum(dim=1, keepdim=True),)
        vm_g.mul_(u)
        v_m = v_m * u
    if tanh is None:
        g_logits = vm_g.addcmul_(p, h).mul_(exp)
    else:
        # p depends on s as well: c'' = -2 / cap tanh c'.
        bent = tanh.mul_(v_s) if u is None else tanh.mul_(v_s).mul_(u)
        turn = torch.add(p, bent, alpha=-2 / cap)
        g_logits = vm_g.addcmul_(turn, h).mul_(exp).mul_(slope)
    g_g_value = exp.mul_(v_m).addcmul_(ep, message)
    return g_logits, ep * g_value, ep, g_g_value, *g_envelope


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
