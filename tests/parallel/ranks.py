"""Runs a function on several gloo ranks, each a process of its own, and returns what each rank returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from janus.comm.local import find_port

# The ranks are forked from a server that has imported the slow modules once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.parallel.preload"])


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    layout: Mapping[str, int] | None = None,
    with_mesh: bool = True,
    timeout: float = 300.0,
) -> list[Any]:
    """Calls `function(mesh, *arguments)` on every rank and returns the results in rank order.

    `layout` holds the sizes of the axes shard, graph and tensor, 1 by default; the other ranks are data-parallel.
    Without a mesh the function gets the `Launch`, and can open meshes of several layouts one after the other.

    Function and arguments must be picklable. A rank's exception fails the call, with its traceback.
    """
    port = find_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank,
            args=(sender, rank, world_size, port, function, arguments, dict(layout or {}) if with_mesh else None),
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    outcomes: list[tuple[bool, Any]] = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f"rank {rank} of {world_size} gave no result within {timeout} s"
            outcomes.append(pickle.loads(pipe.recv_bytes()))
    finally:
        for process in processes:
            process.join(10.0 if len(outcomes) == world_size else 0.1)
            process.kill()
    for succeeded, value in outcomes:
        assert succeeded, value
    return [value for _, value in outcomes]


def _rank(
    sender: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    layout: dict[str, int] | None,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # A collective that autograd does not know would give silently wrong second derivatives.
    warnings.filterwarnings("error", message=".*an autograd kernel was not registered.*")
    import torch

    from janus.mesh import join_ranks, open_mesh

    torch.set_num_threads(1)
    try:
        with (
            join_ranks("cpu", timeout_minutes=1.0)
            if layout is None
            else open_mesh("cpu", **layout, timeout_minutes=1.0)
        ) as place:
            outcome = (True, function(place, *arguments))
    except Exception:
        outcome = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
    # By value: the default shares tensors' memory, which ends with this process.
    sender.send_bytes(pickle.dumps(outcome))
