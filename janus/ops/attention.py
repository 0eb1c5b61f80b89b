"""Numerator and denominator of an enveloped, channel-wise softmax over the edges of a node.

With logits s, envelope u and message m of an edge, a node's aggregate is

    sum_e u_e exp(c(s_e)) u_e m_e / (sum_e u_e exp(c(s_e)) + delta),     c(s) = cap tanh(s / cap)

Both sums are linear in per-edge terms, so they may be formed in any order and in parts. Because the logits are capped,
no running maximum is needed, and an edge enters both sums with weight zero and slope zero at the cutoff.

A sum's terms are as large as the message, and nothing needs them afterwards; nor does anything need the gradients of
sums as rows of edges, in either derivative. Kernels that form sums and read gradients where they lie leave both out;
where there are none, terms and rows are made for the time of one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from janus.ops.fused import fusable
from janus.ops.recompute import recomputable
from janus.ops.recorded import recorded_gradients
from janus.ops.rowwise import map_rows
from janus.ops.segment import segment_sum, sum_rows


def attention_sums(
    logits: Tensor,
    message: Tensor,
    envelope: Tensor | None,
    nodes: Sequence[tuple[Tensor, int]],
    *,
    cap: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """Both sums for the nodes of each kind, differentiable any number of times.

    An edge may belong to a node of several kinds, its target and its source, with logits for each.

    Args:
        logits: (E, k d), those for each of the k kinds.
        message: (E, d), u m of the sums above.
        envelope: (E, 1), u of each edge; None for u = 1.
        nodes: of each kind, which one an edge belongs to, (E,) int64 or int32 and not changed later, and how many n
            there are.
        cap: bound of the logits, or None to take them as they are.
    Returns:
        of each kind the sums of u exp(c(s)) and of u exp(c(s)) message, (n, d) each.
    """
    indices, counts = zip(*nodes, strict=True)
    sums = _Sums.apply(cap, counts, logits, message, envelope, *indices)
    return list(zip(sums[::2], sums[1::2], strict=True))


def plain_attention_sums(
    logits: Tensor,
    message: Tensor,
    envelope: Tensor | None,
    nodes: Sequence[tuple[Tensor, int]],
    *,
    cap: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """The same in recorded torch operations."""
    sums = []
    for of_kind, (index, count) in zip(logits.split(message.shape[1], dim=1), nodes, strict=True):
        weight = (of_kind if cap is None else cap * (of_kind / cap).tanh()).exp()
        weight = weight if envelope is None else weight * envelope
        sums.append((segment_sum(weight, index, count), segment_sum(weight * message, index, count)))
    return sums


def _exponential(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """exp(c(s)) and tanh(s / cap)."""
    if cap is None:
        return logits.exp(), None
    tanh = (logits / cap).tanh_()
    return (cap * tanh).exp_(), tanh


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cap, counts: tuple[int, ...], logits, message, envelope, *indices: Tensor):
        ctx.save_for_backward(logits, message, envelope, *indices)
        ctx.cap, ctx.counts = cap, counts
        return _sums(logits, message, envelope, *indices, *counts, cap=cap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        inputs, first = (*ctx.saved_tensors, *grads), partial(_sums_first_derivative, cap=ctx.cap)
        g_logits, g_message, *g_envelope = recomputable(_SumsGrad.apply(ctx.cap, ctx.counts, *inputs), first, *inputs)
        return None, None, g_logits, g_message, *(g_envelope or (None,)), *(None for _ in ctx.counts)


class _SumsGrad(torch.autograd.Function):
    """Gradients of logits, message and (if there is one) envelope, as a function of those of the sums."""

    @staticmethod
    def forward(ctx: Any, cap, counts: tuple[int, ...], logits, message, envelope, *rest: Tensor):
        ctx.save_for_backward(logits, message, envelope, *rest)
        ctx.cap, ctx.counts = cap, counts
        return _sums_first_derivative(logits, message, envelope, *rest, cap=cap)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):
        """Gradients of <v_s, dlogits> + <v_m, dmessage> + <v_u, denvelope>.

        With e = exp(c(s)), h = g_weight + m g_value and p = u c'(s) v_s + v_u, those three inner products sum to
        e h p + e u g_value v_m for each node of an edge, of which the lines below are the derivatives.
        """
        logits, message, envelope, *rest = ctx.saved_tensors
        indices, grads = _indices_and_grads(tuple(rest))
        without = (None,) * len(indices)
        if torch.is_grad_enabled():
            nodes = list(zip(indices, ctx.counts, strict=True))

            def plain(logits, message, envelope, *grads):
                def value(logits, message, envelope):
                    sums = plain_attention_sums(logits, message, envelope, nodes, cap=ctx.cap)
                    return tuple(value for pair in sums for value in pair)

                return _present(*recorded_gradients(value, (logits, message, envelope), grads))

            found = recorded_gradients(plain, (logits, message, envelope, *grads), cotangents)
            return None, None, *found[:3], *without, *found[3:]

        v_s, v_m, *v_u = cotangents
        given = (logits, message, envelope, v_s, v_m, *(v_u or (None,)), *indices, *grads)
        g_logits, g_message, *g_rest = _sums_second_derivative(*given, cap=ctx.cap)
        g_envelope = None if envelope is None else g_rest.pop(0)
        return None, None, g_logits, g_message, g_envelope, *without, *g_rest


@fusable("attention.sums", ("native",))
def _sums(logits, message, u, *nodes, cap) -> tuple[Tensor, ...]:
    """`nodes` are the indices of each kind, then their numbers."""
    half = len(nodes) // 2
    indices, counts = nodes[:half], nodes[half:]
    terms = map_rows(partial(_value, cap=cap), _present(logits, message, u))
    return tuple(sum_rows(term, indices[i // 2], counts[i // 2]) for i, term in enumerate(terms))


@fusable("attention.sums_first_derivative", ("native",))
def _sums_first_derivative(logits, message, u, *rest, cap) -> tuple[Tensor, ...]:
    """Of logits, message and envelope, if there is one; `rest` are the indices of each kind, then the gradients of its
    two sums."""
    return map_rows(partial(_first_derivative, cap=cap), _present(logits, message, *_as_rows(rest), u))


@fusable("attention.sums_second_derivative", ("native",))
def _sums_second_derivative(logits, message, u, v_s, v_m, v_u, *rest, cap) -> tuple[Tensor, ...]:
    """Gradients for logits, message, envelope (if there is one) and the gradients of the sums; `rest` as before."""
    indices, grads = _indices_and_grads(rest)
    rows = _present(logits, message, *_as_rows(rest), v_s, v_m, u, v_u)
    g_logits, g_message, *found = map_rows(partial(_second_derivative, cap=cap), rows)
    g_envelope = [] if u is None else [found.pop()]
    # len() would make a traced size a constant.
    sums = (sum_rows(found[i], indices[i // 2], grad.shape[0]) for i, grad in enumerate(grads))
    return g_logits, g_message, *g_envelope, *sums


def _indices_and_grads(rest: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """An index of each kind, two gradients of each."""
    kinds = len(rest) // 3
    return rest[:kinds], rest[kinds:]


def _as_rows(rest: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of sums as rows of edges."""
    indices, grads = _indices_and_grads(rest)
    return [grad.index_select(0, indices[i // 2]) for i, grad in enumerate(grads)]


@fusable("attention.value", ("compiled", "triton"))
def _value(logits, message, u=None, *, cap) -> tuple[Tensor, ...]:
    terms: list[Tensor] = []
    for of_node in logits.split(message.shape[1], dim=1):
        exp, _ = _exponential(of_node, cap)
        weight = exp if u is None else exp.mul_(u)
        terms += [weight, weight * message]
    return tuple(terms)


@fusable("attention.first_derivative", ("compiled", "triton"))
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


@fusable("attention.second_derivative", ("compiled", "triton"))
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
