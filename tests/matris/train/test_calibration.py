"""Runs whose packing follows measured times: what is measured is kept, so that no clock has a say after a resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk

from janus.checkpoint import read_directory
from janus.data.cost import CostModel
from janus.data.packing import Budget
from janus.telemetry import Stopwatch
from matris import run
from matris.calibration import formula_cost, sample_batches
from matris.cost import Counts, Derivatives, step_flops
from matris.run import run_training
from tests.matris.structures import TINY, batch_of, rattled
from tests.matris.train.labelled import settings, write_files


def test_formula_is_that_of_the_flops() -> None:
    graph = batch_of(rattled(bulk("Cu", cubic=True)), rattled(bulk("Si")), config=TINY)
    counts = Counts(
        structures=graph.num_structures,
        atoms=graph.num_atoms,
        edges=graph.num_edges,
        undirected=graph.num_undirected,
        angles=graph.num_angles,
    )
    sizes = np.array([[graph.num_atoms, graph.num_edges, graph.num_angles]])
    flops = step_flops(TINY, counts, Derivatives()).step
    # Cells by their strain are counted for each structure: 54 numbers twice.
    assert formula_cost(TINY).of_batches(sizes)[0] == pytest.approx(flops, rel=1e-4)


def test_samples_differ_in_size_and_shape_and_keep_the_budget() -> None:
    rng = np.random.default_rng(0)
    atoms = rng.integers(1, 60, 64)
    sizes = np.stack([atoms, atoms * rng.integers(5, 50, 64), atoms * rng.integers(50, 900, 64)], axis=1)
    budget = Budget(limits=(150, None, None), names=("atoms", "edges", "angles"))
    model = CostModel(constant=0.0, weights=(50.0, 10.0, 1.0))
    chosen = sample_batches(sizes, model, num_ranks=2, budget=budget)
    sums = np.array([sizes[positions].sum(axis=0) for positions in chosen])
    assert len(chosen) >= 8
    assert sums[:, 0].max() <= 150
    assert np.linalg.matrix_rank(np.column_stack([np.ones(len(sums)), sums])) == 4
    assert sums[:, 2].max() >= 10 * sums[:, 2].min()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration")
    write_files(path)
    return path


def test_a_resumed_run_keeps_what_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = settings(folder, data={"cost_model": "calibrated", "global_batch_size": 8, "max_atoms": 24})
    output = folder / "first"

    def go_on(where: Path, steps: int) -> str:
        training = replace(
            base.training, output=str(where), train_iters=steps, train_epochs=None, save_interval=2, eval_interval=2
        )
        assert run_training(replace(base, training=training)) == 0
        return capsys.readouterr().out

    def checkpoint(where: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
        return read_directory(where / "checkpoints" / f"step_{step:08d}")

    text = go_on(output, 2)
    (line,) = [line for line in text.splitlines() if line.startswith("cost model")]
    assert "us per angle" in line
    assert "relative error of" in line
    batches = checkpoint(output, 2)[1]["batches"]
    assert batches["budget"] is None
    measured = batches["cost"]
    assert measured["constant"] >= 0.0
    assert sum(measured["weights"]) > 0.0

    ends = []
    for name, seconds in (("again", 1.0), ("slower", 1e6)):
        shutil.copytree(output, folder / name)
        monkeypatch.setattr(Stopwatch, "seconds", lambda self, seconds=seconds: seconds * np.random.rand())
        monkeypatch.setattr(run, "calibrate", None)
        assert "cost model" not in go_on(folder / name, 4)
        tensors, state = checkpoint(folder / name, 4)
        assert state["batches"] == batches
        ends.append(tensors)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_formula_is_not_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "calibrate", None)
    base = settings(folder, training={"train_iters": 1, "output": str(folder / "formula")})
    assert run_training(base) == 0
    assert "cost model" not in capsys.readouterr().out
    assert read_directory(folder / "formula" / "checkpoints" / "step_00000001")[1]["batches"] is None
