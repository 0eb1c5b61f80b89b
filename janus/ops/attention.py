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

        def terms(logits: Tensor, message: Tensor, envelope: Tensor) -> tuple[Tensor]:
            weight = envelope * _exponential(logits, cap)[0]
            return (torch.cat([weight, envelope * weight * message], dim=1),)

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
            slope = exp if tanh is None else exp * (1 - tanh * tanh)
            g_weight, g_value = grad.chunk(2, dim=1)
            h = u * (g_weight + u * message * g_value)
            g_envelope = (exp * (g_weight + 2 * u * message * g_value)).sum(dim=1, keepdim=True)
            return slope * h, u * u * exp * g_value, g_envelope

        return map_rows(first, (logits, message, envelope, grad))

    @staticmethod
    def backward(ctx: Any, v_logits: Tensor, v_message: Tensor, v_envelope: Tensor):
        def second(logits, message, u, grad, v_s, v_m, v_u) -> tuple[Tensor, ...]:
            exp, tanh = _exponential(logits, ctx.cap)
            if tanh is None:
                slope = curvature = exp
            else:
                sech = 1 - tanh * tanh
                slope = exp * sech
                curvature = slope * (sech - 2 / ctx.cap * tanh)
            g_weight, g_value = grad.chunk(2, dim=1)
            mg = message * g_value
            sum_1 = g_weight + u * mg
            sum_2 = sum_1 + u * mg
            vs = v_s * slope
            g_logits = v_s * curvature * (u * sum_1) + slope * (u * u * v_m * g_value + v_u * sum_2)
            g_message = (u * u * vs + 2 * v_u * u * exp) * g_value
            g_u = (vs * sum_2 + 2 * exp * (u * v_m * g_value + v_u * mg)).sum(dim=1, keepdim=True)
            g_grad = torch.cat(
                [u * vs + v_u * exp, u * (u * vs * message + exp * (u * v_m + 2 * v_u * message))], dim=1
            )
            return g_logits, g_message, g_u, g_grad

        return (*map_rows(second, (*ctx.saved_tensors, v_logits, v_message, v_envelope)), None)
