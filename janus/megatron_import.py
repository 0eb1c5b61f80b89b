"""Around every import of megatron-core: without what it says and loads that nobody here needs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def megatron_import() -> Iterator[None]:
    """The first import of Megatron's modules warns of optional packages, and decorates functions with `torch.compile`,
    which at once loads the compiler: a third of the start of any program. Inside of the block the compiler is loaded by
    the first call of such a function, of which models here make none or few."""
    compile_now = torch.compile
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
        torch.compile = functools.partial(_compiled_later, compile_now)
        try:
            yield
        finally:
            torch.compile = compile_now


def _compiled_later(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of `torch.compile`, with its arguments behind the first."""
    if function is None:  # a decorator with options
        return functools.partial(_compiled_later, compile_now, **options)
    compiled = functools.cache(lambda: compile_now(function, **options))

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return call
