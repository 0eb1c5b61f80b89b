"""A toy energy model with its task, so that the framework is tested without chemistry.

Energy of a record: sum over its points of a small network of their coordinates; forces are derivatives of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from janus.training.task import EvaluationSource, MicroLoss, TrainingSource

NUM_RECORDS = 24


@dataclass(frozen=True, kw_only=True)
class ToyBatch:
    indices: np.ndarray
    positions: torch.Tensor  # (B, 3, 3)
    forces: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ToyStep:
    step: int
    indices: np.ndarray
    micro_batches: list[ToyBatch]


class ToyTask:
    """Force matching of `ToyBatch`es; sums are loss, squared error and count.

    Args:
        noise: random displacement of the points, from torch's global generator.
        delay: seconds that each micro-batch takes.
        flops: of each micro-batch.
    """

    num_sums = 3
    columns = ("loss", "forces_rmse")

    def __init__(self, seed: int = 0, noise: float = 0.0, delay: float = 0.0, flops: float = 0.0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)).double()
        self.model.register_parameter("unused", nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))
        self.noise, self.delay, self.flops = noise, delay, flops

    def loss(self, micro_batch: ToyBatch, totals: float, *, training: bool) -> MicroLoss:
        time.sleep(self.delay)
        positions = micro_batch.positions.clone()
        if training:
            positions += self.noise * torch.randn_like(positions)
        energy = self.model(positions.requires_grad_()).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=training)
        error = -gradient - micro_batch.forces
        total = error.square().sum() / totals
        sums = torch.stack([total.detach(), error.detach().square().sum(), torch.tensor(float(error.numel()))]).double()
        num_edges = 3 * len(micro_batch.indices)
        return MicroLoss(total=total, sums=sums, num_edges=num_edges, num_flops=self.flops)

    def identifiers(self, micro_batch: ToyBatch) -> Sequence[str]:
        return [f"record-{index}" for index in micro_batch.indices]

    def report(self, sums: np.ndarray, num_batches: int) -> dict[str, float]:
        return {"loss": float(sums[0]) / num_batches, "forces_rmse": float(np.sqrt(sums[1] / sums[2]))}

    def summary(self, report: Mapping[str, float]) -> str:
        return f"loss {report['loss']:.6f}"

    def export(self, directory: Path, state: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(dict(provenance)))

    def export_facts(self) -> Mapping[str, Any]:
        return {"kind": "toy"}


def toy_batch(indices: Sequence[int] | np.ndarray, bad: int = -1) -> ToyBatch:
    """Records by index; record `bad` has a force that is not a number."""
    positions, forces = [], []
    for index in indices:
        generator = torch.Generator().manual_seed(int(index))
        position = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        positions.append(position)
        forces.append(torch.sin(position) if index != bad else position * float("nan"))
    return ToyBatch(indices=np.asarray(indices), positions=torch.stack(positions), forces=torch.stack(forces))


def toy_step(step: int, rank: int = 0, world_size: int = 1, size: int = 6, pieces: int = 2, bad: int = -1) -> ToyStep:
    """The rank's part of a step; the global batch depends on the step alone."""
    indices = np.random.default_rng(step).permutation(NUM_RECORDS)[:size]
    own = indices[rank::world_size]
    parts = [part for part in np.array_split(own, pieces) if len(part)]
    return ToyStep(step=step, indices=indices, micro_batches=[toy_batch(part, bad=bad) for part in parts])


def toy_totals(indices: np.ndarray) -> float:
    """Number of force components."""
    return float(9 * len(indices))


def toy_training(rank: int = 0, world_size: int = 1, bad: int = -1) -> TrainingSource:
    """Endless batches from a step on."""

    def batches(start: int) -> Iterator[ToyStep]:
        step = start
        while True:
            yield toy_step(step, rank, world_size, bad=bad)
            step += 1

    return TrainingSource(batches=batches, totals=toy_totals)


def toy_validation(rank: int = 0, world_size: int = 1, bad: int = -1) -> EvaluationSource:
    """Five records; ranks beyond have none."""
    own = np.arange(100, 105)[rank::world_size]
    return EvaluationSource(
        micro_batches=lambda: (toy_batch([index], bad=bad) for index in own), totals=toy_totals(np.arange(5))
    )
