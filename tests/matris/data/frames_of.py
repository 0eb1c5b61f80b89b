"""Small labelled structures for tests."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


def copper(seed: int = 0, repeat: int = 1, rattle: float = 0.1) -> Atoms:
    """Rattled, strained fcc copper with EMT labels, as ASE >= 3.23 gives it from a file: results in the calculator."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True).repeat((repeat, 1, 1))
    strain = rng.uniform(-0.03, 0.03, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
    atoms.rattle(rattle, rng=rng)
    atoms.calc = EMT()
    results = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(),
    }
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def unlabelled(seed: int = 0) -> Atoms:
    """The same structure without labels."""
    atoms = copper(seed)
    atoms.calc = None
    return atoms


def full_tensor(voigt: np.ndarray) -> np.ndarray:
    """(3, 3) of xx yy zz yz xz xy."""
    xx, yy, zz, yz, xz, xy = voigt
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
