"""A small alloy set labelled with ASE's effective medium theory: enough to show and test everything, in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, reference_states

ELEMENTS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt")


@dataclass(frozen=True, kw_only=True)
class DemoFiles:
    """Extended XYZ files with energy (eV), forces (eV/A) and, for those with a cell, stress (eV/A^3)."""

    train: Path
    valid: Path
    test: Path


def make_demo(folder: Path | str, num: int = 320, seed: int = 0) -> DemoFiles:
    """Write `train.xyz`, `valid.xyz` and `test.xyz` (80, 10 and 10 % of `num` structures) into `folder`.

    Strained and rattled fcc metals and alloys of Cu, Ag, Au, Ni, Pd and Pt with 1 to 12 atoms: primitive and
    conventional cells, L1_0 and L1_2 order, random occupation, (111) slabs, and isolated clusters without a cell.
    The same arguments always write the same bytes.
    """
    if num < 10:
        raise ValueError(f"num is {num}: at least 10 structures are needed for three files")
    rng = np.random.default_rng(seed)
    frames = [_label(_KINDS[i % len(_KINDS)](rng)) for i in range(num)]
    rng.shuffle(frames)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = num // 10
    files = DemoFiles(train=folder / "train.xyz", valid=folder / "valid.xyz", test=folder / "test.xyz")
    for path, part in (
        (files.test, frames[:held]),
        (files.valid, frames[held : 2 * held]),
        (files.train, frames[2 * held :]),
    ):
        partial = path.with_name(path.name + ".partial")
        ase.io.write(partial, part, format="extxyz")
        partial.replace(path)
    return files


def _label(atoms: Atoms) -> Atoms:
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.cell.rank == 3:
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _primitive(rng: np.random.Generator) -> Atoms:
    return _distort(_fcc(rng.choice(ELEMENTS, 1)), rng)


def _conventional(rng: np.random.Generator) -> Atoms:
    """Pure, L1_0 (AABB), L1_2 (ABBB) or random occupation of the cubic cell."""
    a, b = rng.choice(ELEMENTS, 2, replace=False)
    occupations = ([a, a, a, a], [a, a, b, b], [a, b, b, b], list(rng.choice(ELEMENTS, 4)))
    return _distort(_fcc(occupations[rng.integers(4)], cubic=True), rng)


def _supercell(rng: np.random.Generator) -> Atoms:
    repeat = [(2, 1, 1), (2, 2, 1), (3, 1, 1), (2, 2, 2), (3, 2, 1), (3, 2, 2)][rng.integers(6)]
    return _distort(_fcc(rng.choice(ELEMENTS, int(np.prod(repeat))), repeat=repeat), rng)


def _slab(rng: np.random.Generator) -> Atoms:
    layers = int(rng.integers(3, 6))
    symbols = rng.choice(ELEMENTS, layers)
    atoms = fcc111(symbols[0], (1, 1, layers), a=_lattice_constant(symbols), vacuum=6.0)
    atoms.set_chemical_symbols(list(symbols))
    atoms.rattle(rng.uniform(0.02, 0.12), rng=rng)
    return _plain(atoms)


def _cluster(rng: np.random.Generator) -> Atoms:
    """A piece of the crystal without a cell."""
    size = int(rng.integers(2, 8))
    symbols = rng.choice(ELEMENTS, size)
    crystal = bulk(symbols[0], "fcc", a=_lattice_constant(symbols), cubic=True).repeat(2)
    nearest = np.argsort(np.linalg.norm(crystal.positions - crystal.positions[0], axis=1), kind="stable")[:size]
    atoms = Atoms(symbols, positions=crystal.positions[nearest])
    atoms.rattle(rng.uniform(0.02, 0.12), rng=rng)
    return atoms


_KINDS = (_conventional, _supercell, _primitive, _conventional, _supercell, _conventional, _supercell, _slab, _cluster)


def _lattice_constant(symbols: np.ndarray | list[str]) -> float:
    """Mean over the atoms (Vegard's law), Angstrom."""
    return float(np.mean([reference_states[atomic_numbers[symbol]]["a"] for symbol in symbols]))


def _fcc(
    symbols: np.ndarray | list[str],
    *,
    cubic: bool = False,
    repeat: tuple[int, int, int] = (1, 1, 1),
) -> Atoms:
    atoms = bulk(symbols[0], "fcc", a=_lattice_constant(symbols), cubic=cubic).repeat(repeat)
    atoms.set_chemical_symbols(list(symbols))
    return atoms


def _distort(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Random strain of up to 5 % and displacements of up to about 0.15 A."""
    strain = rng.uniform(-0.05, 0.05, (3, 3))
    strain = np.eye(3) * rng.uniform(0.97, 1.05) + 0.5 * (strain + strain.T) * rng.uniform()
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.rattle(rng.uniform(0.0, 0.15), rng=rng)
    return _plain(atoms)


def _plain(atoms: Atoms) -> Atoms:
    """Without the tags and site information that builders leave."""
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
