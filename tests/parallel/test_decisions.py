"""What a run decides (to stop, that a model is the best, that a loss is bad) all ranks decide alike, on every axis."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from janus.mesh import Mesh
from janus.optim import AdamWConfig, Backend, Schedule, adamw
from janus.training.learner import Learner, _common_backend
from janus.training.step import NonFiniteError
from janus.training.task import EvaluationSource, MicroLoss
from janus.training.trainer import Trainer, TrainerConfig
from tests.janus.toy import ToyBatch, ToyTask, toy_batch, toy_totals, toy_training
from tests.parallel.ranks import run_ranks

STEPS = 6


class OddTask(ToyTask):
    """Something happens on the last rank alone.

    Args:
        event: `signal`, a stop signal in its second micro-batch; `worse`, a validation loss that grows from one
            evaluation to the next, where that of the others falls; `nan`, a loss of its third micro-batch that is none.
    """

    def __init__(self, mesh: Mesh, event: str) -> None:
        super().__init__()
        self.event, self.is_odd = event, mesh.rank == mesh.world_size - 1
        self.trained = self.evaluated = 0

    def loss(self, micro_batch: ToyBatch, totals: float, *, training: bool) -> MicroLoss:
        loss = super().loss(micro_batch, totals, training=training)
        self.trained += training
        self.evaluated += not training
        if self.event == "worse" and not training:
            sums = loss.sums.clone()
            sums[0] = 1.0 + (1e-15 if self.is_odd else -1e-15) * self.evaluated
            return replace(loss, sums=sums)
        if self.is_odd and training and self.event == "signal" and self.trained == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.is_odd and training and self.event == "nan" and self.trained == 3:
            return replace(loss, sums=loss.sums * torch.nan)
        return loss


def decide(mesh: Mesh, folder: Path) -> dict[str, object]:
    """How three runs end on this rank."""
    found: dict[str, object] = {}
    for event in ("signal", "worse", "nan"):
        task = OddTask(mesh, event)
        trainer = Trainer(
            task=task,
            learner=Learner(
                task.model,
                AdamWConfig(),
                Schedule(lr=1e-2, num_steps=STEPS),
                ema_decay=0.9,
                clip_grad=1.0,
                mesh=mesh,
            ),
            train=toy_training(mesh.batch.rank, mesh.batch.size),
            valid=EvaluationSource(
                # As many on every rank, which the shard axis needs.
                micro_batches=lambda: (toy_batch([index]) for index in range(mesh.batch.rank, 4, mesh.batch.size)),
                totals=toy_totals(np.arange(4)),
            ),
            config=TrainerConfig(num_steps=STEPS, eval_interval=1, save_interval=2),
            mesh=mesh,
            directory=folder / event,
            settings={"model": {}},
            provenance={},
        )
        try:
            found[event] = trainer.run()
        except NonFiniteError as error:
            found[event] = str(error)
    return found


@pytest.mark.parametrize("layout", [{}, {"shard": 2}, {"graph": 2}, {"tensor": 2}], ids=str)
def test_all_ranks_decide_alike(tmp_path: Path, layout: dict[str, int]) -> None:
    first, second = run_ranks(2, decide, tmp_path, layout=layout)
    assert first == second
    assert first["signal"].stopped
    assert 1 <= first["signal"].step < STEPS
    assert sorted(path.name for path in (tmp_path / "signal" / "checkpoints").glob("step_*"))
    assert not first["worse"].stopped
    assert first["worse"].step == STEPS
    assert "the loss of step" in first["nan"]


def test_all_ranks_decide_alike_on_two_axes(tmp_path: Path) -> None:
    results = run_ranks(4, decide, tmp_path, layout={"graph": 2, "tensor": 2})
    assert all(result == results[0] for result in results)


def chosen_backend(mesh: Mesh, backend: Backend, installed: tuple[str, str]) -> str:
    """As if the weights were on GPUs, and each rank on a machine with the one or other library."""

    def imported(name: str) -> type:
        if name != installed[mesh.rank]:
            raise ImportError(f"no {name}")
        return object

    adamw._device_type = lambda parameter: "cuda"
    adamw._import = imported
    try:
        return _common_backend(backend, [torch.nn.Parameter(torch.ones(2))], replace(mesh, device=torch.device("cuda")))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("backend", "installed", "outcome"),
    [
        ("auto", ("te", "te"), "te"),
        ("auto", ("", ""), "torch"),
        (
            "auto",
            ("te", ""),
            r"finds other kernels on other ranks \(te on ranks 0; torch on ranks 1\): install the same",
        ),
        ("apex", ("apex", ""), r"^rank 1: optim.backend is apex, but .*no apex"),
        ("torch", ("te", ""), "torch"),
    ],
)
def test_optimizer_backend(backend: Backend, installed: tuple[str, str], outcome: str) -> None:
    first, second = run_ranks(2, chosen_backend, backend, installed)
    assert first == second
    assert re.search(outcome, first)
