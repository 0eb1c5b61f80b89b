"""Several ranks on this machine, for a process that no launcher has started."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing as torch_multiprocessing

from janus.mesh import ElsewhereError, Launch, join_ranks


def run_local_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(launch, *arguments)` on so many new processes, joined without a mesh; returns rank 0's result.

    Function, arguments and result must be picklable.

    Raises:
        ValueError, OSError: those of rank 0.
        RuntimeError: a rank failed or died otherwise; the rest has been ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        torch_multiprocessing.start_processes(
            _rank, (world_size, port, device, results, function, arguments), nprocs=world_size, start_method="spawn"
        )
    except (torch_multiprocessing.ProcessRaisedException, torch_multiprocessing.ProcessExitedException) as error:
        if results.empty():
            raise RuntimeError(f"one of {world_size} local ranks failed: {error}") from None
    succeeded, value = results.get()
    if not succeeded:
        raise value
    return value


def _rank(
    rank: int, world_size: int, port: int, device: str, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    launch = Launch(launcher="local ranks", rank=rank, world_size=world_size, local_rank=rank, port=port)
    try:
        with join_ranks(device, launch=launch):
            outcome = (True, function(launch, *arguments))
    except ElsewhereError:
        return  # rank 0 says why
    except (ValueError, OSError) as error:
        if rank != 0:
            raise
        outcome = (False, error)
    if rank == 0:
        results.put(outcome)
