"""Collectives and the training step of the framework on 1, 2 and 4 ranks, with a toy model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from janus.comm.collectives import (
    ElsewhereError,
    broadcast_object,
    broadcast_tensors,
    gather_numbers,
    gather_objects,
    on_main_rank,
    reduce_max,
    reduce_sums,
    sum_gradients,
)
from janus.mesh import Mesh, open_mesh
from janus.optim import AdamWConfig, Schedule
from janus.training.evaluation import evaluate
from janus.training.learner import Learner
from janus.training.step import NonFiniteError, train_step
from tests.janus.toy import ToyTask, toy_step, toy_totals, toy_validation
from tests.parallel.logical import logical_state
from tests.parallel.ranks import run_ranks

STEPS = 3


def make_learner(task: ToyTask, mesh: Mesh) -> Learner:
    schedule = Schedule(lr=1e-2, num_steps=STEPS)
    return Learner(task.model, AdamWConfig(), schedule, ema_decay=0.9, clip_grad=0.05, mesh=mesh)


def train(mesh: Mesh, size: int, pieces: int) -> dict[str, Any]:
    """Three steps; everything that must not depend on the number of ranks, and the traffic of the last step."""
    task = ToyTask()
    learner = make_learner(task, mesh)
    reports = []
    for step in range(STEPS):
        mesh.ledger.clear()
        batch = toy_step(step, mesh.batch.rank, mesh.batch.size, size, pieces)
        report = train_step(task, batch, toy_totals(batch.indices), learner=learner, mesh=mesh, stop=mesh.rank == 1)
        reports.append((report.sums, report.grad_norm, report.num_edges))
    traffic = dict(mesh.ledger.calls), dict(mesh.ledger.bytes)
    validation = evaluate(task, toy_validation(mesh.batch.rank, mesh.batch.size), mesh, step=0)
    gradients = {name: value.grad for name, value in learner.parameters.items()}
    return {
        "tensors": {**logical_state(learner), **{f"gradient/{name}": value for name, value in gradients.items()}},
        "reports": reports,
        "stop": report.stop,
        "traffic": traffic,
        "validation": validation,
    }


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("size", "pieces"), [(6, 2), (3, 1)])
def test_training_does_not_depend_on_ranks(world_size: int, size: int, pieces: int) -> None:
    """Three records on four ranks leave one rank without a micro-batch."""
    alone = train(Mesh(), size, 1)
    results = run_ranks(world_size, train, size, pieces)
    for result in results:
        for name, value in alone["tensors"].items():
            torch.testing.assert_close(result["tensors"][name], value, rtol=1e-10, atol=1e-13, msg=name)
        for (sums, norm, edges), (sums_alone, norm_alone, edges_alone) in zip(
            result["reports"], alone["reports"], strict=True
        ):
            np.testing.assert_allclose(sums, sums_alone, rtol=1e-12)
            assert norm == pytest.approx(norm_alone, rel=1e-12)
            assert edges == edges_alone == 3 * size
        np.testing.assert_allclose(result["validation"], alone["validation"], rtol=1e-12)
        assert result["stop"]
        assert not alone["stop"]
    for name, value in results[0]["tensors"].items():
        assert all(torch.equal(value, other["tensors"][name]) for other in results[1:]), name


def test_traffic_of_a_step_is_one_all_reduce_of_gradients_and_one_of_sums() -> None:
    calls, num_bytes = run_ranks(2, train, 6, 2)[0]["traffic"]
    num_weights = sum(parameter.numel() for parameter in ToyTask().model.parameters())
    assert calls == {"replicas/all_reduce": 2}
    assert num_bytes == {"replicas/all_reduce": 8 * num_weights + 8 * (ToyTask.num_sums + 3)}
    assert train(Mesh(), 6, 2)["traffic"] == ({}, {})


def use_collectives(mesh: Mesh) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 5, 7)]
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    parameters.append(torch.nn.Parameter(torch.zeros(4), requires_grad=False))
    for index, parameter in enumerate(parameters[:4]):
        if index != mesh.rank:  # every rank misses another one
            parameter.grad = torch.full_like(parameter, 10.0**mesh.rank)
    sum_gradients(parameters, mesh.replicas, bucket_bytes=40)
    weights = [torch.full((2, 3), float(mesh.rank)), torch.full((3, 2), float(mesh.rank)).t()]
    broadcast_tensors(weights, mesh.replicas)

    def fail() -> None:
        assert mesh.is_main
        raise OSError("disk full")

    try:
        on_main_rank(fail, mesh)
        message = ""
    except (OSError, ElsewhereError) as error:
        message = str(error)
    return {
        "gradients": [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters],
        "calls": dict(mesh.ledger.calls),
        "bytes": dict(mesh.ledger.bytes),
        "sums": reduce_sums(torch.tensor([1.0, 1e-17 * mesh.rank]), mesh).tolist(),
        "object": broadcast_object({"rank": mesh.rank}, mesh),
        "gathered": gather_objects(mesh.rank, mesh),
        "numbers": gather_numbers([0.5, mesh.rank], mesh).tolist(),
        "max": (reduce_max(float(mesh.rank), mesh), reduce_max(float("nan") if mesh.rank else 9.0, mesh)),
        "main": on_main_rank(lambda: mesh.rank, mesh),
        "weights": [float(value.abs().max()) for value in weights],
        "message": message,
    }


def test_collectives() -> None:
    results = run_ranks(2, use_collectives)
    for result in results:
        assert result["gradients"] == [[10.0] * 3, [1.0] * 5, [11.0] * 7, [11.0] * 2, None]
        # Buckets of at most 40 bytes: 3 + 5 floats, 7 floats, 2 doubles; then two broadcasts, one of an object.
        assert result["calls"] == {"replicas/all_reduce": 3, "replicas/broadcast": 2, "world/broadcast_object": 1}
        assert result["bytes"] == {
            "replicas/all_reduce": 32 + 28 + 16,
            "replicas/broadcast": 48,
            "world/broadcast_object": 0,
        }
        assert result["sums"] == pytest.approx([2.0, 1e-17])
        assert result["object"] == {"rank": 0}
        assert result["gathered"] == [0, 1]
        assert result["numbers"] == [[0.5, 0.0], [0.5, 1.0]]
        assert result["main"] == 0
        assert result["max"][0] == 1.0
        assert math.isnan(result["max"][1])
        assert result["weights"] == [0.0, 0.0]
    assert [result["message"] for result in results] == ["disk full", "rank 0 failed"]


def meet_bad_record(mesh: Mesh) -> tuple[str, bool]:
    task = ToyTask()
    learner = make_learner(task, mesh)
    before = logical_state(learner)
    batch = toy_step(0, mesh.batch.rank, mesh.batch.size, bad=int(toy_step(0).indices[3]))
    try:
        train_step(task, batch, toy_totals(batch.indices), learner=learner, mesh=mesh)
    except NonFiniteError as error:
        after = logical_state(learner)
        return str(error), all(torch.equal(value, after[name]) for name, value in before.items())
    raise AssertionError("a loss that is not a number went unnoticed")


def test_non_finite_loss_stops_all_ranks_and_names_the_records() -> None:
    indices = toy_step(0).indices
    for message, untouched in run_ranks(2, meet_bad_record):
        assert untouched
        assert f"record-{indices[3]}" in message
        # Only the micro-batch with the bad record is named: rank 1 has records 1, 3, 5 in pieces of 2 and 1.
        assert f"record-{indices[0]}," not in message
        assert "step 1" in message


def adopt_parallel_state(mesh: Mesh) -> dict[str, Any]:
    """Inside of a mesh another one adopts what exists; other sizes are refused."""
    with open_mesh("cpu") as second:
        same = (second.rank, second.batch.size, second.batch.rank) == (mesh.rank, mesh.batch.size, mesh.batch.rank)
    alive = gather_objects(mesh.rank, mesh)
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    try:
        with open_mesh("cpu"):
            message = ""
    except ValueError as error:
        message = str(error)
    return {"same": same, "alive": alive, "message": message}


def test_existing_groups_are_adopted_and_checked() -> None:
    for result in run_ranks(2, adopt_parallel_state):
        assert result["same"]
        assert result["alive"] == [0, 1]
        assert "'tensor': 2" in result["message"]
