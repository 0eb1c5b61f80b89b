"""Numerator and denominator of an enveloped, channel-wise softmax over the edges of a node.

With logits s, envelope u and message m of an edge, a node's aggregate is

    sum_e u_e exp(c(s_e)) u_e m_e / (sum_e u_e exp(c(s_e)) + delta),     c(s) = cap tanh(s / cap)

Both sums are linear in per-edge terms, so they may be formed in any order and in parts. Because the logits are capped,
no running maximum is needed, and an edge enters both sums with weight zero and slope zero at the cutoff.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus.ops.rowwise import map_rows


def attention_terms(logits: Tensor, message: Tensor, envelope: Tensor | None, *, cap: float | None) -> Tensor:
    """Per-edge terms of the two sums, differentiable any number of times.

    Args:
        logits: (E, d).
        message: (E, d), u m of the sums above.
        envelope: (E, 1), u of each edge; None for u = 1.
        cap: bound of the logits, or None to take them as they are.
    Returns:
        (E, 2 d): u exp(c(s)) and u exp(c(s)) message.
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
    def forward(ctx: Any, logits: Tensor, message: Tensor, envelope: Tensor | None, cap: float | None) -> Tensor:
        ctx.save_for_backward(logits, message, envelope)
        ctx.cap = cap

        def terms(logits: Tensor, message: Tensor, u: Tensor | None = None) -> tuple[Tensor]:
            exp, _ = _exponential(logits, cap)
            weight = exp if u is None else exp * u
            return (torch.cat([weight, weight * message], dim=1),)

        return map_rows(terms, _present(logits, message, envelope))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        logits, message, envelope = ctx.saved_tensors
        grads = _TermsGrad.apply(logits, message, grad, envelope, ctx.cap)
        return grads[0], grads[1], grads[2] if envelope is not None else None, None


class _TermsGrad(torch.autograd.Function):
    """Gradients of logits, message and (if there is one) envelope, as a function of the incoming gradient (E, 2 d)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, message: Tensor, grad: Tensor, envelope: Tensor | None, cap: float | None):
        ctx.save_for_backward(logits, message, grad, envelope)
        ctx.cap = cap

        def first(logits: Tensor, message: Tensor, grad: Tensor, u: Tensor | None = None) -> tuple[Tensor, ...]:
            exp, tanh = _exponential(logits, cap)
            g_weight, g_value = grad.chunk(2, dim=1)
            g_exp = torch.addcmul(g_weight, message, g_value) * exp
            weight = exp if u is None else exp * u
            g_logits = g_exp if u is None else g_exp * u
            if tanh is not None:
                g_logits = torch.addcmul(g_logits, g_logits, tanh.square(), value=-1)
            outputs = g_logits, weight * g_value
            return outputs if u is None else (*outputs, g_exp.sum(dim=1, keepdim=True))

        return map_rows(first, _present(logits, message, grad, envelope))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):
        """Gradients of <v_s, dlogits> + <v_m, dmessage> + <v_u, denvelope>.

        With e = exp(c(s)), h = g_weight + m g_value and p = u c'(s) v_s + v_u, those three inner products sum to
        e h p + e u g_value v_m, of which the lines below are the derivatives.
        """
        logits, message, grad, envelope = ctx.saved_tensors

        def second(logits, message, grad, v_s, v_m, u=None, v_u=None) -> tuple[Tensor, ...]:
            exp, tanh = _exponential(logits, ctx.cap)
            g_weight, g_value = grad.chunk(2, dim=1)
            h = torch.addcmul(g_weight, message, g_value)
            slope = None if tanh is None else 1 - tanh.square()
            vs_slope = v_s if slope is None else v_s * slope
            p = vs_slope if u is None else torch.addcmul(v_u, vs_slope, u)
            ep = exp * p
            vm_u = v_m if u is None else v_m * u
            g_grad = torch.cat([ep, torch.addcmul(exp * vm_u, ep, message)], dim=1)
            if tanh is None or slope is None:
                g_logits = exp * torch.addcmul(p * h, vm_u, g_value)
            else:
                # p depends on s as well: c'' = -2 / cap tanh c'.
                bent = v_s * tanh if u is None else v_s * tanh * u
                turn = torch.add(p, bent, alpha=-2 / ctx.cap)
                g_logits = exp * slope * torch.addcmul(turn * h, vm_u, g_value)
            outputs = g_logits, ep * g_value, g_grad
            if u is None:
                return outputs
            return (*outputs, (exp * torch.addcmul(vs_slope * h, v_m, g_value)).sum(dim=1, keepdim=True))

        v_s, v_m, *v_u = cotangents
        grads = map_rows(second, _present(logits, message, grad, v_s, v_m, envelope, *v_u))
        return (*grads, None) if envelope is not None else (*grads, None, None)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
