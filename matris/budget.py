"""How large a micro-batch may be, from the memory of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from janus.checkpoint import CheckpointError
from janus.comm.collectives import reduce_max
from janus.data.packing import Budget, MemoryLimit
from janus.data.shared_rows import blocks
from janus.mesh import Mesh
from janus.ops.fused import kernels_in_use
from janus.sharding.memory import weight_memory
from janus.training.memory import allocator_in_use
from matris.config import Precision
from matris.memory import UnitBytes, unit_bytes
from matris.model import MatRIS

USED = 0.9
"""Of the memory: the rest is for what the prediction misses, and for what a GPU's allocator loses between blocks."""
LIBRARIES = 0.65e9
"""Bytes of a process on CPU without weights and micro-batches: 0.5e9 when it has imported all, and what logs,
evaluation and checkpoints need."""
_USED_LATER = 0.95
"""What a resumed run may need of it for micro-batches as large as before: free memory is never the same twice."""
_SHARED = 0.7
"""Of the memory of the ranks of a graph axis together: each also holds rows that it borrows from others."""


@dataclass(frozen=True, kw_only=True)
class MemoryRoom:
    """What a device has for micro-batches.

    Attributes:
        limit: of a new run.
        most: bytes that a resumed run may take for one.
    """

    limit: MemoryLimit
    most: float


class RunBudget:
    """Limits of a run's micro-batches.

    What is free on a GPU differs from start to start, so a run that takes its limit from that keeps what it took first
    in its checkpoints: how structures are divided into micro-batches decides how sums are rounded.

    Attributes:
        budget: the limits.
        is_restored: whether a checkpoint gave that of the memory.
    """

    def __init__(self, given: Budget, room: MemoryRoom | None, mesh: Mesh, *, measured: bool) -> None:
        """
        Args:
            given: limits of the settings.
            room: of the memory, if that is a limit too.
            measured: whether it is what was free, and not a number of the settings.
        """
        self.budget = given if room is None else replace(given, memory=room.limit)
        self.is_restored = False
        self._room = room if measured else None
        axes = (mesh.batch, mesh.shard, mesh.graph, mesh.tensor, mesh.expert)
        self._layout = [axis.size for axis in axes]

    def facts(self) -> dict[str, Any] | None:
        """For a checkpoint, if memory was measured: the limit, and what it is a limit of."""
        if self._room is None:
            return None
        assert self.budget.memory is not None
        memory = self.budget.memory
        return {"available": memory.available, "per_unit": list(memory.per_unit), "layout": self._layout}

    def restore(self, facts: dict[str, Any] | None) -> None:
        """Takes what `facts` gave. Other ranks, or other bytes per atom, edge or angle (by the model, the precision,
        what is kept), make other micro-batches anyway, and keep their own limit.

        Raises:
            CheckpointError: there is not so much memory any more.
        """
        if self._room is None or facts is None:
            return
        limit, available = self._room.limit, float(facts["available"])
        if (facts["per_unit"], facts["layout"]) != (list(limit.per_unit), self._layout):
            return
        if available > self._room.most:
            raise CheckpointError(
                f"data.budget is auto, and this run began with micro-batches of up to {available / 1e9:.3g} GB; with "
                f"what is free on the GPUs now they can have {self._room.most / 1e9:.3g} GB. Free that memory, or give "
                "data.memory_gb to go on with smaller ones, which changes nothing but how sums are rounded"
            )
        self.budget, self.is_restored = replace(self.budget, memory=replace(limit, available=available)), True


def memory_room(
    model: MatRIS, mesh: Mesh, *, recompute: str, memory_gb: float | None, sizes: np.ndarray, fixed: bool
) -> MemoryRoom:
    """Bytes for micro-batches, the same on all ranks, which all call it before the weights are shared out.

    Args:
        recompute: what the model does, or `auto`: sets it to the policy with the least work that leaves room for the
            largest of the training data, or else to that with the least memory.
        memory_gb: GB that a rank may use, on CPU the whole process; None for what is free on its GPU.
        sizes: (n, 3) of the training data.
        fixed: whether whole experts are on home ranks.

    Raises:
        ValueError: on CPU, whose memory is no rank's own, without `memory_gb`; nothing is left beside the weights.
    """
    weights = weight_memory(
        model,
        model.sharding_units(),
        shards=mesh.shard.size,
        tensor=1,  # the model has its part already
        experts=model.expert_sites(),
        expert_ranks=mesh.expert.size,
        at_home=fixed,
    )
    needed = weights.held + weights.gathered + weights.gathered_experts
    own = _free_bytes(mesh.device) if memory_gb is None else _given_bytes(mesh.device, memory_gb)
    of_rank = -reduce_max(-own, mesh)
    together = 1.0 if mesh.graph.size == 1 else _SHARED * mesh.graph.size
    policies = ("none", "selective", "all", "full")[: 4 if model.can_recompute_blocks else 3]
    for_batches = USED * of_rank - needed
    if for_batches <= 0.0:
        taken = (
            f" of {memory_gb:g} GB, {LIBRARIES / 1e9:g} GB of libraries taken off,"
            if memory_gb is not None and mesh.device.type == "cpu"
            else ""
        )
        raise ValueError(
            f"data.budget is auto: the memory of each rank{taken} leaves {max(0.0, of_rank) / 1e9:.3g} GB for tensors, "
            f"and nothing of it for micro-batches beside {needed / 1e9:.3g} GB of weights, gradients and optimizer "
            "state: share the weights over more ranks (parallel.fully_sharded_size), or give more memory"
        )
    found = [
        _needs(model, policy, sizes, together * for_batches, weights.waiting)
        for policy in (policies if recompute == "auto" else (recompute,))
    ]
    room = [together * (for_batches - needs.unit.constant) - needs.largest for needs in found]
    chosen = next((needs for needs, left in zip(found, room, strict=True) if left >= 0.0), found[int(np.argmax(room))])
    model.set_recompute(chosen.policy)
    unit, available = chosen.unit, for_batches - chosen.unit.constant

    def given_for(own: float) -> float:
        """GB of a rank in which such a record fits."""
        needs = (own / together + unit.constant + needed) / USED
        return (needs * allocator_in_use().overhead + LIBRARIES if mesh.device.type == "cpu" else needs) / 1e9

    def advice(sizes: np.ndarray) -> str:
        bytes_of = sizes @ np.array(unit.per_unit)
        own, num_atoms = float(bytes_of.max()), int(sizes[bytes_of.argmax(), 0])
        memory = f"give each rank {math.ceil(100.0 * given_for(own)) / 100.0:g} GB (data.memory_gb)"
        # A rank without atoms of its own would be none the less.
        ranks = max(2, math.ceil(own / (_SHARED * available))) if available > 0.0 else num_atoms + 1
        share = (
            f"let {ranks} ranks share each structure (parallel.context_parallel_size), " if ranks <= num_atoms else ""
        )
        keep_less = "" if chosen.policy == "full" else "keep less (training.recompute full), "
        return f"{memory}, {share}{keep_less}or leave these records out"

    return MemoryRoom(
        limit=MemoryLimit(available=together * available, per_unit=unit.per_unit, advice=advice),
        most=together * (_USED_LATER * of_rank - needed - unit.constant),
    )


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """Bytes of micro-batches under a policy of recomputation, and of the largest structure alone."""

    policy: str
    unit: UnitBytes
    largest: float


def _needs(model: MatRIS, policy: str, sizes: np.ndarray, available: float, waiting: int) -> _Needs:
    """
    Args:
        available: for a micro-batch and the constant of its bytes.
        waiting: bytes of `WeightMemory`, which count as constant ones of micro-batches where they are needed.
    """
    model.set_recompute(policy)
    waiting = 0 if model.recompute_blocks else waiting

    def line(recompute_bytes: int | None) -> UnitBytes:
        unit = unit_bytes(
            model.hyper,
            recompute_bytes=recompute_bytes,
            recompute_blocks=model.recompute_blocks,
            itemsize=8 if model.precision is Precision.fp64 else 4,
            bf16=model.precision is Precision.bf16_mixed,
            kernels=kernels_in_use(),
            expert_ranks=model.mesh.expert.size,
        )
        return replace(unit, constant=unit.constant + waiting)

    # Small results are kept, so small micro-batches need no more than if all were.
    lines = [line(model.recompute_bytes)] + ([line(None)] if model.recompute_bytes else [])
    mean = sizes.mean(axis=0)
    unit = max(lines, key=lambda unit: (available - unit.constant) / float(mean @ np.array(unit.per_unit)))
    largest = max(float((sizes[block] @ np.array(unit.per_unit)).max()) for block in blocks(len(sizes)))
    return _Needs(policy=policy, unit=unit, largest=largest)


def _given_bytes(device: torch.device, memory_gb: float) -> float:
    """For tensors."""
    given = 1e9 * memory_gb
    return (given - LIBRARIES) / allocator_in_use().overhead if device.type == "cpu" else given


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        raise ValueError(
            "data.budget is auto on CPU, where memory is not a rank's own: say how many GB each rank may use, "
            "data.memory_gb, or give data.max_atoms, max_edges or max_angles in place of it"
        )
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))
