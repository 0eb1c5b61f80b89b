"""Numerator and denominator of an enveloped, channel-wise softmax over the edges of a node.

With logits s, envelope u and message m of an edge, a node's aggregate is

    sum_e u_e^2 exp(c(s_e)) m_e / (sum_e u_e exp(c(s_e)) + delta),     c(s) = cap tanh(s / cap)

Both sums are linear in per-edge terms, so they may be formed in any order and in parts. Because the logits are capped,
no running maximum is needed, and an edge enters both sums with weight zero and slope zero at the cutoff.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus.ops.rowwise import map_rows


def attention_terms(logits: Tensor, message: Tensor, envelope: Tensor, *, cap: float | None) -> Tensor:
    """Per-edge terms of the two sums, differentiable any number of times.

    Args:
        logits: (E, d).
        message: (E, d).
        envelope: (E, 1), u of each edge.
        cap: bound of the logits, or None to take them as they are.
    Returns:
        (E, 2 d): u exp(c(s)) and u^2 exp(c(s)) m.
    """
    return _Terms.apply(logits, message, envelope, cap)


def _exponential(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """exp(c(s)) and tanh(s / cap)."""
    if cap is None:
        return logits.exp(), None
    tanh = (logits / cap).tanh()
    return (cap * tanh).exp(), tanh


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, message: Tensor, envelope: Tensor, cap: float | None) -> Tensor:
        ctx.save_for_backward(logits, message, envelope)
        ctx.cap = cap

        def terms(logits: Tensor, message: Tensor, u: Tensor) -> tuple[Tensor]:
            weight = _exponential(logits, cap)[0] * u
            return (torch.cat([weight, message * u * weight], dim=1),)

        return map_rows(terms, (logits, message, envelope))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return (*_TermsGrad.apply(*ctx.saved_tensors, grad, ctx.cap), None)


class _TermsGrad(torch.autograd.Function):
    """Gradients of logits, message and envelope, as a function of them and of the incoming gradient (E, 2 d)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, message: Tensor, envelope: Tensor, grad: Tensor, cap: float | None):
        ctx.save_for_backward(logits, message, envelope, grad)
        ctx.cap = cap

        def first(logits: Tensor, message: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            exp, tanh = _exponential(logits, cap)
            g_weight, g_value = grad.chunk(2, dim=1)
            value = message * g_value * u
            sum_1 = g_weight + value
            g_envelope = (exp * (sum_1 + value)).sum(dim=1, keepdim=True)
            weight = exp * u
            g_logits = weight * sum_1
            if tanh is not None:
                g_logits = g_logits * (1 - tanh * tanh)
            return g_logits, weight * u * g_value, g_envelope

        return map_rows(first, (logits, message, envelope, grad))

    @staticmethod
    def backward(ctx: Any, v_logits: Tensor, v_message: Tensor, v_envelope: Tensor):
        """Gradients of <v_logits, dlogits> + <v_message, dmessage> + <v_envelope, denvelope>."""

        def second(logits, message, u, grad, v_s, v_m, v_u) -> tuple[Tensor, ...]:
            exp, tanh = _exponential(logits, ctx.cap)
            g_weight, g_value = grad.chunk(2, dim=1)
            value = message * g_value * u
            sum_1 = g_weight + value
            sum_2 = sum_1 + value
            mixed = v_m * u + message * (2 * v_u)
            if tanh is None:
                vs, bend = v_s, v_s
            else:
                sech = 1 - tanh * tanh
                vs = v_s * sech
                bend = vs * torch.add(sech, tanh, alpha=-2 / ctx.cap)
            weight = exp * u
            g_logits = bend * weight * sum_1 + (v_m * weight * u * g_value + v_u * exp * sum_2) * (
                1 if tanh is None else sech
            )
            vs_exp = vs * exp
            g_message = (vs_exp * u + exp * (2 * v_u)) * u * g_value
            g_u = (vs_exp * sum_2 + exp * g_value * (v_m * (2 * u) + message * (2 * v_u))).sum(dim=1, keepdim=True)
            g_grad = torch.cat([vs_exp * u + exp * v_u, u * (vs_exp * u * message + exp * mixed)], dim=1)
            return g_logits, g_message, g_u, g_grad

        return (*map_rows(second, (*ctx.saved_tensors, v_logits, v_message, v_envelope)), None)
