"""The hand-written derivatives against numerical ones and against plain torch, to third order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from janus.ops.attention import attention_terms, plain_attention_terms
from janus.ops.gated_norm import gated_norm, plain_gated_norm
from janus.ops.product import linear
from janus.ops.rowwise import map_rows
from janus.ops.segment import segment_max, segment_sum
from janus.ops.silu import silu


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gated_case(center, bias):
    inputs = [rand(5, 4, seed=1), rand(5, 4, seed=2), rand(2, 4, seed=3), rand(2, 4, seed=4) if bias else None]
    return (
        lambda *t: gated_norm(*t, eps=1e-5, center=center),
        lambda *t: plain_gated_norm(*t, eps=1e-5, center=center),
        inputs,
    )


def attention_case(cap, enveloped):
    inputs = [rand(5, 3, seed=1), rand(5, 3, seed=2), rand(5, 1, seed=3) if enveloped else None]
    return (
        lambda *t: torch.cat(attention_terms(*t, cap=cap), dim=1),
        lambda *t: torch.cat(plain_attention_terms(*t, cap=cap), dim=1),
        inputs,
    )


CASES = {
    "silu": (silu, functional.silu, [rand(5, 3)]),
    "gated layer norm": gated_case(True, True),
    "gated rms norm": gated_case(False, False),
    "gated rms norm with bias": gated_case(False, True),
    "attention": attention_case(None, False),
    "attention, capped": attention_case(3.0, False),
    "attention, enveloped": attention_case(None, True),
    "attention, capped and enveloped": attention_case(3.0, True),
}


@pytest.mark.parametrize("name", CASES)
def test_numerical_derivatives(name):
    function, _, inputs = CASES[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch_to_third_order(name):
    function, plain, inputs = CASES[name]
    tensors = [tensor for tensor in inputs if tensor is not None]
    results = []
    for candidate in (function, plain):
        out = candidate(*inputs)
        # The weights of a scalar, so that each order depends on every output.
        scalar = (out * torch.arange(1.0, 1 + out.numel(), dtype=out.dtype).view_as(out).sin()).sum()
        orders = [out]
        for _ in range(3):
            grads = torch.autograd.grad(scalar, tensors, create_graph=True)
            orders += grads
            scalar = sum((grad * grad).sum() for grad in grads)
        results.append(orders)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_slices_of_rows_change_nothing(name, monkeypatch):
    function, _, inputs = CASES[name]
    tensors = [tensor for tensor in inputs if tensor is not None]

    def second_backward():
        (first,) = torch.autograd.grad(function(*inputs).square().sum(), tensors[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum() + function(*inputs).sum(), tensors)

    whole = second_backward()
    monkeypatch.setattr("janus.ops.rowwise._WHOLE_ELEMENTS", 0)
    monkeypatch.setattr("janus.ops.rowwise._SLICE_ELEMENTS", 6)
    for ours, theirs in zip(second_backward(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_force_pass_computes_no_affine_gradient(monkeypatch):
    calls = []
    from janus.ops import gated_norm as module

    original = module.recorded_gradients
    monkeypatch.setattr(module, "recorded_gradients", lambda *a: calls.append(1) or original(*a))
    function, _, inputs = CASES["gated layer norm"]
    torch.autograd.grad(function(*inputs).sum(), inputs[:1], create_graph=True)
    assert not calls
    torch.autograd.grad(function(*inputs).sum(), [inputs[0], inputs[2]], create_graph=True)
    assert calls


def test_no_rows():
    out = gated_norm(torch.empty(0, 4), torch.empty(0, 4), torch.ones(2, 4), torch.zeros(2, 4), eps=1e-5, center=True)
    assert out.shape == (0, 4)
    assert map_rows(lambda x: (x * 2,), (torch.empty(0, 3),))[0].shape == (0, 3)
    weight, _ = attention_terms(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 1), cap=None)
    assert weight.shape == (0, 3)


def test_segments():
    index = torch.tensor([0, 0, 2])
    rows = torch.tensor([[1.0], [2.0], [-4.0]])
    assert segment_sum(rows, index, 4).tolist() == [[3.0], [0.0], [-4.0], [0.0]]
    assert segment_max(rows, index, 4).tolist() == [[2.0], [-torch.inf], [-4.0], [-torch.inf]]


def test_products_take_the_chosen_format():
    x, weight, bias = torch.randn(7, 64), torch.randn(5, 64), torch.randn(5)
    exact = linear(x.double(), weight.double(), bias.double())
    assert torch.equal(linear(x, weight, bias, dtype=torch.float32), functional.linear(x, weight, bias))
    rounded = linear(x, weight, bias, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().max()
    assert 1e-3 < error < 0.5
