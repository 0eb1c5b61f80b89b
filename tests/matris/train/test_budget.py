"""Micro-batches from the memory of the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from janus.mesh import Mesh
from matris.cost import Counts
from matris.data.dataset import MicroBatch
from matris.memory import step_memory
from matris.run import run_training
from matris.setup import Setup, build_setup
from matris.train_config import DataConfig, TrainConfig
from tests.matris.live_bytes import LiveBytes
from tests.matris.train.labelled import settings, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget")
    write_files(path)
    return path


def config(folder: Path, memory_gb: float | None) -> TrainConfig:
    data = {"budget": "auto", "memory_gb": memory_gb, "global_batch_size": 24, "valid": [], "valid_fraction": 0.0}
    return settings(folder, data=data, training={"recompute": "all", "train_iters": 1, "output": str(folder / "run")})


def micro_batches(setup: Setup) -> list[MicroBatch]:
    return next(iter(setup.train.batches(0))).micro_batches


def predicted(setup: Setup, batch: MicroBatch) -> float:
    graph = batch.graph
    counts = Counts(
        structures=graph.num_structures,
        atoms=graph.num_atoms,
        edges=graph.num_edges,
        undirected=graph.num_undirected,
        angles=graph.num_angles,
    )
    return step_memory(setup.model.hyper, counts, recompute_bytes=0)


def test_micro_batches_use_the_memory_and_no_more(folder: Path) -> None:
    one = build_setup(config(folder, 10.0), Mesh())
    (whole,) = micro_batches(one)
    weights = 5 * sum(value.nbytes for value in one.model.parameters())
    room = predicted(one, whole) / 2.5
    setup = build_setup(config(folder, (room + weights) / 0.9 / 1e9), Mesh())
    parts = micro_batches(setup)
    assert len(parts) == 3
    assert sum(part.graph.num_atoms for part in parts) == whole.graph.num_atoms
    totals = setup.train.totals(setup.sampler.indices(0))
    for part in parts:
        assert predicted(setup, part) <= 1.02 * room
        with LiveBytes() as bytes_:
            setup.task.loss(part, totals, training=True).total.backward(inputs=setup.learner.weights.leaves)
        assert bytes_.peak <= 1.1 * room


def test_the_run_says_what_it_chose(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(replace(config(folder, 2.0), dry_run=True)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batch")]
    assert "at most 1.8 GB by prediction (auto), as of " in line


def test_too_large_structures_are_named_before_the_first_step(folder: Path) -> None:
    setup = build_setup(config(folder, 10.0), Mesh())
    memory = setup.portions.budget.memory
    needed = memory.of_records(setup.datasets.train.sizes)
    weights = 5 * sum(value.nbytes for value in setup.model.parameters())
    room = float(np.sort(needed)[-3:].mean())  # less than the largest needs
    with pytest.raises(ValueError, match="need more memory on their own") as refused:
        build_setup(config(folder, (room + weights) / 0.9 / 1e9), Mesh())
    text = str(refused.value)
    assert setup.datasets.train.identifier(int(needed.argmax())) in text
    assert setup.datasets.train.identifier(int(needed.argmin())) not in text
    assert "parallel.context_parallel_size 3 is enough" in text


def test_refused_settings(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data.budget is auto on CPU.*data.memory_gb"):
        build_setup(config(folder, None), Mesh())
    with pytest.raises(ValueError, match="nothing is left for micro-batches"):
        build_setup(config(folder, 1e-6), Mesh())
    with pytest.raises(ValueError, match=r"data.memory_gb is 2.0, but data.budget is given"):
        DataConfig(memory_gb=2.0)
    with pytest.raises(ValueError, match=r"data.memory_gb is 0.0: it must be positive"):
        DataConfig(memory_gb=0.0, budget="auto")
