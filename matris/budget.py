"""How large a micro-batch may be, from the memory of the device."""

from __future__ import annotations

import math

import numpy as np
import torch

from janus.comm.collectives import reduce_max
from janus.data.packing import MemoryLimit
from janus.mesh import Mesh
from janus.sharding.memory import weight_memory
from matris.config import Precision
from matris.memory import unit_bytes
from matris.model import MatRIS

USED = 0.9
"""Of the memory: the rest is for what the prediction misses, and for what the allocator loses between blocks."""
_SHARED = 0.7
"""Of the memory of the ranks of a graph axis together: each also holds rows that it borrows from others."""


def memory_limit(model: MatRIS, mesh: Mesh, *, memory_gb: float | None, sizes: np.ndarray, fixed: bool) -> MemoryLimit:
    """Bytes for micro-batches, the same on all ranks, which all call it before the weights are shared out.

    Args:
        memory_gb: GB that a rank may use; None for what is free on its GPU.
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
    own = _free_bytes(mesh.device) if memory_gb is None else 1e9 * memory_gb
    of_rank = -reduce_max(-own, mesh)
    itemsize = 8 if model.precision is Precision.fp64 else 4
    unit = unit_bytes(model.hyper, recompute_bytes=model.recompute_bytes, itemsize=itemsize)
    per_unit = (unit.atom, unit.edge, unit.angle)
    available = USED * of_rank - needed - unit.constant
    if available <= 0.0:
        raise ValueError(
            f"data.budget is auto: of {of_rank / 1e9:.3g} GB on each rank nothing is left for micro-batches beside "
            f"{needed / 1e9:.3g} GB of weights, gradients and optimizer state"
            f"{f' and {unit.constant / 1e9:.3g} GB of small results' if unit.constant else ''}: share the weights over "
            "more ranks (parallel.fully_sharded_size), or give more memory"
        )
    largest = float((sizes @ np.array(per_unit)).max())
    ranks = max(2, math.ceil(largest / (_SHARED * available)))
    available *= 1.0 if mesh.graph.size == 1 else _SHARED * mesh.graph.size
    advice = (
        f"let ranks share structures: parallel.context_parallel_size {ranks} is enough for the largest of the training "
        "data; or keep less (training.recompute all), or leave these records out"
    )
    return MemoryLimit(available=available, per_unit=per_unit, advice=advice)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        raise ValueError(
            "data.budget is auto on CPU, where memory is not a rank's own: say how many GB each rank may use, "
            "data.memory_gb, or give data.max_atoms, max_edges or max_angles in place of it"
        )
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))
