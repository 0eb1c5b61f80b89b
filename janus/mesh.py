"""The rank grid: one frozen value, made once per process from the launcher's variables and passed by argument."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from janus.comm.ledger import Ledger
from janus.comm.watch import LostRanksError, Watch, is_of_a_collective
from janus.grid import Grid
from janus.megatron_import import megatron_import

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the rank grid, as this rank sees it: the ranks that differ from it in this coordinate alone.

    Attributes:
        name: for messages and the ledger.
        size: number of ranks.
        rank: index of this one, 0..size-1.
        members: their ranks among all processes, by index.
        group: process group; None where there is one rank.
        ledger: counts the collectives.
    """

    name: str
    size: int = 1
    rank: int = 0
    members: tuple[int, ...] = (0,)
    group: ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger, repr=False)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place among all ranks.

    The ranks form a grid data x shard x graph x tensor, the last axis fastest, which is Megatron's order tp-cp-dp: its
    tensor-parallel group is the tensor axis, its context-parallel group the graph axis, its data-parallel group the
    axes data and shard together. The expert axis is not one more: it cuts data x shard x graph into runs of ranks,
    which is Megatron's expert-parallel group.

    Attributes:
        rank: index of this process, 0..world_size-1; rank 0 writes files and talks to the user.
        world_size: number of processes.
        local_rank: index among the processes of this machine.
        device: where this rank computes.
        data: replicas of all that one shard group holds.
        shard: ranks that share parameters and optimizer state, each with structures of its own.
        graph: ranks that share the atoms of the same structures (Megatron's context-parallel group).
        tensor: ranks that share each matrix product.
        batch: data and shard together: the ranks with different structures.
        replicas: data, shard and graph together: the ranks whose gradients of a weight are parts of one sum.
        shard_replicas: data and graph together: the same for a weight that the shard axis shares.
        expert: ranks that share the experts: a run of `replicas`.
        expert_replicas: the ranks of `replicas` with the same place in their run: the same for an expert's weight.
        ledger: counts every collective of this process.
        watch: is told the step, and ends the run when a rank is lost.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: Axis = Axis(name="data")
    shard: Axis = Axis(name="shard")
    graph: Axis = Axis(name="graph")
    tensor: Axis = Axis(name="tensor")
    batch: Axis = Axis(name="batch")
    replicas: Axis = Axis(name="replicas")
    shard_replicas: Axis = Axis(name="shard_replicas")
    expert: Axis = Axis(name="expert")
    expert_replicas: Axis = Axis(name="expert_replicas")
    ledger: Ledger = field(default_factory=Ledger)
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    @property
    def in_step(self) -> bool:
        """Whether ranks with different structures meet within a micro-batch, so that all need as many of these."""
        return self.shard.size > 1 or self.expert.size > 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher told this process.

    Attributes:
        launcher: who started it, for messages.
        rank, world_size, local_rank: as in `Mesh`.
        address, port: where rank 0 listens.
        outlives_ranks: whether it is the launcher that listens there, over all attempts of a run.
    """

    launcher: str = "python"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    outlives_ranks: bool = False


# Per launcher: variables of rank, number of ranks, rank within the machine and ranks on the machine.
_LAUNCHERS = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("Slurm", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")),
    ("Open MPI", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("MPI (PMI)", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("MPI (PALS)", ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE")),
)


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank and rendezvous from the variables of torchrun, Slurm's srun, Open MPI or PMI; one rank without any.

    The first launcher whose rank and size are both set counts, so torchrun inside a Slurm job is torchrun's.

    Raises:
        ValueError: a variable is no number, the rank is outside the world, or several machines without MASTER_ADDR.
    """
    found = [entry for entry in _LAUNCHERS if entry[1][0] in environ and entry[1][1] in environ]
    if not found:
        return Launch()
    launcher, (rank_name, size_name, local_name, local_size_name) = found[0]

    def number(name: str, default: int) -> int:
        text = environ.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"environment variable {name} is {text!r}: {launcher} sets a number there")
        return int(text)

    rank, world_size = number(rank_name, 0), number(size_name, 1)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"{rank_name} is {rank} and {size_name} is {world_size}: the rank must be below the number of ranks; "
            "start all ranks with one launcher command"
        )
    address = environ.get("MASTER_ADDR")
    port = number("MASTER_PORT", 29500)
    if address is None and launcher == "Slurm":
        lists = (environ.get(f"SLURM_{name}") for name in ("STEP_NODELIST", "NODELIST", "JOB_NODELIST"))
        address = first_host(next(filter(None, lists), "127.0.0.1"))
        # Jobs that share a machine must not share a port.
        port = number("MASTER_PORT", 20000 + number("SLURM_JOB_ID", 9500) % 20000)
    elif address is None and local_size_name in environ and number(local_size_name, 1) < world_size:
        raise ValueError(
            f"{world_size} ranks on several machines ({launcher}) without MASTER_ADDR: "
            "export MASTER_ADDR=<host name of rank 0> (and MASTER_PORT, default 29500) to all ranks"
        )
    return Launch(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=number(local_name, 0),
        address=address or "127.0.0.1",
        port=port,
        outlives_ranks=launcher == "torchrun" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def first_host(node_list: str) -> str:
    """First host name of a Slurm node list: `gpu[03-07,9],login` -> `gpu03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group(0) if first else node_list)


def pick_device(name: str, local_rank: int, *, bound: bool = False) -> torch.device:
    """Device of a rank: `auto` is its own GPU where there is one, else the CPU.

    Args:
        bound: whether the launcher may show each rank its own GPU alone (Slurm's --gpus-per-task).

    Raises:
        ValueError: unknown name, no CUDA, or more ranks than GPUs on this machine.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}: allowed are auto, cpu and cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU here: use device cpu or install torch for CUDA")
    if bound and torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
            "start at most that many ranks per machine, or use device cpu"
        )
    return torch.device("cuda", local_rank)


class ElsewhereError(RuntimeError):
    """Another rank failed and says why; this one only ends."""


@contextmanager
def open_mesh(
    device: str = "auto",
    *,
    shard: int = 1,
    graph: int = 1,
    tensor: int = 1,
    expert: int = 1,
    pipeline: int = 1,
    timeout_minutes: float = 30.0,
    launch: Launch | None = None,
    watched: bool = True,
) -> Iterator[Mesh]:
    """Joins the other ranks (collective: all ranks of the launch must call it) and leaves them at the end.

    One rank alone uses no torch.distributed. Several use gloo on CPUs and NCCL on GPUs, with the groups of Megatron's
    `parallel_state`. A process group or parallel state that exists already is adopted, and left as it was.

    Args:
        timeout_minutes: how long a rank waits for the others. A rank that dies, stops or hangs ends all others, see
            `janus.comm.watch`; in an adopted group, too.
        watched: False leaves lost ranks to the caller, or to the timeout of the process group.

    Raises:
        LostRanksError: other ranks died, hang or failed; on the one rank that tells the user.
        ElsewhereError: on other ranks than 0, for an error inside the block that rank 0 has as well; and for lost ranks
            that another rank tells the user about.
        ValueError: sizes that are not supported or do not fit the number of ranks, or an adopted state of other sizes.
    """
    launch = launch or read_launch()
    adopted = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if adopted else launch.world_size
    layout = Grid.of(world_size, shard=shard, graph=graph, tensor=tensor, expert=expert, pipeline=pipeline)
    place = pick_device(device, launch.local_rank, bound=launch.launcher == "Slurm")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size == 1 and not adopted:
        yield Mesh(device=place)
        return
    if not adopted:
        _join(launch, place, timeout_minutes)
    made_state = False
    watch, failure, lost, quiet = Watch(), None, False, False
    try:
        ledger = Ledger()
        if watched:  # first, for making groups waits for all ranks, too
            watch.start(dist.get_rank(), world_size, _own_address(launch), 60.0 * timeout_minutes, ledger, _share)
        made_state = _set_parallel_state(layout)
        mesh = _mesh_of_state(layout, launch.local_rank, place, watch, ledger)
        yield mesh
    except BaseException as error:
        failure = error
        lost = watched and is_of_a_collective(error)
        if lost:
            _ignore_termination()
            raise watch.explain(error) or ElsewhereError("another rank says why") from None
        quiet = isinstance(error, ElsewhereError)
        if not isinstance(error, ValueError | OSError):
            raise
        quiet = not adopted and _main_rank_failed()
        if quiet:
            raise ElsewhereError("rank 0 failed") from error
        raise
    finally:
        watch.stop(failure)
        if quiet:
            watch.outlive_main_rank()
        if made_state:
            _parallel_state().destroy_model_parallel()
        if not adopted and not (lost and place.type == "cuda"):  # NCCL would wait for the lost rank
            dist.destroy_process_group()


@contextmanager
def join_ranks(
    device: str = "auto", *, launch: Launch | None = None, timeout_minutes: float = 30.0
) -> Iterator[Launch]:
    """Joins the other ranks without a mesh, so that meshes of several layouts can be opened one after the other.

    Raises:
        ElsewhereError: on other ranks than 0, for an error inside the block that rank 0 has as well.
    """
    launch = launch or read_launch()
    if launch.world_size == 1 or dist.is_initialized():
        yield launch
        return
    place = pick_device(device, launch.local_rank, bound=launch.launcher == "Slurm")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    _join(launch, place, timeout_minutes)
    lost = False
    try:
        yield launch
    except (LostRanksError, ElsewhereError):
        lost = True
        raise
    except (ValueError, OSError) as error:
        if _main_rank_failed():
            raise ElsewhereError("rank 0 failed") from error
        raise
    finally:
        if not (lost and place.type == "cuda"):  # NCCL would wait for the lost rank
            dist.destroy_process_group()


def _ignore_termination() -> None:
    """A launcher ends all ranks when it sees that one is lost; this rank ends by itself, and has to say why first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _join(launch: Launch, device: torch.device, timeout_minutes: float) -> None:
    """Rendezvous of all ranks. Blocks until `launch.world_size` processes have come.

    Raises:
        ConnectionError: they have not all come in time.
    """
    if launch.rank == 0:
        message = f"waiting for {launch.world_size} ranks ({launch.launcher}) at {launch.address}:{launch.port}"
        print(message, file=sys.stderr, flush=True)
    try:
        store = _store_of_attempt(launch, timedelta(minutes=timeout_minutes)) if launch.outlives_ranks else None
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=None if store else f"tcp://{launch.address}:{launch.port}",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            # NCCL ends the process without a name when its time is up, so the watch must come first.
            timeout=timedelta(minutes=timeout_minutes + (1.0 if device.type == "cuda" else 0.0)),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # torch's own errors of networks and stores, and those of gloo
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"rank {launch.rank}: the {launch.world_size} ranks ({launch.launcher}) did not meet at "
            f"{launch.address}:{launch.port} within {timeout_minutes:g} minutes ({reason}): look at the other ranks' "
            "output, and whether this address can be reached from all machines"
        ) from error


def _store_of_attempt(launch: Launch, limit: timedelta) -> dist.Store:
    """A store on rank 0, for this attempt of torchrun alone.

    The launcher's own store still has the addresses of the ranks of an earlier attempt, and the number of restarts that
    it tells is not the same on all machines. So rank 0 says there where its store is, and the others ask until what is
    said is of a rank 0 that lives; those of earlier attempts were ended before this one began.

    Raises:
        DistError: not found in time.
    """
    key, probe, end = "janus/store_of_attempt", timedelta(seconds=3), time.monotonic() + limit.total_seconds()
    shared = dist.TCPStore(launch.address, launch.port, is_master=False, timeout=limit)
    if launch.rank == 0:
        store = dist.TCPStore(launch.address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        word = uuid.uuid4().hex
        store.set(key, word)
        shared.set(key, f"{store.port} {word}")
        return store
    while time.monotonic() < end:
        port, _, word = shared.get(key).decode().partition(" ")
        with suppress(dist.DistError):
            store = dist.TCPStore(launch.address, int(port), is_master=False, timeout=probe)
            # Something else may listen there by now.
            if store.check([key]) and store.get(key).decode() == word:
                store.set_timeout(limit)
                return store
        time.sleep(0.1)
    raise dist.DistStoreError("the store of rank 0 was not found")


def _own_address(launch: Launch) -> str:
    """Where others reach this rank if it is rank 0: as the launcher says; a group made without one tells nothing."""
    if launch.launcher != "python":
        return launch.address
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a machine without a name, so its ranks are the only ones
        return launch.address


def _share(value: str) -> str:
    """Rank 0's text on all ranks, over the process group that exists."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _main_rank_failed() -> bool:
    """Called on a rank that failed: whether it is another than rank 0, and rank 0 failed too, or soon does."""
    store = dist.distributed_c10d._get_default_store()
    key = "janus/rank_0_failed"
    if dist.get_rank() == 0:
        store.set(key, "1")
        return False
    try:
        store.wait([key], timedelta(seconds=5))
    except dist.DistNetworkError:  # it was the store's host, and has ended
        return True
    except dist.DistStoreError:
        return False
    return True


def _parallel_state() -> Any:
    """Megatron's module, which whoever needs no group need not load."""
    with megatron_import():
        from megatron.core import parallel_state
    return parallel_state


def _set_parallel_state(layout: Grid) -> bool:
    """Makes Megatron's groups, or checks those that exist. Returns whether they were made here."""
    parallel_state = _parallel_state()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            context_parallel_size=layout.graph,
            expert_model_parallel_size=layout.expert,
            create_gloo_process_groups=False,
        )
        return True
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "graph": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }
    wanted = {"tensor": layout.tensor, "graph": layout.graph, "expert": layout.expert, "pipeline": 1}
    if found != wanted:
        raise ValueError(
            f"Megatron's parallel state exists already with sizes {found}, but {wanted} were asked for: "
            "initialise it with the same sizes, or not at all"
        )
    return False


def _mesh_of_state(layout: Grid, local_rank: int, device: torch.device, watch: Watch, ledger: Ledger) -> Mesh:
    """The mesh over Megatron's groups, and over those that the shard axis needs besides (made here, by all ranks)."""
    parallel_state = _parallel_state()
    rank = dist.get_rank()
    shape = (layout.data, layout.shard, layout.graph, layout.tensor)
    grid = np.arange(dist.get_world_size()).reshape(shape)
    runs = grid.reshape(-1, layout.expert, layout.tensor)

    def axis(name: str, kept: tuple[int, ...], group: ProcessGroup | None = None, *, grid: np.ndarray = grid) -> Axis:
        """Ranks that agree with this one in all coordinates of the grid but `kept`."""
        place = np.unravel_index(rank, grid.shape)
        index = tuple(slice(None) if dim in kept else place[dim] for dim in range(grid.ndim))
        members = tuple(grid[index].reshape(-1).tolist())
        if len(members) == 1:
            return Axis(name=name, members=members, ledger=ledger)
        if group is None:
            group = dist.new_group(members, use_local_synchronization=True, group_desc=f"janus_{name}")
        if tuple(dist.get_process_group_ranks(group)) != members:
            raise ValueError(
                f"Megatron's parallel state has the {name} group {dist.get_process_group_ranks(group)} on rank {rank}, "
                f"in its order tp-cp-ep-dp-pp it is {list(members)}: initialise it in that order, or not at all"
            )
        return Axis(name=name, size=len(members), rank=members.index(rank), members=members, group=group, ledger=ledger)

    batch = axis("batch", (0, 1), parallel_state.get_data_parallel_group())
    replicas = axis("replicas", (0, 1, 2), parallel_state.get_data_parallel_group(with_context_parallel=True))
    graph = axis("graph", (2,), parallel_state.get_context_parallel_group())
    sharded = layout.shard > 1
    return Mesh(
        rank=rank,
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        data=axis("data", (0,), None if sharded else batch.group),
        shard=axis("shard", (1,), batch.group if layout.data == 1 else None),
        graph=graph,
        tensor=axis("tensor", (3,), parallel_state.get_tensor_model_parallel_group()),
        batch=batch,
        replicas=replicas,
        shard_replicas=axis("shard_replicas", (0, 2), _outer_group(layout, replicas, graph)),
        expert=axis("expert", (1,), parallel_state.get_expert_model_parallel_group(), grid=runs),
        expert_replicas=axis("expert_replicas", (0,), parallel_state.get_expert_data_parallel_group(), grid=runs),
        ledger=ledger,
        watch=watch,
    )


def _outer_group(layout: Grid, replicas: Axis, graph: Axis) -> ProcessGroup | None:
    """Group of the axes data and graph together, where Megatron has made it."""
    if layout.shard == 1:
        return replicas.group
    return graph.group if layout.data == 1 else None
