import math

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms

from matris.data.labels import LabelKeys, StressUnit, read_charge_and_spin, read_labels
from tests.matris.data.frames_of import copper, full_tensor, unlabelled


def test_order_of_keys():
    """REF_ names, then plain names, then the calculator's results."""
    atoms = copper()
    assert read_labels(atoms, LabelKeys()).sources["energy"] == "calc['energy']"
    atoms.info["energy"] = 2.0
    assert read_labels(atoms, LabelKeys()).labels.energy == 2.0
    atoms.info["REF_energy"] = 1
    found = read_labels(atoms, LabelKeys())
    assert found.labels.energy == 1.0
    assert found.sources["energy"] == "info['REF_energy']"


@pytest.mark.parametrize("label", ["forces", "magmoms"])
def test_order_of_keys_per_atom(label):
    atoms = copper()
    shape = (4, 3) if label == "forces" else (4,)
    atoms.calc.results[label] = np.full(shape, 1.0)
    assert getattr(read_labels(atoms, LabelKeys()).labels, label).mean() == 1.0
    atoms.arrays[label] = np.full(shape, 2.0)
    assert getattr(read_labels(atoms, LabelKeys()).labels, label).mean() == 2.0
    atoms.arrays[f"REF_{label}"] = np.full(shape, 3.0)
    assert getattr(read_labels(atoms, LabelKeys()).labels, label).mean() == 3.0


def test_an_explicit_key_is_the_only_one():
    atoms = copper()
    atoms.info["dft"] = 5.0
    assert read_labels(atoms, LabelKeys(energy="dft")).labels.energy == 5.0
    assert read_labels(atoms, LabelKeys(energy="other")).labels.energy is None


def test_an_explicit_key_that_ase_moved_to_the_calculator():
    atoms = copper()
    found = read_labels(atoms, LabelKeys(energy="energy", forces="forces"))
    assert found.labels.energy == atoms.calc.results["energy"]
    np.testing.assert_array_equal(found.labels.forces, atoms.calc.results["forces"])


def test_constraints_do_not_zero_forces():
    atoms = copper()
    atoms.set_constraint(FixAtoms([0, 1]))
    assert (atoms.get_forces()[:2] == 0.0).all()
    np.testing.assert_array_equal(read_labels(atoms, LabelKeys()).labels.forces, atoms.calc.results["forces"])


@pytest.mark.parametrize("form", ["voigt", "nine", "full"])
@pytest.mark.parametrize("key", ["REF_stress", "stress", "REF_virials", "REF_virial", "virials", "virial"])
def test_stress_and_virials_in_every_form(key, form):
    voigt = np.array([0.1, -0.2, 0.3, 0.04, -0.05, 0.06])
    tensor = full_tensor(voigt)
    atoms = unlabelled()
    given = -voigt * atoms.get_volume() if "virial" in key else voigt
    atoms.info[key] = {"voigt": given, "nine": full_tensor(given).ravel(), "full": full_tensor(given)}[form]
    np.testing.assert_allclose(read_labels(atoms, LabelKeys()).labels.stress, tensor, atol=1e-15)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [(StressUnit.ev_per_a3, 1.0), (StressUnit.gpa, 1 / 160.21766208), (StressUnit.kbar_vasp, -0.1 / 160.21766208)],
)
def test_stress_units(unit, factor):
    atoms = copper()
    expected = full_tensor(atoms.calc.results["stress"]) * factor
    np.testing.assert_allclose(read_labels(atoms, LabelKeys(stress_unit=unit)).labels.stress, expected, rtol=1e-15)
    # Virials are in eV whatever the unit of the stress.
    atoms.info["virials"] = np.eye(3)
    found = read_labels(atoms, LabelKeys(stress_unit=unit, virials="virials"))
    np.testing.assert_allclose(found.labels.stress, -np.eye(3) / atoms.get_volume())


def test_missing_labels_are_none():
    labels = read_labels(unlabelled(), LabelKeys()).labels
    assert all(value is None for value in vars(labels).values())


def test_stress_without_volume_is_put_aside_and_said():
    atoms = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]], info={"stress": np.zeros(6)})
    found = read_labels(atoms, LabelKeys())
    assert found.labels.stress is None
    assert "no volume" in found.sources["stress"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("REF_energy", np.nan, r"energy in info\['REF_energy'\] is nan.*finite"),
        ("REF_energy", "abc", "not a number"),
        ("REF_energy", [1.0, 2.0], r"shape \(2,\), expected \(\)"),
        ("REF_stress", [1.0, 2.0], r"shape \(2,\).* 9 or 6"),
        ("REF_stress", [[0, 1, 0], [0, 0, 0], [0, 0, 0]], "not symmetric"),
        ("REF_stress", [np.inf, 0, 0, 0, 0, 0], r"is inf at index \(0, 0\)"),
        ("REF_forces", np.zeros((3, 3)), r"shape \(3, 3\), expected \(4, 3\)"),
        ("REF_forces", [[0, 0, 0]] * 3 + [[0, 0, np.nan]], r"forces .* is nan at index \(3, 2\)"),
        ("REF_magmoms", np.zeros((4, 3)), r"shape \(4, 3\), expected \(4,\)"),
    ],
)
def test_invalid_labels_are_named(key, value, message):
    atoms = unlabelled()
    (atoms.info if np.shape(value)[:1] != (4,) else atoms.arrays)[key] = value
    with pytest.raises(ValueError, match=message):
        read_labels(atoms, LabelKeys())


def test_charge_and_spin():
    atoms = unlabelled()
    charge, spin = read_charge_and_spin(atoms)
    assert math.isnan(charge)
    assert spin == 0.0
    atoms.info.update(total_charge=-1, spin_multiplicity=2)
    assert read_charge_and_spin(atoms) == (-1.0, 2.0)
    atoms.info["charge"] = 1
    assert read_charge_and_spin(atoms) == (1.0, 2.0)
    atoms.info["charge"] = "much"
    with pytest.raises(ValueError, match="info\\['charge'\\] is 'much'"):
        read_charge_and_spin(atoms)
