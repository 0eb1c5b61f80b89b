"""Work that one process does for all, among those that the file system's locks reach: in a folder, or of a file."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def write_once(path: Path, write: Callable[[Path], None]) -> None:
    """Has one process write the file while others wait, whole or not at all; nothing is done where it is there.

    Args:
        path: in a folder that is made if needed.
        write: makes a file of the name that it is given.
    Raises:
        OSError: the folder cannot be written to. And whatever `write` raises.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_suffix(".lock"), wait=True) as lock:
        # Of this process alone: where a file system has no locks for several machines, the last one to finish wins.
        partial = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
        try:
            if not path.exists():  # another process may have written it while this one waited
                write(partial)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            shutil.rmtree(lock)


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
