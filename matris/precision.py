"""Number formats that are a matter of the device, not of the model."""

from __future__ import annotations

import torch

from matris.config import Precision


def set_precision(name: str | None, device: torch.device) -> Precision | None:
    """Sets the format in which CUDA forms fp32 products, for this process.

    Args:
        name: value of a `Precision`; None for that of the model's weights.

    Raises:
        ValueError: tf32 without a CUDA GPU.
    """
    precision = None if name is None else Precision(name)
    if precision is Precision.tf32 and device.type != "cuda":
        raise ValueError("precision is tf32 on a CPU: only CUDA GPUs have that format; use fp32")
    torch.backends.cuda.matmul.allow_tf32 = precision is Precision.tf32
    return precision
