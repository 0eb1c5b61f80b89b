"""One run at a time in a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from janus.comm.collectives import on_main_rank
from janus.mesh import Mesh

LOCK = ".lock"
"""Name of a file in the directory, which says who is at work there."""


@contextmanager
def occupied(directory: Path, mesh: Mesh) -> Iterator[None]:
    """Inside, no other run can begin in `directory`, which is made if need be. All ranks call it.

    Rank 0 holds a lock that its death ends, however it dies, and that processes which it forked do not hold. Where the
    file system has no locks, a line says that nothing is protected.

    Raises:
        BlockingIOError: another run is at work there; on all ranks.
    """
    new = not directory.exists()
    held: list[IO[str]] = []
    on_main_rank(lambda: held.append(_lock(directory)), mesh)
    try:
        yield
    finally:
        for stream in held:
            (directory / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # a run that was refused leaves nothing
                if new:
                    directory.rmdir()
            stream.close()


def _lock(directory: Path) -> IO[str]:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    stream = path.open("a+")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            with stream:
                stream.seek(0)
                owner = stream.read().strip() or "another run"
            raise BlockingIOError(
                f"{owner} is at work in {directory}: wait for its end, or choose another output directory"
            ) from error
        print(f"{path} cannot be locked ({error.strerror}): nothing keeps a second run from this directory", flush=True)
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(stream.fileno())):  # removed in between
        stream.close()
        return _lock(directory)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
