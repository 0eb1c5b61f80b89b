"""`train` over tensor and shard axes: the exported model and the checkpoints are those of one process, fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from janus.checkpoint import read_directory
from janus.mesh import Mesh
from janus.training.step import train_step
from matris.exported import read_config
from matris.run import run_training
from matris.setup import build_setup
from matris.train_config import ParallelConfig, TrainConfig
from tests.matris.train.labelled import settings, write_files
from tests.parallel.ranks import run_ranks

STEPS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def folder(files: Path) -> Path:
    """With a run of one process."""
    assert train(Mesh(), config(files, "alone")) == 0
    return files


def config(
    folder: Path, name: str, *, steps: int = STEPS, parallel: dict[str, Any] | None = None, **others: Any
) -> Any:
    return settings(
        folder,
        data={"max_atoms": 20},
        training={
            "precision": "fp64",
            "output": str(folder / name),
            "train_iters": steps,
            "eval_interval": 2,
            "save_interval": 2,
        },
        parallel=ParallelConfig(**(parallel or {})),
        **others,
    )


def train(mesh: Mesh, run: TrainConfig) -> int:
    """The run's own mesh adopts the groups of this one."""
    return run_training(run)


def assert_same_model(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert read_config(found)["parameters"] == read_config(expected)["parameters"]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"fully_sharded_size": 2, "sharding_policy": "keep"}),
        (4, {"fully_sharded_size": 2, "tensor_model_parallel_size": 2}),
    ],
    ids=["tensor", "keep", "regather and tensor"],
)
def test_exported_model_and_checkpoint(folder: Path, world_size: int, layout: dict[str, Any]) -> None:
    name = "_".join(map(str, layout.values()))
    sizes = {"tensor": layout.get("tensor_model_parallel_size", 1), "shard": layout.get("fully_sharded_size", 1)}
    half = config(folder, name, steps=STEPS // 2, parallel=layout)
    assert run_ranks(world_size, train, half, layout=sizes) == [0] * world_size
    # The second half alone, then the same from the checkpoint of half the run by one process.
    whole = config(folder, name, parallel=layout)
    other = replace(
        whole, training=replace(whole.training, output=str(folder / f"{name}_alone")), parallel=ParallelConfig()
    )
    checkpoint = folder / name / "checkpoints" / f"step_{STEPS // 2:08d}"
    assert train(Mesh(), replace(other, training=replace(other.training, resume=str(checkpoint)))) == 0
    assert run_ranks(world_size, train, whole, layout=sizes) == [0] * world_size
    for run in (name, f"{name}_alone"):
        assert_same_model(folder / run / "last", folder / "alone" / "last")
        ours, _ = read_directory(folder / run / "checkpoints" / f"step_{STEPS:08d}")
        theirs, _ = read_directory(folder / "alone" / "checkpoints" / f"step_{STEPS:08d}")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_fine_tuning_takes_its_parts_of_the_base(folder: Path) -> None:
    base = str(folder / "alone" / "last")
    assert train(Mesh(), config(folder, "tuned_alone", init_from=base)) == 0
    layout = {"fully_sharded_size": 2, "tensor_model_parallel_size": 2}
    run = config(folder, "tuned", parallel=layout, init_from=base)
    assert run_ranks(4, train, run, layout={"shard": 2, "tensor": 2}) == [0] * 4
    assert_same_model(folder / "tuned" / "last", folder / "tuned_alone" / "last")


def traffic(mesh: Mesh, run: TrainConfig) -> dict[str, Any]:
    """Of the last step, in which the next units are gathered ahead."""
    setup = build_setup(run, mesh)
    learner, passes = setup.learner, setup.learner.weights.passes
    assert passes is not None
    for batch in setup.train.batches(0):
        mesh.ledger.clear()
        train_step(setup.task, batch, setup.train.totals(batch.indices), learner=learner, mesh=mesh)
    return {
        "units": [unit.axis.size * unit.shard.nbytes for unit in passes.units],
        "pieces": len(batch.micro_batches),
        "calls": dict(mesh.ledger.calls),
        "bytes": dict(mesh.ledger.bytes),
        "wire": dict(mesh.ledger.wire_bytes),
    }


def test_traffic_of_a_step(files: Path) -> None:
    run = config(files, "traffic", parallel={"fully_sharded_size": 4})
    for found in run_ranks(4, traffic, run, layout={"shard": 4}):
        units, pieces = found["units"], found["pieces"]
        # The forces do not depend on the embedding of the elements, so their pass does not gather it.
        gathered = 3 * sum(units) - units[0]
        assert found["calls"]["shard/all_gather"] == pieces * (3 * len(units) - 1)
        assert found["bytes"]["shard/all_gather"] == pieces * gathered // 4
        assert found["wire"]["shard/all_gather"] == pieces * gathered * 3 // 4
        assert found["calls"]["shard/reduce_scatter"] == pieces * len(units)
        assert found["bytes"]["shard/reduce_scatter"] == pieces * sum(units)
        assert found["wire"]["shard/reduce_scatter"] == pieces * sum(units) * 3 // 4
