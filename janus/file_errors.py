"""Errors of writing that say where: a full disk is often noticed when a stream is flushed, and then without a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the operating system inside of the block that names no file names this one.

    Raises:
        OSError: as inside of the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
