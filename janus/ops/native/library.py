"""The kernels, compiled for this processor when they are first used, and called by name."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = ("gated_norm.cpp", "attention.cpp", "silu.cpp", "segment.cpp")
_FLAGS = (
    *("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
"""Torch leaves vectorising to the intrinsics that it writes; here the compiler does it."""
_FORMATS = {torch.float32: "float", torch.float64: "double"}


def launch(
    name: str,
    tensors: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    *,
    num_rows: int,
    width: int,
    numbers: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Runs a kernel, which fills `outputs`, and gives those back that there are.

    Args:
        name: of the function in C++.
        tensors: what it reads, as its comment says; channels beside each other. None where one is absent.
        outputs: what it fills, the first of them there; None for what is not wanted.
        num_rows, width: what its loops go over.
        numbers: its options.

    Raises:
        ValueError: a number format that no kernel has.
    """
    assert outputs[0] is not None
    dtype = outputs[0].dtype
    if dtype not in _FORMATS:
        raise ValueError(
            f"the C++ kernel {name} computes in fp32 and fp64, and got {dtype}: choose the kernels torch or compiled"
        )
    everything = (*tensors, *outputs)
    pointers = (ctypes.c_void_p * len(everything))(*(None if x is None else x.data_ptr() for x in everything))
    strides = (ctypes.c_int64 * len(everything))(*(0 if x is None else x.stride(0) for x in everything))
    options = (ctypes.c_double * max(1, len(numbers)))(*numbers)
    function = getattr(_library(), f"{name}_{_FORMATS[dtype]}")
    function(ctypes.c_int64(num_rows), ctypes.c_int64(width), pointers, strides, options)
    return tuple(value for value in outputs if value is not None)


@functools.cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    here = Path(__file__).parent
    header = (here / "rows.h").read_text().replace("#pragma once", "")
    sources = [(here / name).read_text().replace('#include "rows.h"', "") for name in _SOURCES]
    # torch compiles with its own OpenMP, so that its threads and ours are the same, and keeps the library on disk under
    # a hash of source and command.
    return CppCodeCache.load("#include <cmath>\n" + header + "".join(sources), extra_flags=_FLAGS)
