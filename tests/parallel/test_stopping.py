"""Runs of the model over several axes: a stop signal to one rank, and layouts that are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from janus.comm.collectives import gather_objects
from janus.mesh import Mesh
from janus.training import trainer
from janus.training.step import StepReport
from matris.run import STOPPED, run_training
from matris.train_config import ParallelConfig, TrainConfig
from tests.matris.train.labelled import settings, write_files
from tests.parallel.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled")
    write_files(path)
    return path


def config_of(folder: Path, name: str, layout: dict[str, int]) -> TrainConfig:
    return settings(
        folder,
        training={"precision": "fp64", "output": str(folder / name), "train_iters": 5, "eval_interval": 2},
        parallel=ParallelConfig(
            fully_sharded_size=layout.get("shard", 1),
            context_parallel_size=layout.get("graph", 1),
            tensor_model_parallel_size=layout.get("tensor", 1),
        ),
    )


def run_with_a_signal(mesh: Mesh, config: TrainConfig, signalled: int) -> tuple[int, list[int], int]:
    """Status of a run in which one rank alone gets a stop signal in its second step, the steps that it did, and the
    status of the run that continues it."""
    original, steps = trainer.train_step, []

    def step(*arguments: Any, **options: Any) -> StepReport:
        steps.append(arguments[1].step)
        if len(steps) == 2 and mesh.rank == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **options)

    trainer.train_step = step
    stopped = run_training(config)
    trainer.train_step = original
    gather_objects(None, mesh)
    return stopped, steps, run_training(config)


@pytest.mark.parametrize(
    ("layout", "signalled"),
    [({"graph": 2, "tensor": 2}, 3), ({"shard": 2, "graph": 2}, 0)],
    ids=["graph-tensor", "shard-graph"],
)
def test_all_ranks_stop_after_the_same_step(folder: Path, layout: dict[str, int], signalled: int) -> None:
    """A signal that reaches one rank of a group alone; the run then continues to the weights of one process."""
    if not (folder / "alone").exists():
        assert run_training(config_of(folder, "alone", {})) == 0
    name = f"{'-'.join(layout)}-{signalled}"
    found = run_ranks(4, run_with_a_signal, config_of(folder, name, layout), signalled, layout=layout)
    assert found == [(STOPPED, [0, 1, 2], 0)] * 4
    for part in ("best", "last"):
        weights = load_file(folder / name / part / "model.safetensors")
        for key, value in load_file(folder / "alone" / part / "model.safetensors").items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(sharding_policy="keep"), "parallel.sharding_policy is keep, but parallel.fully_sharded_size"),
        (ParallelConfig(graph_partitioner="index"), "parallel.graph_partitioner is index, but parallel.context"),
        (ParallelConfig(tensor_model_parallel_size=2), "1 ranks do not divide into shard 1 x graph 1 x tensor 2"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(folder: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(settings(folder, parallel=parallel))
    assert not (folder / "run").exists()
