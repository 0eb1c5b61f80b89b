"""Several ranks on this machine, for a process that no launcher has started."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from typing import Any

import torch
from torch import multiprocessing as torch_multiprocessing

from janus.mesh import ElsewhereError, Launch, join_ranks

_GRACE = 45.0
"""Seconds after the end of one rank in which the others may say why; the watch of a mesh needs less."""


def find_port() -> int:
    """A free port on which ranks of this machine can meet, below those that systems give to connections (from 32768 on
    under Linux): such a one may be taken before rank 0 listens."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)  # not from a generator that is seeded alike elsewhere
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_local_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(launch, *arguments)` on so many new processes, joined without a mesh; returns rank 0's result.

    Function, arguments and result must be picklable.

    Raises:
        ValueError, OSError: those of the first rank that has one; among them that a rank was killed.
        RuntimeError: a rank failed otherwise.
        ElsewhereError: a rank has told the user why it ended all.
    """
    port = find_port()
    results = multiprocessing.get_context("spawn").SimpleQueue()
    processes = torch_multiprocessing.start_processes(
        _rank,
        (world_size, port, device, results, function, arguments),
        nprocs=world_size,
        join=False,
        start_method="spawn",
    ).processes
    outcomes: list[tuple[bool, Any]] = []
    deadline = float("inf")
    try:
        while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
            connection.wait([process.sentinel for process in alive], timeout=0.5)
            while not results.empty():
                outcomes.append(results.get())
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + _GRACE)
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    while not results.empty():
        outcomes.append(results.get())
    for succeeded, value in outcomes:
        if not succeeded:
            raise value
    killed = [(rank, status) for rank, status in enumerate(statuses) if status is not None and status < 0]
    if killed:
        names = ", ".join(f"rank {rank} ({signal.Signals(-status).name})" for rank, status in killed)
        raise ChildProcessError(
            f"of {world_size} ranks on this machine a signal ended {names}; SIGKILL may mean memory"
        )
    if any(statuses):
        raise ElsewhereError("a rank says why")
    return outcomes[0][1]


def _rank(
    rank: int, world_size: int, port: int, device: str, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    launch = Launch(launcher="local ranks", rank=rank, world_size=world_size, local_rank=rank, port=port)
    try:
        with join_ranks(device, launch=launch):
            value = function(launch, *arguments)
    except ElsewhereError:
        sys.exit(1)
    except (ValueError, OSError) as error:
        results.put((False, error))
        sys.exit(1)
    except Exception:
        results.put((False, RuntimeError(f"rank {rank} of {world_size} local ranks:\n{traceback.format_exc()}")))
        sys.exit(1)
    if rank == 0:
        results.put((True, value))
