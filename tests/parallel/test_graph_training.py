"""Whole runs with the atoms of each micro-batch shared over ranks, fp64: the files that one process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from janus.mesh import Mesh
from janus.training.step import accumulate_gradients
from matris.config import LossConfig
from matris.evaluation import evaluate_dataset
from matris.graph.batch import LabelTotals
from matris.run import run_training
from matris.setup import build_setup
from matris.train_config import ParallelConfig, TrainConfig
from tests.matris.train.labelled import TINY, settings, write_files
from tests.parallel.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled")
    write_files(path)
    return path


def config_of(folder: Path, name: str, parallel: ParallelConfig, *, batch_size: int = 6, **others: Any) -> TrainConfig:
    return settings(
        folder,
        data={"max_atoms": 20, "test": [str(folder / "test.xyz")], "global_batch_size": batch_size},
        training={"precision": "fp64", "output": str(folder / name)},
        parallel=parallel,
        **others,
    )


def train(mesh: Mesh, config: TrainConfig) -> int:
    """The run opens the same mesh again."""
    return run_training(config)


def assert_same_run(found: Path, expected: Path) -> None:
    weights, wanted = (load_file(path / "last" / "model.safetensors") for path in (found, expected))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-12, msg=name)
    report, known = (json.loads((path / "metrics.json").read_text()) for path in (found, expected))
    for part in ("valid", "test"):
        assert report[part]["num_labels"] == known[part]["num_labels"]
        for name, value in known[part].items():
            if isinstance(value, float):
                assert report[part][name] == pytest.approx(value, rel=1e-9), name
    rows, known_rows = (np.genfromtxt(path / "log.csv", delimiter=",", names=True) for path in (found, expected))
    for name in known_rows.dtype.names:
        if "loss" in name or name in ("grad_norm", "step"):
            np.testing.assert_allclose(rows[name], known_rows[name], rtol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, Path]:
    """Runs of one process, by global batch size."""
    for batch_size in (6, 3):
        assert run_training(config_of(folder, f"alone_{batch_size}", ParallelConfig(), batch_size=batch_size)) == 0
    return {batch_size: folder / f"alone_{batch_size}" for batch_size in (6, 3)}


@pytest.mark.parametrize(
    ("world_size", "shard", "graph", "partitioner", "batch_size"),
    [
        (2, 1, 2, "morton", 6),
        (4, 1, 4, "balanced", 6),
        (4, 2, 2, "morton", 6),
        (4, 4, 1, "morton", 3),  # some rank has no structure, and runs along
    ],
)
def test_training_over_the_graph_axis(
    folder: Path,
    alone: dict[int, Path],
    world_size: int,
    shard: int,
    graph: int,
    partitioner: Literal["morton", "index", "balanced"],
    batch_size: int,
) -> None:
    name = f"{world_size}_{shard}_{graph}"
    parallel = ParallelConfig(fully_sharded_size=shard, context_parallel_size=graph, graph_partitioner=partitioner)
    config = config_of(folder, name, parallel, batch_size=batch_size)
    assert run_ranks(world_size, train, config, layout={"graph": graph, "shard": shard}) == [0] * world_size
    assert_same_run(folder / name, alone[batch_size])


def test_fine_tuning_over_the_graph_axis(folder: Path, alone: dict[int, Path]) -> None:
    base = str(alone[6] / "last")
    loss = LossConfig(magmoms_weight=0.5)
    tune = {"init_from": base, "model": TINY, "loss": loss}
    assert run_training(config_of(folder, "tuned", ParallelConfig(), **tune)) == 0
    config = config_of(folder, "tuned_2", ParallelConfig(context_parallel_size=2), **tune)
    assert run_ranks(2, train, config, layout={"graph": 2}) == [0, 0]
    assert_same_run(folder / "tuned_2", folder / "tuned")


def evaluated(mesh: Mesh, config: TrainConfig) -> dict[str, np.ndarray]:
    setup = build_setup(config, mesh)
    evaluation = evaluate_dataset(setup.model, setup.datasets.train, mesh, setup.portions)
    return {name: points[np.lexsort(points.round(8).T[::-1])] for name, points in evaluation.points.items()}


def test_every_parity_point_once(folder: Path) -> None:
    expected = evaluated(Mesh(), config_of(folder, "unused", ParallelConfig()))
    assert all(len(points) for points in expected.values())
    for layout in ({"graph": 2}, {"graph": 2, "tensor": 2}, {"tensor": 2}):
        config = config_of(
            folder,
            "unused",
            ParallelConfig(
                context_parallel_size=layout.get("graph", 1), tensor_model_parallel_size=layout.get("tensor", 1)
            ),
        )
        for found in run_ranks(int(np.prod(list(layout.values()))), evaluated, config, layout=layout):
            for name, points in expected.items():
                np.testing.assert_allclose(found[name], points, rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_micro_batch_without_structures_adds_nothing(folder: Path) -> None:
    setup = build_setup(config_of(folder, "unused", ParallelConfig()), Mesh())
    loader = setup.train.batches(0)
    empty = loader.collate([])
    (batch, *_) = loader
    totals = setup.train.totals(batch.indices)
    assert isinstance(totals, LabelTotals)
    for training in (True, False):
        loss = setup.task.loss(empty, totals, training=training)
        assert float(loss.total.detach()) == 0.0
        assert not loss.sums.any()
        assert loss.num_edges == 0

    def gradients(micro_batches: list[Any]) -> dict[str, torch.Tensor]:
        setup.learner.zero_gradients()
        accumulate_gradients(setup.task, micro_batches, totals, setup.learner)
        setup.learner.sum_gradients()
        return {name: value.clone() for name, value in setup.learner.gather_gradients().items()}

    with_it, without = gradients([*batch.micro_batches, empty]), gradients(batch.micro_batches)
    for name, value in without.items():
        assert torch.equal(with_it[name], value), name
