"""Functions of rows that may run as one kernel each: of torch.compile, or written in C++ or Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Kernels: TypeAlias = Literal["torch", "compiled", "native", "triton"]
"""How `fusable` functions run: as torch's operations one after the other, compiled by torch.compile, in C++ (CPU) or
in Triton (GPUs)."""

_VARIANTS = 64
"""More than the kinds of calls a run makes."""


class _Chosen:
    """One choice per process, like torch's own number formats of products."""

    kernels: Kernels = "torch"


def use_kernels(kernels: Kernels, device: torch.device) -> None:
    """How `fusable` functions run from now on. What is compiled is so at its first call, which takes seconds.

    Raises:
        ValueError: this device cannot run them, or a compiler is missing.
    """
    if kernels == "compiled":
        check_compiler(f"{kernels} kernels", device)
        import torch._dynamo

        # Options, number formats and memory layouts make variants; torch by default allows a function only 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    if kernels == "native":
        if device.type != "cpu":
            raise ValueError(
                f"native kernels are C++ for CPUs, and the device is {device.type}: choose the kernels triton or "
                "compiled"
            )
        check_compiler(f"{kernels} kernels", device)
    if kernels == "triton":
        _check_triton(device)
    _Chosen.kernels = kernels


@contextmanager
def using_kernels(kernels: Kernels, device: torch.device) -> Iterator[None]:
    """`use_kernels` inside, and the choice of before afterwards."""
    before = _Chosen.kernels
    use_kernels(kernels, device)
    try:
        yield
    finally:
        _Chosen.kernels = before


def kernels_in_use() -> Kernels:
    """How `fusable` functions run."""
    return _Chosen.kernels


def check_compiler(what: str, device: torch.device, *, instead: str = "choose the kernels of torch") -> None:
    """Compiles an empty function for a CPU, to see whether that works; of a GPU it looks for the package triton alone.

    Args:
        what: is to be compiled, in the plural, and `instead` what to do without a compiler, for messages.

    Raises:
        ValueError: there is no compiler, or it fails.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(f"{what} need the package triton on CUDA: install it, or {instead}")
    if device.type != "cpu":
        return
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"{what} need a C++ compiler on CPU, and torch found none ({error}): install g++, name one in the variable "
            f"CXX, or {instead}"
        ) from None
    try:
        CppCodeCache.load('extern "C" int nothing() { return 0; }')
    except CppCompileError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line and not line.startswith("C++")), lines[-1])
        raise ValueError(
            f"{what} need a C++ compiler on CPU, and {get_cpp_compiler()} failed ({told}): install a newer g++, name "
            f"another in the variable CXX, or {instead}"
        ) from None


def _check_triton(device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton kernels need the package triton: install it, or choose the kernels of torch")
    import triton

    if not hasattr(triton, "knobs"):
        raise ValueError(
            f"Triton is {triton.__version__}: its kernels here need 3.4 or newer, or choose those of torch"
        )
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels run on GPUs (CUDA, ROCm), and the device is {device.type}: choose the kernels torch, "
            "native or compiled; to test them without a GPU, set TRITON_INTERPRET=1 before the start (very slow)"
        )


def fusable(
    kernel: str, written: Sequence[Kernels] = ("compiled", "native", "triton")
) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """For functions of tensors of equal first dimension, the number of rows, beside tensors that have no rows.

    A kernel serves every number of rows. Each of its variants (number formats, widths, options, which tensors are
    absent) is compared with the plain function at its first call.

    Args:
        kernel: `module.function` of `janus.ops.triton` and `janus.ops.native` with the same arguments and results.
        written: for which choices there is a kernel, or torch.compile gains anything; for others the plain function
            stands, which may be made of fusable ones itself.

    Raises:
        RuntimeError: by the decorated function, where both differ by more than rounding.
    """

    def decorate(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        checked: set[Any] = set()

        @functools.cache
        def written_in(language: str) -> Callable[..., tuple[Tensor, ...]]:
            module, name = kernel.split(".")
            return getattr(importlib.import_module(f"janus.ops.{language}.{module}"), name)

        @functools.cache
        def by_compiler() -> Callable[..., tuple[Tensor, ...]]:
            return torch.compile(function, fullgraph=True)

        @functools.wraps(function)
        def call(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
            chosen = _Chosen.kernels
            if chosen not in written:
                return function(*tensors, **options)
            num_rows = len(tensors[0])
            if num_rows < (2 if chosen == "compiled" else 1):  # torch would compile for no row and for one row apart
                return function(*tensors, **options)
            # Nothing is recorded here, and one kernel serves tensors that need a gradient and such that do not.
            tensors = tuple(value.detach() if isinstance(value, Tensor) else value for value in tensors)
            if chosen == "compiled":
                for tensor in tensors:
                    if tensor is not None and len(tensor) == num_rows:
                        torch._dynamo.maybe_mark_dynamic(tensor, 0)
            found = (by_compiler() if chosen == "compiled" else written_in(chosen))(*tensors, **options)
            variant = (chosen, *map(_kind, tensors), *sorted(options.items()))
            if variant not in checked and found[0].numel():
                _check(chosen, function.__qualname__, found, function(*tensors, **options))
                checked.add(variant)
            return found

        return call

    return decorate


def _kind(value: Any) -> Any:
    return (value.dtype, value.shape[1:]) if isinstance(value, Tensor) else type(value)


def _check(kernels: Kernels, name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for index, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        if not plain.numel():
            continue
        relative = torch.finfo(plain.dtype).eps ** 0.5 if plain.dtype.is_floating_point else 0.0
        # Infinities agree where they are equal, and do not count as the scale of the others.
        scale = plain.abs().masked_fill(plain.isinf(), 0).max()
        allowed, difference = relative * scale, (ours - plain).masked_fill(ours == plain, 0).abs().max()
        if not difference <= allowed:
            raise RuntimeError(
                f"the {kernels} kernel of {name} differs from the plain function by {difference:.1e} in result "
                f"{index}, where rounding explains {allowed:.1e}: choose the kernels of torch, and report this with "
                "the versions of torch and of the compiler"
            )
