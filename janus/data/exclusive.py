"""A folder that one process at a time has for itself, among all that the file system's locks reach."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[Path]:
    """The folder, made if needed, for this process alone; the lock ends with the process, however it ends.

    Args:
        wait: for another process that has it, instead of refusing.
    Raises:
        ValueError: another process has it.
    """
    while True:
        # Not with `exist_ok`, which raises where the process before removes the folder while it looks again.
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # the process before removed it in between
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ValueError(f"{folder}: another process is at work there; wait for it") from None
                logger.info("waiting for another process that is at work in %s", folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The process before may have finished and removed the folder that this lock is on.
            if _is_still(folder, descriptor):
                yield folder
                return
        finally:
            os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False
