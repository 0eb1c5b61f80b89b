"""The process's own allocator, which on CPU serves the tensors: what it keeps, and what it loses between blocks."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt in glibc's malloc.h
_NEVER = -1
_LARGEST = 1 << 25  # of a block that comes from the heap, which is kept; glibc allows no more


def keep_freed_memory() -> bool:
    """Tells glibc not to give freed blocks of up to 32 MiB back to the system. The peak stays the same.

    A step frees and takes hundreds of MB, and new pages cost more than reuse. By default glibc returns the end of the
    heap after each large free, and the next allocation faults in every page again: 1.8 times the time of a step
    of 64 atoms if it did so with every block of 4 MiB (docs/benchmarks.md).

    Returns:
        whether it did; False where the C library is another one, whose own policy then holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """Of this process.

    Attributes:
        name: for people.
        overhead: bytes that it takes from the system for each byte of a step's tensors.
    """

    name: str
    overhead: float


_OTHERS = {"libtcmalloc": "tcmalloc", "libjemalloc": "jemalloc", "libtbbmalloc_proxy": "tbbmalloc"}
"""Libraries that take the place of glibc's, by a part of their file's name."""


def allocator_in_use() -> Allocator:
    """By what is loaded and set; the overheads were measured (docs/benchmarks.md). An unknown one counts as glibc's."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    for library, name in _OTHERS.items():
        if library in loaded:
            return Allocator(name=name, overhead=1.1)
    if "tcache_count=0" in os.environ.get("GLIBC_TUNABLES", ""):
        return Allocator(name="glibc without caches of small blocks", overhead=1.6)
    return Allocator(name="glibc", overhead=3.0)
