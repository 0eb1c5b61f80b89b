"""Mean sizes of structures, and what of a micro-batch of them one rank has. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matris.traffic import Halo, RankRows


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Mean numbers of a structure.

    Attributes:
        atoms: of atoms.
        edges: of directed edges of the atom graph.
        angles: of directed edges of the line graph.
    """

    atoms: float
    edges: float
    angles: float

    def __post_init__(self) -> None:
        for name, smallest in (("atoms", 1.0), ("edges", 0.0), ("angles", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= smallest):
                raise ValueError(f"a structure of {value:g} {name}: give a mean number of at least {smallest:g}")
        if self.angles and not self.edges:
            raise ValueError(f"a structure of {self.angles:g} angles and no edges: angles are between two edges")

    def rows(self, structures: int, *, parts: int, cutoff: float) -> RankRows:
        """Of a micro-batch on one of the ranks that share its atoms.

        What it borrows is estimated for parts that are cubes cut out of structures of even density, each part a
        neighbour of all that is near. A structure that is smaller than a part is cut only where one part ends.

        Args:
            parts: ranks of the graph axis.
            cutoff: of the atom graph, Angstrom.
        """
        owned = structures / parts
        halos: list[Halo | None] = [None, None]
        if parts > 1:
            pieces = 1.0 if owned < 1.0 else 2.0 * (parts - 1) / parts
            share = owned if owned < 1.0 else 0.5
            halos = [Halo(lent=pieces * rows, borrowed=pieces * rows) for rows in self._borrowed(share, cutoff)]
        return RankRows(
            structures=structures,
            atoms=owned * self.atoms,
            edges=owned * self.edges,
            undirected=owned * self.edges / 2.0,
            angles=owned * self.angles,
            atom_halo=halos[0],
            edge_halo=halos[1],
        )

    def _borrowed(self, share: float, cutoff: float) -> tuple[float, float]:
        """Atoms and undirected edges that a piece of a structure needs of the rest of it.

        Args:
            share: of the structure's atoms that the piece has, below 1.
        """
        if not self.edges:
            return 0.0, 0.0
        density = self.edges / self.atoms / (4.0 / 3.0 * math.pi * cutoff**3)
        side = (share * self.atoms / density) ** (1.0 / 3.0)
        shell = density * ((side + 2.0 * cutoff) ** 3 - side**3)
        # An edge of random length and direction is 3/8 of the cutoff long along an axis, in the mean.
        crossing = 1.0 - (1.0 - min(1.0, 0.375 * cutoff / side)) ** 3
        rest = 1.0 - share
        # Of two ranks that have one direction each of an edge, one borrows it.
        return min(shell, rest * self.atoms), share * self.edges / 2.0 * min(crossing, rest)
