"""A row of numbers for each record, which all processes of a machine share: in a file that each maps, not reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from janus.data.exclusive import write_once

logger = logging.getLogger(__name__)

SHARED_FROM = 1 << 17
"""Records. Fewer are kept by each process for itself: they are small, and need no file."""
BLOCK = 1 << 16


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """0..count-1 in parts that are small enough to compute with in memory."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def shared_rows(
    make: Callable[[], Iterable[np.ndarray]], dtype: np.dtype[Any], *, at_most: int, key: Any, folder: Path
) -> tuple[np.ndarray, Path | None]:
    """The rows that `make` gives in parts, (n,) of `dtype`, read-only, and the file that they are in, if they are.

    From `SHARED_FROM` rows on they are written to a file by the first process that asks for them, while others wait,
    and mapped: in memory once for all processes of a machine, and not even that while other things need it.

    Args:
        at_most: number of rows, or a bound of it.
        key: what the rows follow from, JSON; None keeps them to this process.
        folder: where the file is, made if needed.
    Raises:
        ValueError: a folder that cannot be written to, or is full.
    """
    if key is None or at_most < SHARED_FROM:
        parts = list(make())
        rows = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])
        rows.flags.writeable = False
        return rows, None
    digest = hashlib.sha256(json.dumps([dtype.descr, key]).encode()).hexdigest()[:24]
    path = folder / f"{digest}.rows"
    try:
        write_once(path, lambda partial: _write(partial, make()))
    except OSError as error:
        raise ValueError(
            f"{folder}: what is known of {at_most} records is kept there for all processes of a machine, in up to "
            f"{at_most * dtype.itemsize / 1e6:.1f} MB, and cannot be written ({error}): choose another cache_dir, or "
            "make room"
        ) from error
    return mapped_rows(path, dtype), path


def mapped_rows(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """(n,) the rows in a file, read-only."""
    if not path.stat().st_size:
        return np.empty(0, dtype)  # which cannot be mapped
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _write(path: Path, parts: Iterable[np.ndarray]) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())
    logger.info("%s: %.1f MB of rows for all processes", path.parent, path.stat().st_size / 1e6)
