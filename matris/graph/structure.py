"""One atomic configuration and its labels, as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
        if not np.isfinite(self.positions).all():
            atom = int(np.nonzero(~np.isfinite(self.positions).all(axis=1))[0][0])
            raise ValueError(f"position of atom {atom} is {self.positions[atom]}: coordinates must be finite")
        vectors = self.cell.tolist()
        if not all(math.isfinite(number) for vector in vectors for number in vector):
            raise ValueError(f"cell is {vectors}: lattice vectors must be finite")
        unknown = (self.numbers < 1) | (self.numbers > MAX_Z)
        if unknown.any():
            atom = int(np.nonzero(unknown)[0][0])
            raise ValueError(
                f"atom {atom} has atomic number {int(self.numbers[atom])}: allowed are 1 ({SYMBOLS[1]}) to "
                f"{MAX_Z} ({SYMBOLS[MAX_Z]})"
            )
        if not _independent([vector for vector, is_periodic in zip(vectors, self.pbc, strict=True) if is_periodic]):
            raise ValueError(
                f"cell {vectors} with pbc {self.pbc.tolist()}: the periodic lattice vectors must be "
                "linearly independent; switch pbc off for directions that have no lattice vector"
            )

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

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


def _independent(vectors: Sequence[_Vector]) -> bool:
    """Whether up to three vectors span a box, of a volume that is more than rounding of the product of their lengths.

    In plain numbers: a call of LAPACK takes a good part of the time of reading the structure.
    """
    lengths = math.prod(_dot(vector, vector) for vector in vectors)
    if len(vectors) < 2:
        volume = lengths
    else:
        normal = _cross(vectors[0], vectors[1])
        volume = _dot(normal, normal) if len(vectors) == 2 else _dot(normal, vectors[2]) ** 2
    return volume > 1e-12 * lengths  # both squared


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
