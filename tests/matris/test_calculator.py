"""The ASE calculator."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

from matris.calculator import MatRISCalculator
from matris.model import MatRIS

PROPERTIES = ("energy", "free_energy", "energies", "forces", "stress", "magmoms")


@pytest.fixture
def calculator(tiny_model: MatRIS) -> MatRISCalculator:
    return MatRISCalculator(tiny_model, dtype="float64")


@pytest.fixture
def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=3)
    atoms.set_cell(atoms.cell @ np.array([[1.0, 0.02, 0.0], [0.0, 0.99, 0.03], [0.0, 0.0, 1.01]]), scale_atoms=True)
    return atoms


def results(atoms: Atoms) -> dict[str, np.ndarray]:
    return {name: np.asarray(atoms.calc.get_property(name, atoms)) for name in PROPERTIES}


def test_results(calculator: MatRISCalculator, copper: Atoms) -> None:
    before = pickle.dumps(copper)
    found = copper.copy()
    found.calc = calculator
    values = results(found)
    assert {name: value.shape for name, value in values.items()} == {
        "energy": (),
        "free_energy": (),
        "energies": (4,),
        "forces": (4, 3),
        "stress": (6,),
        "magmoms": (4,),
    }
    assert all(value.dtype == np.float64 and np.isfinite(value).all() for value in values.values())
    assert values["energy"] == values["free_energy"] == pytest.approx(values["energies"].sum(), abs=1e-12)
    assert values["energies"] == pytest.approx(-3.5, abs=1.0)  # reference energies are in
    assert (values["magmoms"] >= 0).all()
    found.calc = None
    assert pickle.dumps(found.copy()) == before, "the structure was edited"


def test_derivatives(calculator: MatRISCalculator, copper: Atoms) -> None:
    copper.calc = calculator
    assert copper.get_forces() == pytest.approx(calculate_numerical_forces(copper, eps=1e-4), abs=1e-7)
    assert copper.get_stress() == pytest.approx(calculate_numerical_stress(copper, eps=1e-5), abs=1e-8)


def test_voigt_order(calculator: MatRISCalculator, copper: Atoms) -> None:
    copper.calc = calculator
    xx, yy, zz, yz, xz, xy = copper.get_stress()
    assert copper.get_stress(voigt=False) == pytest.approx(np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]))


def test_stress_of_a_slab(calculator: MatRISCalculator, copper: Atoms) -> None:
    copper.pbc = (True, True, False)
    copper.center(vacuum=5.0, axis=2)
    copper.calc = calculator
    assert copper.get_stress() == pytest.approx(calculate_numerical_stress(copper, eps=1e-5), abs=1e-8)
    assert np.abs(copper.get_stress()).max() > 1e-6


@pytest.mark.parametrize("change", [{"pbc": False}, {"pbc": (True, True, False), "cell": [4.0, 4.0, 0.0]}])
def test_no_stress_without_a_period_or_a_volume(
    calculator: MatRISCalculator, copper: Atoms, change: dict[str, Any]
) -> None:
    if "cell" in change:
        copper.set_cell(change["cell"])
    copper.pbc = change["pbc"]
    copper.calc = calculator
    assert np.isfinite(copper.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError, match="periodic"):
        copper.get_stress()


def test_molecule_and_single_atom(calculator: MatRISCalculator) -> None:
    water, atom = molecule("H2O"), Atoms("Cu")
    water.calc = atom.calc = calculator
    assert np.isfinite(water.get_forces()).all()
    assert atom.get_forces() == pytest.approx(0.0)


def test_one_evaluation_for_all_properties(
    calculator: MatRISCalculator, copper: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = calculator.model.forward
    monkeypatch.setattr(calculator.model, "forward", lambda *args, **named: calls.append(1) or forward(*args, **named))
    copper.calc = calculator
    results(copper)
    copper.set_initial_magnetic_moments([1.0] * 4)  # the model does not read them
    results(copper)
    assert len(calls) == 1
    copper.positions[0, 0] += 0.01
    results(copper)
    assert len(calls) == 2


def test_directory_and_model_agree(tiny_model_directory: Path, tiny_model: MatRIS, copper: Atoms) -> None:
    copper.calc = MatRISCalculator(str(tiny_model_directory), dtype="float64")
    exact = results(copper)
    copper.calc = MatRISCalculator(tiny_model)
    assert copper.calc.model.energy_scale.dtype == tiny_model.energy_scale.dtype
    for name, value in results(copper).items():
        assert value == pytest.approx(exact[name], rel=1e-4, abs=1e-5), name


def test_model_is_copied(tiny_model: MatRIS, copper: Atoms) -> None:
    copper.calc = MatRISCalculator(tiny_model, dtype="float64")
    weight = next(copper.calc.model.parameters())
    assert weight.data_ptr() != next(tiny_model.parameters()).data_ptr()


@pytest.mark.parametrize("from_directory", [True, False])
def test_pickle(
    tiny_model_directory: Path, tiny_model: MatRIS, copper: Atoms, tmp_path: Path, from_directory: bool
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_directory, directory)
    copper.calc = MatRISCalculator(directory if from_directory else tiny_model, dtype="float64")
    expected = results(copper)
    data = pickle.dumps(copper.calc)
    shutil.rmtree(directory)
    copper.calc = pickle.loads(data)
    copper.calc.reset()
    for name, value in results(copper).items():
        assert np.array_equal(value, expected[name]), name


def test_bad_input(calculator: MatRISCalculator, tiny_model: MatRIS, copper: Atoms, tmp_path: Path) -> None:
    copper.calc = calculator
    copper.positions[2, 1] = np.nan
    with pytest.raises(ValueError, match="position of atom 2"):
        copper.get_potential_energy()
    heavy = Atoms("Cm")
    heavy.calc = calculator
    with pytest.raises(ValueError, match="not trained on Cm"):
        heavy.get_potential_energy()
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        MatRISCalculator(tiny_model, dtype="float16")
    with pytest.raises(ValueError, match="device is 'tpu9'"):
        MatRISCalculator(tiny_model, device="tpu9")
    with pytest.raises(ValueError, match="CUDA devices"):
        MatRISCalculator(tiny_model, device="cuda:99")
    with pytest.raises(ValueError, match="task is 'r2scan'"):
        MatRISCalculator(tiny_model, task="r2scan")
    with pytest.raises(ValueError, match="not a model directory"):
        MatRISCalculator(tmp_path)


def test_untrained_magnetic_moments_are_not_reported(tiny_model: MatRIS, copper: Atoms) -> None:
    model = copy.deepcopy(tiny_model)
    model.predicts_magmoms = False
    copper.calc = MatRISCalculator(model)
    assert np.isfinite(copper.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        copper.get_magnetic_moments()


def test_unseen_elements_are_refused(tiny_model: MatRIS, copper: Atoms) -> None:
    model = copy.deepcopy(tiny_model)
    model.elements = (1, 8)
    copper.calc = MatRISCalculator(model)
    with pytest.raises(ValueError, match="not trained on Cu: it knows H, O"):
        copper.get_potential_energy()
