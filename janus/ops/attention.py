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
from janus.ops.recompute import recomputable
from janus.ops.recorded import recorded_gradients
from janus.ops.rowwise import map_rows


def attention_terms(
    logits: Tensor, message: Tensor, envelope: Tensor | None, *, cap: float | None
) -> tuple[Tensor, ...]:
    """Per-edge terms of the two sums, differentiable any number of times.

    An edge may belong to several nodes, its target and its source, with logits for each.

    Args:
        logits: (E, k d), those of each of the k nodes of an edge.
        message: (E, d), u m of the sums above.
        envelope: (E, 1), u of each edge; None for u = 1.
        cap: bound of the logits, or None to take them as they are.
    Returns:
        u exp(c(s)) and u exp(c(s)) message, (E, d) each, for each of the k nodes.
    """
    return _Terms.apply(logits, message, envelope, cap)


def plain_attention_terms(
    logits: Tensor, message: Tensor, envelope: Tensor | None, *, cap: float | None
) -> tuple[Tensor, ...]:
    """The same in recorded torch operations."""
    terms: list[Tensor] = []
    for of_node in logits.split(message.shape[1], dim=1):
        weight = (of_node if cap is None else cap * (of_node / cap).tanh()).exp()
        weight = weight if envelope is None else weight * envelope
        terms += [weight, weight * message]
    return tuple(terms)


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
    def backward(ctx: Any, *grads: Tensor):
        logits, message, envelope = ctx.saved_tensors
        inputs = (logits, message, envelope, *grads)
        results = recomputable(_TermsGrad.apply(ctx.cap, *inputs), partial(_gradients, cap=ctx.cap), *inputs)
        return results[0], results[1], None if envelope is None else results[2], None


class _TermsGrad(torch.autograd.Function):
    """Gradients of logits, message and (if there is one) envelope, as a function of the incoming gradients."""

    @staticmethod
    def forward(ctx: Any, cap: float | None, logits, message, envelope, *grads: Tensor):
        ctx.save_for_backward(logits, message, envelope, *grads)
        ctx.cap = cap
        return _gradients(logits, message, envelope, *grads, cap=cap)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):
        """Gradients of <v_s, dlogits> + <v_m, dmessage> + <v_u, denvelope>.

        With e = exp(c(s)), h = g_weight + m g_value and p = u c'(s) v_s + v_u, those three inner products sum to
        e h p + e u g_value v_m for each node of an edge, of which the lines below are the derivatives.
        """
        logits, message, envelope, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(logits, message, envelope, *grads):
                def value(*inputs):
                    return plain_attention_terms(*inputs, cap=ctx.cap)

                return _present(*recorded_gradients(value, (logits, message, envelope), grads))

            return None, *recorded_gradients(plain, (logits, message, envelope, *grads), cotangents)

        second = partial(_second_derivative, cap=ctx.cap)
        v_s, v_m, *v_u = cotangents
        g_logits, g_message, *rest = map_rows(second, _present(logits, message, *grads, v_s, v_m, envelope, *v_u))
        g_envelope = rest.pop() if envelope is not None else None
        return None, g_logits, g_message, g_envelope, *rest


def _gradients(logits, message, envelope, *grads, cap) -> tuple[Tensor, ...]:
    return map_rows(partial(_first_derivative, cap=cap), _present(logits, message, *grads, envelope))


@fusable("attention.value")
def _value(logits, message, u=None, *, cap) -> tuple[Tensor, ...]:
    terms: list[Tensor] = []
    for of_node in logits.split(message.shape[1], dim=1):
        exp, _ = _exponential(of_node, cap)
        weight = exp if u is None else exp.mul_(u)
        terms += [weight, weight * message]
    return tuple(terms)


@fusable("attention.first_derivative")
def _first_derivative(logits, message, *rows, cap) -> tuple[Tensor, ...]:
    """`rows` are the gradients of weight and value for each node, and the envelope if there is one."""
    parts = logits.split(message.shape[1], dim=1)
    grads, (u, *_) = rows[: 2 * len(parts)], (*rows[2 * len(parts) :], None)
    of_logits, of_message, of_envelope = [], [], []
    for of_node, g_weight, g_value in zip(parts, grads[::2], grads[1::2], strict=True):
        exp, tanh = _exponential(of_node, cap)
        g_logits = torch.addcmul(g_weight, message, g_value).mul_(exp)
        if u is not None:
            of_envelope.append(g_logits.sum(dim=1, keepdim=True))
            exp.mul_(u)
            g_logits.mul_(u)
        if tanh is not None:
            g_logits.mul_(tanh.square_().neg_().add_(1))
        of_logits.append(g_logits)
        of_message.append(exp.mul_(g_value))
    return torch.cat(of_logits, dim=1), _sum(of_message), *((_sum(of_envelope),) if of_envelope else ())


@fusable("attention.second_derivative")
def _second_derivative(logits, message, *rows, cap) -> tuple[Tensor, ...]:
    """`rows` are the gradients as before, their cotangents v_s and v_m, and the envelope and v_u if there are any.

    Gives the gradients for logits, message, weight and value of each node, and envelope.
    """
    parts = logits.split(message.shape[1], dim=1)
    grads, (all_v_s, v_m, *envelope) = rows[: 2 * len(parts)], rows[2 * len(parts) :]
    u = envelope[0] if envelope else None
    of_logits, of_message, of_grads, of_envelope = [], [], [], []
    by_node = zip(parts, all_v_s.split(message.shape[1], dim=1), grads[::2], grads[1::2], strict=True)
    for of_node, v_s, g_weight, g_value in by_node:
        exp, tanh = _exponential(of_node, cap)
        h = torch.addcmul(g_weight, message, g_value)
        slope = None if tanh is None else (1 - tanh.square())
        vs_slope = v_s if slope is None else v_s * slope
        p = torch.addcmul(envelope[1], vs_slope, envelope[0]) if envelope else vs_slope
        ep = exp * p
        vm_g = v_m * g_value
        if u is not None:
            of_envelope.append((vs_slope * h).add_(vm_g).mul_(exp).sum(dim=1, keepdim=True))
            vm_g.mul_(u)
        if tanh is None:
            g_logits = vm_g.addcmul_(p, h).mul_(exp)
        else:
            # p depends on s as well: c'' = -2 / cap tanh c'.
            bent = tanh.mul_(v_s) if u is None else tanh.mul_(v_s).mul_(u)
            turn = torch.add(p, bent, alpha=-2 / cap)
            g_logits = vm_g.addcmul_(turn, h).mul_(exp).mul_(slope)
        of_logits.append(g_logits)
        of_message.append(ep * g_value)
        of_grads += [ep, exp.mul_(v_m if u is None else v_m * u).addcmul_(ep, message)]
    return torch.cat(of_logits, dim=1), _sum(of_message), *of_grads, *((_sum(of_envelope),) if of_envelope else ())


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)
