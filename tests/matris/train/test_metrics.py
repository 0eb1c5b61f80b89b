"""Errors against a direct calculation, with missing labels and two tasks; pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from matris.graph.batch import collate_graphs, collate_labels
from matris.graph.build import build_graph
from matris.graph.structure import Labels, Structure
from matris.metrics import METRIC_NAMES, error_sums, metrics, metrics_line, metrics_report
from matris.model import Prediction
from matris.plots import plot_learning_curves, plot_parity

RNG = np.random.default_rng(0)
ATOMS = (2, 3, 1)
CELL = 4.0 * np.eye(3)


def symmetric() -> np.ndarray:
    tensor = RNG.normal(size=(3, 3))
    return tensor + tensor.T


LABELS = (
    Labels(energy=1.0, forces=RNG.normal(size=(2, 3)), stress=symmetric(), magmoms=RNG.normal(size=2)),
    Labels(energy=-2.0, stress=symmetric()),
    Labels(forces=RNG.normal(size=(1, 3))),
)


def make() -> tuple[Prediction, np.ndarray]:
    structures = [
        Structure(numbers=np.full(n, 29), positions=RNG.normal(size=(n, 3)), cell=CELL, pbc=np.ones(3, bool))
        for n in ATOMS
    ]
    graphs = [build_graph(structure, pairwise_cutoff=3.0, three_body_cutoff=2.0) for structure in structures]
    batch = collate_graphs(graphs)
    labels = collate_labels(LABELS, ATOMS)
    prediction = Prediction(
        energies=torch.zeros(6, dtype=torch.float64),
        interaction_energy=torch.from_numpy(RNG.normal(size=3)),
        reference_energy=torch.from_numpy(RNG.normal(size=3)),
        forces=torch.from_numpy(RNG.normal(size=(6, 3))),
        stress=torch.from_numpy(np.stack([symmetric(), symmetric(), np.full((3, 3), np.nan)])),
        magmoms=torch.from_numpy(RNG.normal(size=6)).abs(),
    )
    return prediction, error_sums(prediction, labels, batch, torch.tensor([1, 0, 1]), 2).numpy()


def test_errors_are_those_of_a_direct_calculation() -> None:
    prediction, sums = make()
    overall = metrics(sums.sum(axis=0))
    assert tuple(overall) == METRIC_NAMES
    energy = np.array([(prediction.energy[i].item() - LABELS[i].energy) / ATOMS[i] for i in (0, 1)])
    assert overall["energy_mae_meV_per_atom"] == pytest.approx(1000 * np.abs(energy).mean())
    assert overall["energy_rmse_meV_per_atom"] == pytest.approx(1000 * np.sqrt((energy**2).mean()))
    forces = np.concatenate(
        [prediction.forces[:2].numpy() - LABELS[0].forces, prediction.forces[5:].numpy() - LABELS[2].forces]
    )
    assert overall["forces_mae_meV_per_A"] == pytest.approx(1000 * np.abs(forces).mean())
    assert overall["forces_rmse_meV_per_A"] == pytest.approx(1000 * np.sqrt((forces**2).mean()))
    rows, columns = np.array([0, 1, 2, 1, 0, 0]), np.array([0, 1, 2, 2, 2, 1])
    stress = np.stack([(prediction.stress[i].numpy() - LABELS[i].stress)[rows, columns] for i in (0, 1)])
    assert overall["stress_mae_meV_per_A3"] == pytest.approx(1000 * np.abs(stress).mean())
    assert overall["stress_rmse_GPa"] == pytest.approx(160.21766208 * np.sqrt((stress**2).mean()))
    magmoms = prediction.magmoms[:2].numpy() - np.abs(LABELS[0].magmoms)
    assert overall["magmoms_mae_muB"] == pytest.approx(np.abs(magmoms).mean())


def test_report_by_task() -> None:
    _, sums = make()
    report = metrics_report(sums, ["pbe", "scan"])
    assert report["num_labels"] == {"energy": 2, "forces": 9, "stress": 12, "magmoms": 2}
    tasks = report["tasks"]
    assert isinstance(tasks, dict)
    assert tasks["pbe"]["num_labels"] == {"energy": 1, "forces": 0, "stress": 6, "magmoms": 0}
    assert "forces_mae_meV_per_A" not in tasks["pbe"]
    assert tasks["scan"]["forces_mae_meV_per_A"] == report["forces_mae_meV_per_A"]
    line = metrics_line(metrics(sums[0]))
    assert "meV/atom" in line
    assert "meV/A " not in line
    assert math.isnan(metrics(sums[0])["forces_mae_meV_per_A"])


def test_pictures(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss,energy_mae_meV_per_atom,valid_loss\n0,,,2.0\n1,3.0,5.0,\n2,2.5,4.0,1.5\n")
    plot_learning_curves(log, tmp_path / "curves.png")
    points = {name: RNG.normal(size=(50, 2)) for name in ("energy", "forces", "stress")}
    _, sums = make()
    plot_parity({**points, "magmoms": np.empty((0, 2))}, metrics(sums.sum(axis=0)), tmp_path / "parity.png")
    for name in ("curves.png", "parity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
