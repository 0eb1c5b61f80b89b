"""Compiled kernels against the plain functions, through every derivative of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from janus.ops.attention import attention_sums
from janus.ops.expansion import bessel_expansion, fourier_expansion
from janus.ops.fused import fusable, use_kernels
from janus.ops.gated_norm import gated_norm
from janus.ops.silu import silu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_afterwards() -> Iterator[None]:
    yield
    use_kernels("torch", CPU)


def through_a_step(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Value, recorded first derivative of the first input, and derivative of its square by all inputs."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    value = function(*inputs)
    # Cubes, for the squares of a Fourier series add up to a constant: its derivative is rounding.
    (force,) = torch.autograd.grad((value**3).sum(), inputs[0], create_graph=True)
    return [value, force, *torch.autograd.grad((force * force).sum() + value.sum(), inputs)]


def both_sums(*inputs: Tensor) -> Tensor:
    nodes = torch.arange(len(inputs[0])) // 2
    ((weight, value),) = attention_sums(*inputs, [(nodes, len(nodes))], cap=5.0)
    return weight * value


FUNCTIONS = {
    "layer norm": (lambda *x: gated_norm(*x, eps=1e-5, center=True), ["rows", "rows", "pair", "pair"]),
    "RMS norm": (lambda *x: gated_norm(*x, None, eps=1e-7, center=False), ["rows", "rows", "pair"]),
    "silu": (silu, ["rows"]),
    "smooth attention": (both_sums, ["rows", "rows", "column"]),
    "bessel": (lambda x, w: bessel_expansion(x.square() + 0.5, w, cutoff=1.5, exponent=6), ["numbers", "frequencies"]),
    "fourier": (lambda x, f: fourier_expansion(x.tanh(), f, scale=0.999), ["numbers", "frequencies"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_plain(name: str) -> None:
    function, kinds = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    for num_rows in (7, 1, 0, 300):
        shapes = {"rows": (num_rows, 16), "pair": (2, 16), "column": (num_rows, 1)}
        shapes |= {"numbers": (num_rows,), "frequencies": (7,)}  # as many as rows at first: no size may be mixed up
        inputs = [torch.randn(shapes[kind], generator=generator, dtype=torch.float64) for kind in kinds]
        use_kernels("torch", CPU)
        expected = through_a_step(function, inputs)
        use_kernels("compiled", CPU)
        for ours, plain in zip(through_a_step(function, inputs), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: (function(x)[0] * 1.001,))
    doubled = fusable("silu.second_derivative")(lambda x: (2 * x,))
    rows = torch.ones(3, 2)
    assert doubled(rows)[0].equal(2 * rows)
    use_kernels("compiled", CPU)
    with pytest.raises(RuntimeError, match="differs from the plain function"):
        doubled(rows)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match="need a C\\+\\+ compiler"):
        use_kernels("compiled", CPU)


def test_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache, exc

    def fails(*_: object) -> None:
        raise exc.CppCompileError(["g++", "-std=c++20"], "error: no such option")

    monkeypatch.setattr(codecache.CppCodeCache, "load", fails)
    with pytest.raises(ValueError, match=r"native kernels need a C\+\+ compiler.* failed \(error: no such option\)"):
        use_kernels("native", CPU)
