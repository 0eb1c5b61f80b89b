"""The hand-written derivatives against numerical ones and against plain torch, to third order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from janus.ops.attention import attention_sums, plain_attention_sums
from janus.ops.expansion import (
    bessel_expansion,
    fourier_expansion,
    plain_bessel_expansion,
    plain_fourier_expansion,
)
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
    inputs = [rand(5, 6, seed=1), rand(5, 3, seed=2), rand(5, 1, seed=3) if enveloped else None]
    nodes = [(torch.tensor([0, 0, 1, 3, 3]), 4), (torch.tensor([2, 0, 1, 2, 0]), 3)]

    def joined(sums):
        return torch.cat([value for pair in sums for value in pair])

    return (
        lambda *t: joined(attention_sums(*t, nodes, cap=cap)),
        lambda *t: joined(plain_attention_sums(*t, nodes, cap=cap)),
        inputs,
    )


def bessel_case(exponent, *, learnable=True):
    length = torch.tensor([0.3, 1.0, 2.9, 2.9999, 3.5], dtype=torch.float64, requires_grad=True)
    frequencies = torch.tensor([3.0, 6.5, 9.0], dtype=torch.float64, requires_grad=learnable)
    options = {"cutoff": 3.0, "exponent": exponent}
    return (
        lambda *t: bessel_expansion(*t, **options),
        lambda *t: plain_bessel_expansion(*t, **options),
        [length, frequencies],
    )


def fourier_case(*, learnable=True):
    cosine = torch.tensor([0.3, -0.99, 0.0, 0.98, -0.5], dtype=torch.float64, requires_grad=True)
    frequencies = torch.tensor([1.0, 2.1, 2.9], dtype=torch.float64, requires_grad=learnable)
    return (
        lambda *t: fourier_expansion(*t, scale=0.999),
        lambda *t: plain_fourier_expansion(*t, scale=0.999),
        [cosine, frequencies],
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
    "bessel": bessel_case(8),
    "bessel, low envelope": bessel_case(1),
    "bessel, quadratic envelope": bessel_case(2),
    "bessel, fixed": bessel_case(6, learnable=False),
    "fourier": fourier_case(),
    "fourier, fixed": fourier_case(learnable=False),
}


@pytest.mark.parametrize("name", CASES)
def test_numerical_derivatives(name):
    function, _, inputs = CASES[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch_to_third_order(name):
    function, plain, inputs = CASES[name]
    tensors = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
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
    tensors = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

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


@pytest.mark.parametrize("exponent", [1, 2, 8])
def test_bessel_functions_vanish_from_the_cutoff_on(exponent):
    """Three derivatives of those beyond, and two at the cutoff, where the third one jumps."""
    for lengths, orders in (([3.0], 2), ([3.0 + 1e-15, 3.0001, 5.0], 3)):
        function, _, (_, frequencies) = bessel_case(exponent)
        length = torch.tensor(lengths, dtype=torch.float64, requires_grad=True)
        found = function(length, frequencies)
        for _ in range(orders):
            assert not found.any()
            scalar = (found * torch.arange(1.0, 1 + found.numel()).view_as(found)).sum()
            grads = torch.autograd.grad(scalar, [length, frequencies], create_graph=True, materialize_grads=True)
            assert not any(grad.any() for grad in grads)
            found = grads[0]
        # The second derivative of a step that records its force pass alone.
        (first,) = torch.autograd.grad(function(length, frequencies).sum(), [length], create_graph=True)
        assert not any(grad.any() for grad in torch.autograd.grad((first * length).sum(), [length, frequencies]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fourier_series_of_straight_angles(dtype):
    """As exact as its argument allows, in second derivatives too, where the angle's own derivatives are largest."""
    scale = 1 - 1e-6
    cosine = torch.tensor([1.0, -1.0, 0.999999, -0.9999], dtype=dtype, requires_grad=True)
    frequencies = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    x = (scale * cosine.detach()).double().requires_grad_()
    exact = frequencies.detach().double().requires_grad_()
    found = []
    for out, inputs, factor in (
        (fourier_expansion(cosine, frequencies, scale=scale), (cosine, frequencies), 1),
        (plain_fourier_expansion(x, exact), (x, exact), scale),
    ):
        weights = torch.arange(1.0, 29.0, dtype=out.dtype).view(4, 7)
        (first,) = torch.autograd.grad((out * weights).sum(), inputs[:1], create_graph=True)
        second, mixed = torch.autograd.grad(first.sum(), inputs)
        found.append([out, first * factor, second * factor**2, mixed * factor])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=1e-5)


@pytest.mark.parametrize("make", [bessel_case, lambda *_: fourier_case()], ids=["bessel", "fourier"])
def test_expansions_keep_their_inputs_alone(make):
    function, _, (column, frequencies) = make(8)
    kept: dict[int, int] = {}

    def pack(saved):
        kept[saved.data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    wide = torch.arange(1.0, 200.0, dtype=torch.float64) / 200
    column, frequencies = wide.requires_grad_(), frequencies.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = function(column, frequencies)
        scaled_column, narrow = wide.nbytes, frequencies.nbytes
        assert sum(kept.values()) == scaled_column + narrow
        grad = torch.ones_like(out).requires_grad_()
        torch.autograd.grad(out, [column], grad, create_graph=True)
    assert sum(kept.values()) == scaled_column + narrow + grad.nbytes


def test_force_pass_computes_no_frequency_gradient(monkeypatch):
    calls = []
    from janus.ops import expansion as module

    original = module.recorded_gradients
    monkeypatch.setattr(module, "recorded_gradients", lambda *a: calls.append(1) or original(*a))
    for function, _, inputs in (CASES["bessel"], CASES["fourier"]):
        (first,) = torch.autograd.grad(function(*inputs).sum(), inputs[:1], create_graph=True)
        torch.autograd.grad(first.sum(), inputs)
        assert not calls
        torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
        assert calls.pop()


@pytest.mark.parametrize("rows", [0, 1])
def test_expansions_of_few_rows(rows):
    for function, plain, (column, frequencies) in (CASES["bessel"], CASES["fourier"]):
        results = []
        for candidate in (function, plain):
            out = candidate(column[:rows], frequencies)
            (first,) = torch.autograd.grad(out.square().sum(), [column], create_graph=True)
            results.append([out, first, *torch.autograd.grad(first.sum(), [column, frequencies])])
        assert results[0][0].shape == (rows, results[1][0].shape[1])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_constant_fourier_series():
    cosine = torch.tensor([0.5, -0.5], requires_grad=True)
    out = fourier_expansion(cosine, torch.empty(0), scale=1.0)
    assert out.shape == (2, 1)
    (first,) = torch.autograd.grad(out.sum(), [cosine], create_graph=True)
    assert not torch.autograd.grad(first.sum(), [cosine])[0].any()


def test_no_rows():
    out = gated_norm(torch.empty(0, 4), torch.empty(0, 4), torch.ones(2, 4), torch.zeros(2, 4), eps=1e-5, center=True)
    assert out.shape == (0, 4)
    assert map_rows(lambda x: (x * 2,), (torch.empty(0, 3),))[0].shape == (0, 3)
    nodes = [(torch.empty(0, dtype=torch.int64), 2)]
    ((weight, _),) = attention_sums(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 1), nodes, cap=None)
    assert torch.equal(weight, torch.zeros(2, 3))


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 16])  # torch has a way of its own for wide rows
def test_segments(index_type, width):
    index = torch.tensor([0, 0, 2], dtype=index_type)
    rows = torch.tensor([[1.0], [2.0], [-4.0]]).repeat(1, width)
    for function, expected in (
        (segment_sum, [3.0, 0.0, -4.0, 0.0]),
        (segment_max, [2.0, -torch.inf, -4.0, -torch.inf]),
    ):
        assert function(rows, index, 4).tolist() == [[value] * width for value in expected]


def test_products_take_the_chosen_format():
    x, weight, bias = torch.randn(7, 64), torch.randn(5, 64), torch.randn(5)
    exact = linear(x.double(), weight.double(), bias.double())
    assert torch.equal(linear(x, weight, bias, dtype=torch.float32), functional.linear(x, weight, bias))
    rounded = linear(x, weight, bias, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().max()
    assert 1e-3 < error < 0.5
