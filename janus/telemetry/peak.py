"""How fast a rank's device forms matrix products at best: what a run's share of peak is a share of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Format: TypeAlias = Literal["fp64", "fp32", "tf32", "bf16"]
"""Of a product's operands."""

_FORMATS: tuple[Format, ...] = ("fp64", "fp32", "tf32", "bf16")
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}

_GPUS = (
    # Dense figures, TFLOP/s, of what a product can use: matrix units where the format has them. Sources: NVIDIA's data
    # sheets of the A100 (2021), H100 (2023) and H200 (2024) and its HGX B200 specifications (2025), which give TF32 and
    # BF16 with sparsity: half of that; AMD's data sheets of the MI250X (2021) and MI300X (2023). A process sees a half
    # of an MI250X. Words of the device's name, the more special ones first; 0: no such products.
    (("A100",), (19.5, 19.5, 156.0, 312.0)),
    (("H100", "PCIe"), (51.0, 51.0, 378.0, 756.0)),
    (("H100", "NVL"), (60.0, 60.0, 417.5, 835.5)),
    (("H100",), (67.0, 67.0, 494.5, 989.5)),
    (("H200", "NVL"), (60.0, 60.0, 417.5, 835.5)),
    (("H200",), (67.0, 67.0, 494.5, 989.5)),
    (("B200",), (37.0, 75.0, 1100.0, 2250.0)),
    (("MI250X",), (47.85, 47.85, 0.0, 191.5)),
    (("MI300X",), (163.4, 163.4, 653.7, 1307.4)),
)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Of one rank.

    Attributes:
        flops_per_s: matrix products at best.
        origin: where the number is from, for people.
    """

    flops_per_s: float
    origin: str


def find_peak(device: torch.device, products: Format, *, given_tflops: float | None = None) -> Peak | None:
    """The given number, else that of a known GPU, else on CPU the rate of a large product, measured now.

    Args:
        products: format of the operands.
        given_tflops: of one device, TFLOP/s.
    Returns:
        None for a GPU that is not known.
    """
    if given_tflops is not None:
        return Peak(flops_per_s=1e12 * given_tflops, origin=f"{given_tflops:g} TFLOP/s per rank, as given")
    if device.type == "cuda":
        return known_peak(torch.cuda.get_device_name(device), products)
    rate, size = measured_rate(device, products)
    text = f"{rate / 1e9:.3g} GFLOP/s per rank, measured on a {products} product of {size} x {size} matrices"
    return Peak(flops_per_s=rate, origin=text)


def known_peak(device_name: str, products: Format) -> Peak | None:
    """From the table of GPUs; None for one that is not in it, or is a part of one (MIG)."""
    words = device_name.replace("-", " ").split()
    for wanted, rates in _GPUS:
        rate = rates[_FORMATS.index(products)]
        if set(wanted) <= set(words) and "MIG" not in words and rate > 0.0:
            return Peak(flops_per_s=1e12 * rate, origin=f"{rate:g} TFLOP/s per rank, dense {products} of {device_name}")
    return None


def measured_rate(device: torch.device, products: Format, *, enough_s: float = 0.02) -> tuple[float, int]:
    """FLOP/s of a product of two square matrices, the best of three, and their size.

    The size doubles until a product takes `enough_s`, so that small machines need little time and large ones are busy.
    """
    size = 512
    while True:
        matrix = torch.ones(size, size, dtype=_DTYPES[products], device=device)
        seconds = min(_seconds(matrix) for _ in range(3))
        if seconds >= enough_s or size >= 16384:
            return 2.0 * size**3 / seconds, size
        size *= 2


def _seconds(matrix: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    start = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - start
