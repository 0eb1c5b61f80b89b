"""Kernels against the plain functions; `test_triton.py` and `test_native.py` run this in a process of its own.

JANUS_TEST_KERNELS names the kernels. Those in Triton run on CPU by its interpreter, which must be chosen before triton
is imported; with JANUS_TEST_DEVICE=cuda on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from janus.ops import attention, expansion, gated_norm, segment, silu
from janus.ops.fused import fusable, using_kernels

DEVICE = torch.device(os.environ["JANUS_TEST_DEVICE"])
KERNELS = os.environ["JANUS_TEST_KERNELS"]
ROWS_AND_WIDTHS = [(0, 7), (3, 1), (1, 7), (37, 32), (5, 100), (2, 128)]
"""Rows and widths, in pieces of a program and beyond."""
FORMATTED = ("silu", "norm True", "attention 10", "sums 10", "bessel 8", "fourier True")
"""Of the cases, those that run in other number formats too."""
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


of_triton = pytest.mark.skipif(KERNELS != "triton", reason="about Triton's programs")


@pytest.fixture(autouse=True)
def chosen_kernels() -> Iterator[None]:
    with using_kernels(KERNELS, DEVICE):
        yield


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def norm_case(center: bool, bias: bool, affine: bool, order: int) -> Callable:
    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        pair = [rand(2, width, seed=3, dtype=dtype), rand(2, width, seed=4, dtype=dtype) if bias else None]
        # A row's halves lie beside each other, as those of one product do.
        core, gate = rand(rows, 2 * width, seed=1, dtype=dtype).split(width, dim=1)
        arguments = [core, gate, *pair, *(rand(rows, width, seed=5 + n, dtype=dtype) for n in range((0, 1, 3)[order]))]
        options = {"eps": 1e-5, "center": center, **({"affine": affine} if order == 1 else {})}
        return NORM[order], arguments, options

    return case


def silu_case(parts: int, order: int) -> Callable:
    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        arguments = [rand(rows, parts * width, seed=1, dtype=dtype)]
        if order:
            # Rows with a gap between them.
            arguments += [rand(rows, width + 1, seed=2 + n, dtype=dtype)[:, :width] for n in range(parts)]
        if order == 2:
            arguments += [rand(rows, parts * width, seed=9, dtype=dtype)]
        return SILU[order], arguments, {} if order else {"parts": parts}

    return case


def attention_case(cap: float | None, enveloped: bool, nodes: int, order: int) -> Callable:
    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        u = [rand(rows, 1, seed=9, dtype=dtype)] if enveloped else []
        logits = 3 * rand(rows, nodes * width, seed=1, dtype=dtype)
        arguments = [logits, rand(rows, width, seed=2, dtype=dtype)]
        if order:
            arguments += [rand(rows, width, seed=10 + n, dtype=dtype) for n in range(2 * nodes)]
        if order == 2:
            arguments += [rand(rows, nodes * width, seed=20, dtype=dtype), rand(rows, width, seed=21, dtype=dtype)]
        arguments += u
        if order == 2 and enveloped:
            arguments += [rand(rows, 1, seed=22, dtype=dtype)]
        return ATTENTION[order], arguments, {"cap": cap}

    return case


def sums_case(cap: float | None, enveloped: bool, kinds: int, order: int) -> Callable:
    """Of two kinds of nodes or three, some without an edge."""

    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        u = rand(rows, 1, seed=9, dtype=dtype) if enveloped else None
        arguments = [3 * rand(rows, kinds * width, seed=1, dtype=dtype), rand(rows, width, seed=2, dtype=dtype), u]
        if order == 2:
            arguments += [rand(rows, kinds * width, seed=20, dtype=dtype), rand(rows, width, seed=21, dtype=dtype)]
            arguments += [rand(rows, 1, seed=22, dtype=dtype) if enveloped else None]
        counts = [rows // 3 + 1, 5, 2][:kinds]
        for seed, count in enumerate(counts):
            drawn = torch.randint(count, (rows,), generator=torch.Generator().manual_seed(seed))
            arguments += [(drawn.sort()[0] if seed == 0 else drawn).to(DEVICE)]
        if order:
            arguments += [rand(count, width, seed=10 + count, dtype=dtype) for count in counts for _ in range(2)]
        else:
            arguments += counts
        return SUMS[order], arguments, {"cap": cap}

    return case


def bessel_case(exponent: int, of_frequencies: bool, order: int) -> Callable:
    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        options = {"cutoff": 3.0, "exponent": exponent, **({"of_frequencies": of_frequencies} if order else {})}
        lengths = (1.5 + rand(rows, seed=1).abs()).to(dtype)  # some beyond the cutoff
        return BESSEL[order], expansion_arguments(lengths, rows, width, width, order), options

    return case


def fourier_case(of_frequencies: bool, order: int) -> Callable:
    def case(rows: int, width: int, dtype: torch.dtype) -> tuple:
        options = {"of_frequencies": of_frequencies} if order else {}
        cosines = rand(rows, seed=1).tanh().to(dtype)
        return FOURIER[order], expansion_arguments(cosines, rows, width, 2 * width + 1, order), options

    return case


def expansion_arguments(column: Tensor, rows: int, width: int, columns: int, order: int) -> list[Tensor]:
    frequencies = torch.linspace(1.0, 4.0, width, dtype=torch.float64).to(DEVICE, column.dtype)[None]
    # Rows with a gap between them.
    arguments = [column, frequencies, rand(rows, columns + 1, seed=2, dtype=column.dtype)[:, :columns]]
    return [*arguments, rand(rows, seed=3, dtype=column.dtype)][: order + 2]


NORM = (gated_norm._value, gated_norm._first_derivative, gated_norm._second_derivative)
BESSEL = (expansion._bessel_value, expansion._bessel_first_derivative, expansion._bessel_second_derivative)
FOURIER = (expansion._fourier_value, expansion._fourier_first_derivative, expansion._fourier_second_derivative)
ATTENTION = (attention._value, attention._first_derivative, attention._second_derivative)
SUMS = (attention._sums, attention._sums_first_derivative, attention._sums_second_derivative)
SILU = (silu._value, silu._first_derivative, silu._second_derivative)
LEAVES: dict[str, Callable] = {}
for order in range(3):
    for parts in (1, 2):
        LEAVES[f"silu {parts}, order {order}"] = silu_case(parts, order)
    for center, bias in ((True, True), (False, False)):
        LEAVES[f"norm {center} {bias}, order {order}"] = norm_case(center, bias, False, order)
    for cap, enveloped, nodes in ((10.0, True, 2), (None, False, 1), (3.0, False, 3)):
        LEAVES[f"attention {cap} {enveloped} {nodes}, order {order}"] = attention_case(cap, enveloped, nodes, order)
        LEAVES[f"sums {cap} {enveloped} {nodes}, order {order}"] = sums_case(cap, enveloped, nodes, order)
    for exponent, of_frequencies in ((8, True), (1, True), (2, False)):
        LEAVES[f"bessel {exponent} {of_frequencies}, order {order}"] = bessel_case(exponent, of_frequencies, order)
    for of_frequencies in (True, False):
        LEAVES[f"fourier {of_frequencies}, order {order}"] = fourier_case(of_frequencies, order)
LEAVES["norm with affine gradients"] = norm_case(True, True, True, 1)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_functions(name: str) -> None:
    for rows, width in ROWS_AND_WIDTHS:
        if width == 1 and name.startswith("norm"):
            continue  # the norm of a channel alone is constant: its derivatives are rounding
        compare(*LEAVES[name](rows, width, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if KERNELS == "triton" else [])], ids=str)
@pytest.mark.parametrize("name", [name for name in LEAVES if name.startswith(FORMATTED)])
def test_number_formats(name: str, dtype: torch.dtype) -> None:
    compare(*LEAVES[name](37, 32, dtype))


@of_triton
@pytest.mark.parametrize("order", [1, 2])
def test_programs_with_several_pieces(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gated_norm", "expansion"):
        monkeypatch.setattr(f"janus.ops.triton.{module}.MAX_PROGRAMS", 2)
    for case in (norm_case(True, True, True, order), bessel_case(8, True, order), fourier_case(True, order)):
        compare(*case(37, 100, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exponent", [1, 2, 8])
@pytest.mark.parametrize("cutoff", [3.0, 4.7])
def test_bessel_functions_beyond_the_cutoff_are_exactly_zero(cutoff: float, exponent: int, dtype: torch.dtype) -> None:
    """Value and both derivatives, of rows that begin where the number format has its first one at the cutoff."""
    start = torch.tensor(cutoff, dtype=dtype)
    start = torch.nextafter(start, torch.tensor(torch.inf, dtype=dtype)) if start < cutoff else start
    lengths = torch.stack([start, torch.nextafter(start, 2 * start), 1.01 * start, 100 * start]).to(DEVICE)
    for order in range(3):
        options = {"cutoff": cutoff, "exponent": exponent, **({"of_frequencies": True} if order else {})}
        for found in BESSEL[order](*expansion_arguments(lengths, 4, 7, 7, order), **options):
            assert not found.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("order", range(3))
def test_fourier_series_of_nearly_straight_angles(order: int, sign: float, dtype: torch.dtype) -> None:
    x = torch.full((4,), sign * (1 - 1e-6), dtype=dtype, device=DEVICE)
    compare(FOURIER[order], expansion_arguments(x, 4, 3, 7, order), {"of_frequencies": True} if order else {})


def compare(function: Callable, arguments: list[Tensor | None], options: dict) -> None:
    # What rounding is belongs to the format: the plain function computes in fp64.
    exact = [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
    ]
    found, expected = function(*arguments, **options), function.__wrapped__(*exact, **options)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == arguments[0].dtype
        scale = max(1.0, plain.abs().max().item()) if plain.numel() else 1.0
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=TOLERANCE[ours.dtype] * scale)


def both(*terms: Tensor) -> Tensor:
    return torch.cat(terms, dim=1)


NODES = [(torch.tensor([0, 2, 0], device=DEVICE), 4), (torch.tensor([1, 0, 1], device=DEVICE), 2)]
WHOLE: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "layer norm": (lambda *x: gated_norm.gated_norm(*x, eps=1e-5, center=True), [(3, 3), (3, 3), (2, 3), (2, 3)]),
    "RMS norm": (lambda *x: gated_norm.gated_norm(*x, None, eps=1e-5, center=False), [(3, 3), (3, 3), (2, 3)]),
    "attention": (
        lambda *x: torch.cat([both(*pair) for pair in attention.attention_sums(*x, NODES, cap=3.0)]),
        [(3, 4), (3, 2), (3, 1)],
    ),
    "silu": (silu.silu, [(3, 2)]),
    "silu of halves": (lambda x: both(*reversed(silu.silu_parts(x, 2))), [(3, 4)]),
    "bessel": (
        lambda x, w: expansion.bessel_expansion(x.square() + 0.5, w, cutoff=3.0, exponent=6),
        [(4,), (3,)],
    ),
    "fourier": (lambda x, f: expansion.fourier_expansion(x.tanh(), f, scale=0.99), [(4,), (3,)]),
    "segments": (lambda x: segment.segment_sum(x, torch.tensor([3, 0, 3], device=DEVICE), 5), [(3, 2)]),
    "gathered": (
        lambda *x: segment.gather_add(x, [None, *torch.tensor([[1, 0, 1], [2, 3, 0]], device=DEVICE)]),
        [(3, 2), (2, 2), (4, 2)],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_numerical_derivatives(name: str) -> None:
    function, shapes = WHOLE[name]
    inputs = [rand(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    fast = {"fast_mode": True}
    assert gradcheck(function, inputs, **fast)
    assert gradgradcheck(function, inputs, **fast)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
def test_segments(index_type: torch.dtype) -> None:
    """Sorted and not, with empty segments, long ones and no rows; halves of an index too."""
    for width in (7, 300):
        for index in ([0] * 50 + [2, 2, 5], [5, 0, 2, 0, 5, 5], []):
            whole = torch.tensor([*index, *reversed(index)], dtype=index_type, device=DEVICE)
            for part in (whole[: len(index)], whole[len(index) :]):
                rows = rand(len(index), width, seed=1)
                plain = segment._sum_rows.__wrapped__(rows, part, 7)[0]
                torch.testing.assert_close(segment.segment_sum(rows, part, 7), plain, rtol=1e-13, atol=1e-13)
    index = torch.tensor([1, 0, 1], dtype=index_type, device=DEVICE)
    for shape in ((3,), (3, 3, 3)):
        rows = rand(*shape, seed=1)
        expected = torch.stack([rows[1], rows[0] + rows[2]])
        torch.testing.assert_close(segment.segment_sum(rows, index, 2), expected, rtol=1e-15, atol=0)
    assert segment.segment_sum(torch.tensor([1, 2, 3], device=DEVICE), index, 2).tolist() == [2, 4]
    index[0] = 0  # what was known of it no longer holds
    assert segment.segment_sum(torch.tensor([1, 2, 3], device=DEVICE), index, 2).tolist() == [3, 3]


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_maxima_of_segments(dtype: torch.dtype, index_type: torch.dtype) -> None:
    """Of rows with gaps, of long, empty and no segments; the same numbers, -inf included."""
    for width in (7, 300):
        for index in ([0] * 50 + [2, 2, 5], [5, 0, 2, 0, 5, 5], []):
            rows = rand(len(index), 2 * width, seed=1, dtype=dtype)[:, width:]
            rows[:1] = -torch.inf
            of = torch.tensor(index, dtype=index_type, device=DEVICE)
            plain = segment._max_rows.__wrapped__(rows, of, 7)[0]
            assert torch.equal(segment.segment_max(rows, of, 7), plain)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64], ids=str)
def test_gathered_sums(index_type: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width, owns in ((40, 300, False), (1, 7, True), (0, 7, False), (33, 100, True)):
        counts = (4, 9, rows) if owns else (4, 9, 6)
        values = [rand(count, width, seed=count) for count in counts]
        drawn = [torch.randint(count, (rows,), generator=generator).to(DEVICE, index_type) for count in counts[:2]]
        indices = [*drawn, None if owns else drawn[0]]
        plain = segment._gathered_sum.__wrapped__(*values, *indices)[0]
        torch.testing.assert_close(segment.gather_add(values, indices), plain, rtol=1e-13, atol=1e-13)


def test_wrong_kernel_is_refused() -> None:
    @fusable("silu.second_derivative")
    def something_else(x: Tensor, grad: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        return x * grad, cotangent

    with pytest.raises(RuntimeError, match=f"{KERNELS} kernel .* differs from the plain function"):
        something_else(*(rand(3, 2, seed=seed) for seed in range(3)))


@of_triton
def test_rows_that_are_too_wide_are_refused() -> None:
    wide: Sequence[Tensor] = [torch.ones(2, 4097, device=DEVICE)] * 4
    with pytest.raises(ValueError, match="at most 4096 channels, and these have 4097"):
        gated_norm.gated_norm(*wide, eps=1e-5, center=True)
