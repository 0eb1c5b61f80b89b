"""C++ kernels against the plain functions, in the cases of those in Triton, and refused where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from janus.ops import silu
from janus.ops.fused import use_kernels, using_kernels
from janus.ops.gated_norm import _first_derivative, _value

CPU = torch.device("cpu")


@pytest.fixture
def native() -> Iterator[None]:
    with using_kernels("native", CPU):
        yield


@pytest.mark.parametrize("threads", ["1", "2"])
def test_kernels_equal_plain_functions(threads: str) -> None:
    options = ["-q", "--import-mode=importlib", "-p", "no:xdist", "-p", "no:cacheprovider"]
    chosen = {"JANUS_TEST_KERNELS": "native", "JANUS_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": threads}
    cases = str(Path(__file__).parent / "triton_cases.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, cases],
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


def test_extreme_numbers(native: None) -> None:
    """Saturated, subnormal and undefined: as torch has them, NaN included."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[-1e30, -200.0, -90.0, -30.0, -1e-30, 0.0, 1e-3, 30.0, 90.0, 200.0, 1e30]], dtype=dtype)
        ones = torch.ones_like(x)
        for ours, plain in zip(
            silu._second_derivative(x, ones, ones), silu._second_derivative.__wrapped__(x, ones, ones), strict=True
        ):
            finite = plain.isfinite()
            torch.testing.assert_close(ours[finite], plain[finite], rtol=1e-5, atol=1e-6)
        x[0, 3] = torch.nan
        assert silu._second_derivative(x, ones, ones)[0][0].isnan().nonzero().tolist() == [[3]]


def test_sums_over_rows_do_not_depend_on_chance(native: None) -> None:
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(2, 64)
    first, again = (
        _first_derivative(rows, rows, weight, weight, rows, eps=1e-5, center=True, affine=True) for _ in range(2)
    )
    assert all(one.equal(two) for one, two in zip(first, again, strict=True))


def test_refused_where_they_cannot_run(native: None) -> None:
    with pytest.raises(ValueError, match="native kernels are C\\+\\+ for CPUs, and the device is cuda"):
        use_kernels("native", torch.device("cuda"))
    half = torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="computes in fp32 and fp64, and got torch.bfloat16"):
        _value(half, half, half[:2], None, eps=1e-5, center=True)
