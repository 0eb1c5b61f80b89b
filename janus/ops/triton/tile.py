"""What the kernels share: the piece of rows that one program computes, and how it is read."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 4096
"""A program holds whole rows in registers; wider ones do not fit."""

MAX_PROGRAMS = 512
"""Of kernels that also sum over rows: each gives a partial sum, so that no order of addition is left to chance."""


def accumulator(dtype: torch.dtype) -> Any:
    """The number format that a kernel computes in."""
    if not dtype.is_floating_point:
        return tl.int64
    return tl.float64 if dtype == torch.float64 else tl.float32


def row_tile(name: str, rows: Tensor, elements: int) -> dict[str, int]:
    """Rows and columns of a program's piece, as arguments of a kernel.

    Args:
        name: of the function, for the error.
        rows: (N, d), for its width and format.
        elements: of a piece, about; half as many in fp64.

    Raises:
        ValueError: rows of more than `MAX_WIDTH`.
    """
    width = rows.shape[1]
    if width > MAX_WIDTH:
        raise ValueError(
            f"the Triton kernel of {name} holds whole rows of at most {MAX_WIDTH} channels, and these have {width}: "
            "choose the kernels of torch"
        )
    block = triton.next_power_of_2(max(1, width))
    count = max(1, elements // (2 if rows.dtype == torch.float64 else 1) // block)
    return {"WIDTH": width, "ROWS": count, "BLOCK": block, "num_warps": min(16, max(4, count * block // 256))}
