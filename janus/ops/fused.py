"""Chains of row-wise operations that torch.compile may turn into one kernel each."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_VARIANTS = 64
"""More than the kinds of calls a run makes."""


class _Kernels:
    """Whether chains are compiled: one choice per process, like torch's own number formats of products."""

    compiled = False


def compile_kernels(enabled: bool, device: torch.device) -> None:
    """Whether `fusable` functions are compiled from now on, each at its first call, which takes seconds.

    Raises:
        ValueError: torch finds no compiler for this device.
    """
    if enabled and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                f"compiled kernels need a C++ compiler on CPU, and torch found none ({error}): install g++, name one "
                "in the variable CXX, or leave kernels uncompiled"
            ) from None
    if enabled and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compiled kernels need the package triton on CUDA: install it, or leave kernels uncompiled")
    _Kernels.compiled = enabled
    if enabled:
        import torch._dynamo

        # Options, number formats and memory layouts make variants; torch by default allows a function only 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)


def kernels_are_compiled() -> bool:
    """Whether `fusable` functions are compiled."""
    return _Kernels.compiled


def fusable(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """For functions of tensors of equal first dimension, the number of rows, beside tensors that have no rows.

    A compiled function serves every number of rows. Each of its variants (number formats, options, which tensors are
    absent) is compared with the plain function at its first call.

    Raises:
        RuntimeError: by the decorated function, where both differ by more than rounding.
    """
    checked: set[Any] = set()

    @functools.cache
    def compiled() -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        if not _Kernels.compiled or len(tensors[0]) < 2:  # torch would compile for no row and for one row apart
            return function(*tensors, **options)
        # Nothing is recorded here, and one kernel serves tensors that need a gradient and such that do not.
        tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)
        for tensor in tensors:
            if tensor is not None and len(tensor) == len(tensors[0]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        found = compiled()(*tensors, **options)
        variant = (*(tensor if tensor is None else tensor.dtype for tensor in tensors), *sorted(options.items()))
        if variant not in checked:
            _check(function.__qualname__, found, function(*tensors, **options))
            checked.add(variant)
        return found

    return call


def _check(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for index, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        allowed = torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().max() if plain.numel() else 0.0
        difference = (ours - plain).abs().max() if plain.numel() else 0.0
        if difference > allowed:
            raise RuntimeError(
                f"the compiled {name} differs from the plain one by {difference:.1e} in result {index}, where rounding "
                f"explains {allowed:.1e}: train without compiled kernels, and report this with the versions of torch "
                "and of the compiler"
            )
