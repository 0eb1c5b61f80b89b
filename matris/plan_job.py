"""What is planned, and what a plan says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from janus.comm.traffic import Traffic
from janus.machine import Band, Machine
from janus.ops.fused import Kernels
from matris.config import ModelConfig, Precision
from matris.layouts import Layout
from matris.workload import Workload

Recompute = Literal["none", "selective", "all", "full"]
POLICIES: tuple[Recompute, ...] = ("none", "selective", "all", "full")
"""Of recomputation, the one with the least work first."""

NOT_MODELLED = (
    "load imbalance between ranks beyond --imbalance, and stragglers",
    "congestion of the network, its topology above the node, and failures",
    "the input pipeline, evaluation, checkpoints and logs",
    "launches of kernels: small micro-batches are slower on GPUs than predicted",
    "element-wise operations beyond writing and reading once what backward passes keep",
    "fragmentation of memory beyond the tenth that is left free (on CPUs much more, with the libraries: "
    "docs/training.md), and memory that a tensor axis saves in activations",
    "what kernels other than torch's save in time",
    "plans of sharded experts on real tokens: either all tokens travel or all weights do, whichever is less",
    "rows that graph ranks borrow, beyond an estimate for structures of even density",
)

FORMATS = {Precision.fp32: ("fp32", 4), Precision.tf32: ("tf32", 4), Precision.bf16_mixed: ("bf16", 2)}
"""Format of most products and bytes of an element, by precision."""


class NoPlanError(ValueError):
    """A layout that cannot be.

    Attributes:
        kind: why, in few words, for counting.
        needed: bytes on each rank, of one that does not fit the memory.
    """

    def __init__(self, kind: str, message: str, *, needed: float = math.inf) -> None:
        super().__init__(message)
        self.kind, self.needed = kind, needed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and where.

    Attributes:
        hyper: the model.
        machine: its nodes and devices.
        ranks: of all nodes together.
        devices_per_node: ranks of a node.
        workload: structures.
        global_batch: structures of an update.
        micro_batch: structures that the ranks with the same structures take at once; None for as many as fit.
        precision: fp32, tf32 or bf16-mixed.
        recompute: None for the policy with the least work that fits.
        kernels: that the run takes; they decide on memory alone.
        imbalance: largest load of a rank over the mean load.
    """

    hyper: ModelConfig
    machine: Machine
    ranks: int
    devices_per_node: int
    workload: Workload
    global_batch: int
    micro_batch: int | None = None
    precision: Precision = Precision.fp32
    recompute: Recompute | None = None
    kernels: Kernels = "torch"
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        if self.precision not in FORMATS:
            raise ValueError(
                f"precision is {self.precision.value}: plans are made for {', '.join(kind.value for kind in FORMATS)}"
            )
        self.machine.flops_per_s(FORMATS[self.precision][0])
        for name in ("ranks", "devices_per_node", "global_batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if not 1.0 <= self.imbalance < math.inf:
            raise ValueError(f"imbalance is {self.imbalance}: the largest load over the mean is a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one rank at the peak of a step.

    Attributes:
        weights: weights, gradients, moments and average, all the time.
        gathered: of sharded weights, while they are gathered, and of gradients that wait in the second backward pass.
        experts: likewise of sharded experts.
        activations: of the micro-batch.
        available: what may be used.
    """

    weights: float
    gathered: float
    experts: float
    activations: float
    available: float

    @property
    def total(self) -> float:
        """All that is needed."""
        return self.weights + self.gathered + self.experts + self.activations


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, see the head of this module.

    Attributes:
        computation, update, communication, hidden: parts; of `hidden` all, before any is hidden.
        step: all of it.
    """

    computation: float
    update: float
    communication: float
    hidden: float
    step: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one layout.

    Attributes:
        layout: with its replicas.
        micro_batch, micro_batches: structures of one, and how many of them a rank takes for an update.
        recompute: policy.
        memory: of a rank.
        flops: of a rank's products in a step, in the mean over ranks, without those that recomputation adds.
        traffic: all collectives of a rank in a step.
        pessimistic, optimistic: times.
        efficiency: computation and update over the step, in the mean over ranks: against one replica that need not
            communicate or wait.
        structures_per_s: of all ranks.
        mfu: `flops` over what the device could do in the time of the step.
    """

    layout: Layout
    micro_batch: int
    micro_batches: int
    recompute: Recompute
    memory: MemoryUse
    flops: float
    traffic: Traffic
    pessimistic: StepTime
    optimistic: StepTime
    efficiency: Band
    structures_per_s: Band
    mfu: Band
