"""Translates every Triton kernel for a GPU that need not be there; `test_triton.py` runs this.

`python triton_compile.py fp32|bf16|fp64 cuda|hip ...` prints each kernel with the size of its machine code.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from janus.ops.triton import attention, expansion, gated_norm, segment, silu

TARGETS = {"cuda": (GPUTarget("cuda", 90, 32), "cubin"), "hip": (GPUTarget("hip", "gfx942", 64), "hsaco")}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
WIDTH = 100


def main(number_format: str, *targets: str) -> None:
    for device, target in enumerate(targets):  # a device each, as kernels are kept by device
        driver.set_active(_driver(device, *TARGETS[target]))
        translate_all(FORMATS[number_format])


def _driver(number: int, gpu: GPUTarget, binary: str) -> SimpleNamespace:
    def translated(kernel: JITFunction, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = kernel.run(*arguments, grid=grid, warmup=True, **options)
            assert len(made.asm[binary]) > 0
            print(f"{gpu.arch} {kernel.__module__}.{kernel.__name__}: {len(made.asm[binary])} bytes")

        return launch

    JITFunction.__getitem__ = translated
    return SimpleNamespace(
        get_current_device=lambda: number, get_current_stream=lambda device: 0, get_current_target=lambda: gpu
    )


def translate_all(dtype: torch.dtype) -> None:
    def rows(width: int = WIDTH) -> Tensor:
        return torch.zeros(40, width, dtype=dtype)

    pair, index = torch.zeros(2, WIDTH, dtype=dtype), torch.zeros(40, dtype=torch.int64)
    norm = {"eps": 1e-5, "center": True}
    gated_norm.value(rows(), rows(), pair, None, **norm)
    gated_norm.first_derivative(rows(), rows(), pair, pair, rows(), affine=True, **norm)
    gated_norm.second_derivative(rows(), rows(), pair, pair, rows(), rows(), rows(), **norm)
    logits, u, grads = rows(2 * WIDTH), rows(1), [rows() for _ in range(4)]
    attention.value(logits, rows(), cap=None)
    attention.first_derivative(logits, rows(), *grads, u, cap=10.0)
    attention.second_derivative(logits, rows(), *grads, rows(2 * WIDTH), rows(), u, u, cap=10.0)
    silu.value(rows(2 * WIDTH), parts=2)
    silu.first_derivative(rows(2 * WIDTH), rows(), rows())
    silu.second_derivative(rows(2 * WIDTH), rows(), rows(), rows(2 * WIDTH))
    length, frequencies, both = rows(1)[:, 0], pair[:1], rows(2 * WIDTH + 1)
    bessel = {"cutoff": 6.0, "exponent": 8}
    expansion.bessel_value(length, frequencies, **bessel)
    expansion.bessel_first_derivative(length, frequencies, rows(), **bessel, of_frequencies=True)
    expansion.bessel_second_derivative(length, frequencies, rows(), length, **bessel, of_frequencies=True)
    expansion.fourier_value(length, frequencies)
    expansion.fourier_first_derivative(length, frequencies, both, of_frequencies=True)
    expansion.fourier_second_derivative(length, frequencies, both, length, of_frequencies=True)
    segment.max_rows(rows(), index, 3)
    segment.sum_rows(rows(), index, 3)
    segment.gathered_sum(rows(), rows(), rows(), None, index, index.int())


if __name__ == "__main__":
    main(*sys.argv[1:])
