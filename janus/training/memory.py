"""Freed memory stays with the process: a step frees and takes hundreds of MB, and new pages cost more than reuse."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt in glibc's malloc.h
_NEVER = -1
_LARGEST = 1 << 25  # of a block that comes from the heap, which is kept; glibc allows no more


def keep_freed_memory() -> bool:
    """Tells glibc not to give freed blocks of up to 32 MiB back to the system. The peak stays the same.

    By default it returns the end of the heap after each large free, and the next allocation faults in every page again:
    about a tenth of a small step's time on CPU (docs/benchmarks.md).

    Returns:
        whether it did; False where the C library is another one, whose own policy then holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
