"""Triton kernels: against the plain functions in a process of its own, translated for GPUs, and refused where they
cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from janus.ops import attention, expansion, gated_norm, segment, silu
from janus.ops.fused import use_kernels

HERE = Path(__file__).parent
E, D = 64, 64
BESSEL = {"cutoff": 6.0, "exponent": 8}
LAYER, RMS = {"eps": 1e-5, "center": True}, {"eps": 1e-5, "center": False}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def in_process(*words: str, **variables: str) -> None:
    """What triton is when it is imported, interpreter or compiler, it stays; so neither in this process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    found = subprocess.run(
        [sys.executable, *words], env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
def test_kernels_equal_plain_functions(device: str) -> None:
    chosen = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    options = ["-q", "--import-mode=importlib", "-p", "no:xdist", "-p", "no:cacheprovider"]
    variables = {"JANUS_TEST_KERNELS": "triton", "JANUS_TEST_DEVICE": device, **chosen}
    in_process("-m", "pytest", *options, str(HERE / "triton_cases.py"), **variables)


@needs_triton
def test_kernels_compile(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does, which needs no GPU."""
    in_process(str(HERE / "triton_compile.py"), "fp32", "cuda", "hip", TRITON_CACHE_DIR=str(tmp_path))


BIASED_NORM = [(E, D), (E, D), (2, D), (2, D)]
OF_TWO_NODES = [(E, 2 * D), (E, D), *[(E, D)] * 4]
PLAIN_CHAINS: dict[str, tuple[Callable, list, dict, tuple[int, float, float]]] = {
    "layer norm, value": (gated_norm._value, BIASED_NORM, LAYER, (5, 6, 5)),
    "layer norm, first": (
        gated_norm._first_derivative,
        [*BIASED_NORM, (E, D)],
        {**LAYER, "affine": False},
        (10, 16, 10),
    ),
    "layer norm, second": (gated_norm._second_derivative, [*BIASED_NORM, *[(E, D)] * 3], LAYER, (70, 101, 50)),
    "RMS norm, value": (gated_norm._value, BIASED_NORM, RMS, (17, 14, 11)),
    "RMS norm, first": (gated_norm._first_derivative, [*BIASED_NORM, (E, D)], {**RMS, "affine": False}, (32, 36, 24)),
    "RMS norm, second": (gated_norm._second_derivative, [*BIASED_NORM, *[(E, D)] * 3], RMS, (98, 129, 68)),
    "attention, value": (attention._value, [*OF_TWO_NODES[:2], (E, 1)], {"cap": 10.0}, (12, 14, 12)),
    "attention, first": (attention._first_derivative, [*OF_TWO_NODES, (E, 1)], {"cap": 10.0}, (31, 42, 29)),
    "attention, second": (
        attention._second_derivative,
        [*OF_TWO_NODES, *OF_TWO_NODES[:2], (E, 1), (E, 1)],
        {"cap": 10.0},
        (55, 92, 53),
    ),
    "bare attention, value": (attention._value, OF_TWO_NODES[:2], {"cap": None}, (4, 6, 4)),
    "bare attention, first": (attention._first_derivative, OF_TWO_NODES, {"cap": None}, (10, 20, 11)),
    "bare attention, second": (
        attention._second_derivative,
        [*OF_TWO_NODES, *OF_TWO_NODES[:2]],
        {"cap": None},
        (20, 44, 21),
    ),
    "silu, second": (silu._second_derivative, [(E, D)] * 3, {}, (7, 12, 7)),
    "silu of halves, value": (silu._value, [(E, 2 * D)], {"parts": 2}, (2, 2, 2)),
    "silu of halves, first": (silu._first_derivative, [(E, 2 * D), (E, D), (E, D)], {}, (2, 6, 4)),
    "silu of halves, second": (
        silu._second_derivative,
        [(E, 2 * D), (E, D), (E, D), (E, 2 * D)],
        {},
        (8, 26, 16),
    ),
    "gathered sum": (segment._gathered_sum, [(E // 2, D), (9, D), (9, D), *[E // 2, 9, 9]], {}, (5, 4.5, 5)),
    "gathered sum of own rows": (
        segment._gathered_sum,
        [(E, D), (9, D), (9, D), (9, D), None, 9, 9, 9],
        {},
        (7, 7, 7),
    ),
    "bessel, value": (expansion._bessel_value, [(E,), (1, D)], BESSEL, (28, 2, 3)),
    "bessel, first": (
        expansion._bessel_first_derivative,
        [(E,), (1, D), (E, D)],
        {**BESSEL, "of_frequencies": False},
        (48, 9, 6),
    ),
    "bessel, second": (
        expansion._bessel_second_derivative,
        [(E,), (1, D), (E, D), (E,)],
        {**BESSEL, "of_frequencies": True},
        (80, 21, 14),
    ),
    "fourier, value": (expansion._fourier_value, [(E,), (1, D // 2)], {}, (7, 3, 3.5)),
    "fourier, first": (
        expansion._fourier_first_derivative,
        [(E,), (1, D // 2), (E, D + 1)],
        {"of_frequencies": False},
        (14, 4.5, 3),
    ),
    "fourier, second": (
        expansion._fourier_second_derivative,
        [(E,), (1, D // 2), (E, D + 1), (E,)],
        {"of_frequencies": True},
        (36, 14, 9),
    ),
}
"""Function, shapes (a number is that of an index), options; operations, (E, D) tensors read and written (to 0.1: those
of a Fourier series have a column more)."""


class Traffic(TorchDispatchMode):
    """Counts operations, and rows that they read and write; views and allocation do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.read, self.written = 0, 0.0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations += 1
            self.read += self._rows(args)
            self.written += self._rows(results)
        return results

    @staticmethod
    def _rows(values: Any) -> float:
        found = {id(value): value for value in tree_leaves(values) if isinstance(value, torch.Tensor)}
        return sum(
            value.numel() / (E * D) for value in found.values() if value.ndim == 2 and value.numel() >= E * D / 2
        )


@pytest.mark.parametrize("name", PLAIN_CHAINS)
def test_plain_chains_move_what_the_documentation_says(name: str) -> None:
    function, shapes, options, expected = PLAIN_CHAINS[name]
    inputs = [
        None if shape is None else torch.zeros(shape) if isinstance(shape, tuple) else torch.arange(E) % shape
        for shape in shapes
    ]
    with Traffic() as traffic:
        function(*inputs, **options)
    assert (traffic.operations, round(traffic.read, 1), round(traffic.written, 1)) == expected
    text = " ".join(f"{number:g}{sign}" for number, sign in zip(expected, (",", " +", ""), strict=True))
    assert f"| {text} |" in (HERE.parents[2] / "docs" / "decisions" / "derivatives.md").read_text()


def test_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="run on GPUs \\(CUDA, ROCm\\), and the device is cpu"):
            use_kernels("triton", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package triton"):
        use_kernels("triton", torch.device("cuda"))
