"""Exactness of data-parallel training of MatRIS: every rank count gives the one-process result, fp64, to 1e-10."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from janus.comm.collectives import gather_objects, reduce_sums, sum_gradients
from janus.mesh import Mesh
from janus.training.step import accumulate_gradients, train_step
from matris.config import LossConfig
from matris.evaluation import evaluate_dataset
from matris.setup import Setup, build_setup
from matris.task import MatRISTask
from matris.train_config import TrainConfig
from tests.matris.train.labelled import settings, write_files
from tests.parallel.ranks import run_ranks

TERMS = ("energy", "forces", "stress", "magmoms")
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled")
    write_files(path)
    return path


def fp64(folder: Path, batch_size: int, max_atoms: int | None) -> TrainConfig:
    return settings(
        folder,
        data={"global_batch_size": batch_size, "max_atoms": max_atoms},
        training={"precision": "fp64"},
    )


def single_term(name: str) -> LossConfig:
    weights = {f"{term}_weight": float(term == name) for term in TERMS}
    return LossConfig(**weights)


def predictions(setup: Setup, mesh: Mesh) -> dict[str, dict[str, np.ndarray]]:
    """Energy, forces and stress of every structure of the first step, from whichever rank had it."""
    (batch, *_) = setup.train.batches(0)
    own: dict[str, dict[str, np.ndarray]] = {}
    for micro_batch in batch.micro_batches:
        prediction = setup.model(micro_batch.graph)
        atoms = micro_batch.graph.atoms_per_structure.tolist()
        forces = prediction.forces.split(atoms)
        for index, identifier in enumerate(micro_batch.identifiers):
            own[identifier] = {
                "energy": prediction.energy[index].numpy(),
                "forces": forces[index].numpy(),
                "stress": prediction.stress[index].numpy(),
            }
    return {name: value for part in gather_objects(own, mesh) for name, value in part.items()}


def term_gradients(setup: Setup, mesh: Mesh, term: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weight gradients of one term alone, summed over ranks."""
    task = MatRISTask(setup.model, single_term(term), setup.task.task_names)
    # The head of the magnetic moments, which the other terms freeze, is part of the comparison.
    setup.model.readout.magmom.requires_grad_(True)
    setup.model.predicts_magmoms = True
    (batch, *_) = setup.train.batches(0)
    setup.learner.zero_gradients()
    losses = accumulate_gradients(task, batch.micro_batches, setup.train.totals(batch.indices), setup.learner)
    sum_gradients(setup.learner.parameters.values(), mesh)
    own = torch.stack([loss.total for loss in losses]).sum() if losses else torch.zeros(())
    gradients = {name: value.grad.clone() for name, value in setup.learner.parameters.items()}
    return float(reduce_sums(own, mesh)), gradients


def everything(mesh: Mesh, config: TrainConfig) -> dict[str, Any]:
    """All that must not depend on ranks or micro-batches."""
    setup = build_setup(config, mesh)
    result: dict[str, Any] = {"predictions": predictions(setup, mesh), "gradients": {}, "losses": {}}
    for term in TERMS:
        result["losses"][term], result["gradients"][term] = term_gradients(setup, mesh, term)
    shares = []
    for batch in setup.train.batches(0):
        shares.append(len(batch.micro_batches))
        totals = setup.train.totals(batch.indices)
        report = train_step(setup.task, batch, totals, learner=setup.learner, mesh=mesh)
    result["parameters"] = {name: value.detach().clone() for name, value in setup.learner.parameters.items()}
    result["average"] = setup.learner.ema.average
    result["moments"] = {name: value for name, value in setup.learner.capture().items() if "exp_avg" in name}
    result["sums"] = report.sums
    result["shares"] = shares
    result["report"] = evaluate_dataset(setup.model, setup.datasets.valid, mesh, setup.portions).report
    return result


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Within 1e-10 of each tensor's largest element; where cancellation leaves zero, of the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0.0, what
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-4 * largest)
        difference = float((found[name] - value).abs().max())
        assert difference <= 1e-10 * scale, f"{what} {name}: {difference} of {scale}"


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, dict[str, Any]]:
    """The one-process result without budgets, by global batch size."""
    return {size: everything(Mesh(), fp64(folder, size, None)) for size in (6, 3)}


@pytest.mark.parametrize(
    ("world_size", "batch_size", "max_atoms"),
    [(1, 6, 9), (2, 6, None), (2, 6, 9), (4, 6, 8), (4, 3, None)],
)
def test_ranks_and_micro_batches_change_nothing(
    folder: Path, alone: dict[int, dict[str, Any]], world_size: int, batch_size: int, max_atoms: int | None
) -> None:
    results = run_ranks(world_size, everything, fp64(folder, batch_size, max_atoms))
    expected = alone[batch_size]
    assert expected["shares"] == [1] * STEPS
    shares = np.array([result["shares"] for result in results])
    if batch_size < world_size:
        assert (shares == 0).any(), "some rank has nothing to do"
    elif max_atoms is not None:
        assert shares.max() > 1, "some rank accumulates"
    for result in results:
        assert result["predictions"].keys() == expected["predictions"].keys()
        for identifier, values in expected["predictions"].items():
            for name, value in values.items():
                np.testing.assert_allclose(
                    result["predictions"][identifier][name], value, rtol=1e-10, atol=1e-12, err_msg=name
                )
        for term in TERMS:
            assert result["losses"][term] == pytest.approx(expected["losses"][term], rel=1e-12)
            assert_close(result["gradients"][term], expected["gradients"][term], f"gradient of {term}")
        for what in ("parameters", "average", "moments"):
            assert_close(result[what], expected[what], what)
        np.testing.assert_allclose(result["sums"], expected["sums"], rtol=1e-10)
        for name in ("energy_mae_meV_per_atom", "forces_rmse_meV_per_A", "stress_mae_GPa", "magmoms_mae_muB"):
            assert result["report"][name] == pytest.approx(expected["report"][name], rel=1e-10)
        assert result["report"]["num_labels"] == expected["report"]["num_labels"]
    for name, value in results[0]["parameters"].items():
        assert all(torch.equal(value, other["parameters"][name]) for other in results[1:]), name
