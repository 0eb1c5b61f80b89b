"""One atomic configuration and its labels, as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from matris.elements import MAX_Z, SYMBOLS

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True, kw_only=True)
class Structure:
    """An arrangement of atoms.

    Attributes:
        numbers: atomic numbers, (N,) int64, 1..94.
        positions: Cartesian coordinates, (N, 3) float64, Angstrom.
        cell: lattice vectors as rows, (3, 3) float64, Angstrom; a zero row where there is none. Any handedness.
        pbc: which lattice vectors are periodic, (3,) bool.

    Raises:
        ValueError: wrong shapes, non-finite values, unknown elements, or a periodic direction without a volume.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray

    def __post_init__(self) -> None:
        num_atoms = len(self.numbers)
        if num_atoms == 0:
            raise ValueError("structure has no atoms: at least one is needed")
        shapes = (self.numbers.shape, self.positions.shape, self.cell.shape, self.pbc.shape)
        if shapes != ((num_atoms,), (num_atoms, 3), (3, 3), (3,)):
            raise ValueError(
                f"structure has numbers, positions, cell, pbc of shapes {shapes}: expected (N,), (N, 3), (3, 3), (3,)"
            )
        # Counting is the quickest question about a small array, and every structure that is read is asked.
        if np.count_nonzero(np.isfinite(self.positions)) != self.positions.size:
            atom = int(np.nonzero(~np.isfinite(self.positions).all(axis=1))[0][0])
            raise ValueError(f"position of atom {atom} is {self.positions[atom]}: coordinates must be finite")
        vectors = self.cell.tolist()
        if not all(map(math.isfinite, chain.from_iterable(vectors))):
            raise ValueError(f"cell is {vectors}: lattice vectors must be finite")
        if np.count_nonzero(self.numbers < 1) or np.count_nonzero(self.numbers > MAX_Z):
            atom = int(np.nonzero((self.numbers < 1) | (self.numbers > MAX_Z))[0][0])
            raise ValueError(
                f"atom {atom} has atomic number {int(self.numbers[atom])}: allowed are 1 ({SYMBOLS[1]}) to "
                f"{MAX_Z} ({SYMBOLS[MAX_Z]})"
            )
        if not _has_a_box(vectors, self.pbc.tolist()):
            raise ValueError(
                f"cell {vectors} with pbc {self.pbc.tolist()}: the periodic lattice vectors must be "
                "linearly independent; switch pbc off for directions that have no lattice vector"
            )

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    @staticmethod
    def several(
        *, numbers: np.ndarray, positions: np.ndarray, cells: np.ndarray, pbc: np.ndarray, atoms: Sequence[slice]
    ) -> list[Structure]:
        """Many at once: checked as one is, but together, which takes a good part of the time of reading them.

        Args:
            numbers, positions: of all atoms, (N,) int64 and (N, 3) float64.
            cells, pbc: (n, 3, 3) float64 and (n, 3) bool.
            atoms: the atoms of each structure; its arrays are parts of the arguments.

        Raises:
            ValueError: as for the first that is wrong.
        """
        assert positions.shape == (len(numbers), 3)
        each = [
            {"numbers": numbers[own], "positions": positions[own], "cell": cell, "pbc": periodic}
            for own, cell, periodic in zip(atoms, cells, pbc, strict=True)
        ]
        sound = (
            all(own.stop > own.start for own in atoms)
            and np.isfinite(positions).all()
            and np.isfinite(cells).all()
            and not ((numbers < 1) | (numbers > MAX_Z)).any()
            and all(map(_has_a_box, cells.tolist(), pbc.tolist()))
        )
        if not sound:
            return [Structure(**arrays) for arrays in each]
        structures = []
        for arrays in each:
            structure = object.__new__(Structure)
            vars(structure).update(arrays)  # past the checks of a single one
            structures.append(structure)
        return structures

    @staticmethod
    def from_atoms(atoms: Atoms) -> Structure:
        """From ASE, by copies: `atoms` is left as it was."""
        return Structure(
            numbers=np.array(atoms.numbers, dtype=np.int64),
            positions=np.array(atoms.positions, dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),
            pbc=np.array(atoms.pbc, dtype=bool),
        )


_Vector: TypeAlias = Sequence[float]


def _has_a_box(vectors: Sequence[_Vector], periodic: Sequence[bool]) -> bool:
    """Whether the periodic ones among three lattice vectors are linearly independent."""
    return _independent([vector for vector, is_periodic in zip(vectors, periodic, strict=True) if is_periodic])


def _independent(vectors: Sequence[_Vector]) -> bool:
    """Whether up to three vectors span a box, of a volume that is more than rounding of the product of their lengths.

    In plain numbers: a call of LAPACK takes a good part of the time of reading the structure.
    """
    lengths = math.prod([math.hypot(*vector) for vector in vectors])
    if len(vectors) < 2:
        volume = lengths
    else:
        normal = _cross(vectors[0], vectors[1])
        volume = math.hypot(*normal) if len(vectors) == 2 else abs(_dot(normal, vectors[2]))
    return volume > 1e-6 * lengths


def _dot(a: _Vector, b: _Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: _Vector, b: _Vector) -> _Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """First-principles labels of a structure; None where a label is missing (masked in the loss, never filled in).

    Attributes:
        energy: total energy, eV.
        forces: (N, 3), eV/A.
        stress: (3, 3), eV/A^3, positive when tensile.
        magmoms: (N,), Bohr magnetons.
    """

    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    magmoms: np.ndarray | None = None
