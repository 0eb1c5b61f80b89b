"""Triton kernels: against the plain functions in a process of its own, translated for GPUs, and refused where they
cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from janus.ops.fused import use_kernels

HERE = Path(__file__).parent
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
    in_process("-m", "pytest", *options, str(HERE / "triton_cases.py"), JANUS_TEST_DEVICE=device, **chosen)


@needs_triton
@pytest.mark.parametrize("target", ["cuda", "hip"])
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does, which needs no GPU."""
    in_process(str(HERE / "triton_compile.py"), target, TRITON_CACHE_DIR=str(tmp_path))


def test_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="run on GPUs \\(CUDA, ROCm\\), and the device is cpu"):
            use_kernels("triton", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package triton"):
        use_kernels("triton", torch.device("cuda"))
