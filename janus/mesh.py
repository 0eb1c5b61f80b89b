"""The rank grid: one frozen value, made once per process from the launcher's variables and passed by argument."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from janus.comm.ledger import Ledger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place among all ranks. Six axes multiply to `world_size`; so far only `data` may exceed 1.

    Attributes:
        rank: index of this process, 0..world_size-1; rank 0 writes files and talks to the user.
        world_size: number of processes.
        local_rank: index among the processes of this machine.
        device: where this rank computes.
        data: replicas of the model, each with its share of the global batch.
        shard: ranks that share one replica's parameters and optimizer state.
        graph: ranks that share the atoms of one structure (Megatron's context-parallel group).
        tensor: ranks that share each matrix product.
        expert: ranks that share the experts.
        pipeline: ranks that share the layers.
        data_rank: index on the data axis.
        data_group: process group of the data axis; None without torch.distributed.
        ledger: counts every collective that this mesh ran.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: int = 1
    shard: int = 1
    graph: int = 1
    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    data_rank: int = 0
    data_group: ProcessGroup | None = None
    ledger: Ledger = field(default_factory=Ledger)

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
    """

    launcher: str = "python"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500


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
    )


def first_host(node_list: str) -> str:
    """First host name of a Slurm node list: `gpu[03-07,9],login` -> `gpu03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group(0) if first else node_list)


def pick_device(name: str, local_rank: int) -> torch.device:
    """Device of a rank: `auto` is its own GPU where there is one, else the CPU.

    Raises:
        ValueError: unknown name, no CUDA, or more ranks than GPUs on this machine.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}: allowed are auto, cpu and cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA GPU here: use device cpu or install torch for CUDA")
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
) -> Iterator[Mesh]:
    """Joins the other ranks (collective: all ranks of the launch must call it) and leaves them at the end.

    One rank alone uses no torch.distributed. Several use gloo on CPUs and NCCL on GPUs, with the groups of Megatron's
    `parallel_state`. A process group or parallel state that exists already is adopted, and left as it was.

    Raises:
        ElsewhereError: on other ranks than 0, for an error inside the block that rank 0 has as well.
        ValueError: sizes that are not supported or do not fit the number of ranks, or an adopted state of other sizes.
    """
    launch = read_launch()
    adopted = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if adopted else launch.world_size
    sizes = {"shard": shard, "graph": graph, "tensor": tensor, "expert": expert, "pipeline": pipeline}
    _check_sizes(sizes, world_size)
    place = pick_device(device, launch.local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size == 1 and not adopted:
        yield Mesh(device=place)
        return
    if not adopted:
        _join(launch, place, timeout_minutes)
    made_state = False
    try:
        made_state = _set_parallel_state(sizes)
        from megatron.core import parallel_state

        yield Mesh(
            rank=dist.get_rank(),
            world_size=world_size,
            local_rank=launch.local_rank,
            device=place,
            data=world_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_group=parallel_state.get_data_parallel_group(),
        )
    except (ValueError, OSError) as error:
        if not adopted and _main_rank_failed():
            raise ElsewhereError("rank 0 failed") from error
        raise
    finally:
        if made_state:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        if not adopted:
            dist.destroy_process_group()


def _check_sizes(sizes: Mapping[str, int], world_size: int) -> None:
    """Refuses sizes that this version cannot run."""
    for axis, size in sizes.items():
        if size != 1:
            raise ValueError(
                f"parallel size of the {axis} axis is {size}, with {world_size} ranks in all: only 1 is supported by "
                f"this version, where all ranks are data-parallel; set it to 1 (data is then {world_size})"
            )


def _join(launch: Launch, device: torch.device, timeout_minutes: float) -> None:
    """Rendezvous of all ranks. Blocks until `launch.world_size` processes have come."""
    if launch.rank == 0:
        message = f"waiting for {launch.world_size} ranks ({launch.launcher}) at {launch.address}:{launch.port}"
        print(message, file=sys.stderr, flush=True)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )


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


def _set_parallel_state(sizes: Mapping[str, int]) -> bool:
    """Makes Megatron's groups, or checks those that exist. Returns whether they were made here."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes["tensor"],
            pipeline_model_parallel_size=sizes["pipeline"],
            context_parallel_size=sizes["graph"],
            expert_model_parallel_size=sizes["expert"],
            create_gloo_process_groups=False,
        )
        return True
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "graph": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
    }
    wanted = {axis: sizes[axis] for axis in found}
    if found != wanted:
        raise ValueError(
            f"Megatron's parallel state exists already with sizes {found}, but {wanted} were asked for: "
            "initialise it with the same sizes, or not at all"
        )
    return False
