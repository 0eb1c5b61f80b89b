"""Atomic reference energies and the energy scale, from the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from janus.comm.collectives import gather_objects
from janus.mesh import Mesh
from matris.data.dataset import StructureDataset
from matris.data.records import Sample
from matris.elements import MAX_Z, SYMBOLS, number_of

_ROWS = 1024  # structures between two factorisations
_RCOND = 1e-10  # compositions that differ by less count as the same


@dataclass(frozen=True, kw_only=True)
class LabelStatistics:
    """All that is needed of the training labels, in a size that does not depend on their number.

    Attributes:
        factor: (MAX_Z + 1, MAX_Z + 1) R of the QR factorisation of the rows [fraction of each element, energy per atom]
            of all structures with an energy: least squares and residuals for any reference energies follow from it.
        num_energies: structures with an energy.
        element_counts: (MAX_Z,) structures with an energy in which the element occurs.
        elements: atomic numbers that occur in any structure, with an energy or without.
        squared_force_sum: (eV/A)^2 over all labelled components.
        num_force_components: how many those are.
        digest: of all structures and labels and their order, 16 hexadecimal digits; the same for every rank count.
        isolated: total energy of structures of one atom without neighbours, eV, by atomic number.
    """

    factor: np.ndarray
    num_energies: int
    element_counts: np.ndarray
    elements: frozenset[int]
    squared_force_sum: float
    num_force_components: int
    digest: str
    isolated: dict[int, float]

    def residual(self, energies: np.ndarray) -> float:
        """RMS of the energy per atom that reference energies (of Z = 1, 2, ...) leave to the network, eV/atom."""
        solution = np.zeros(MAX_Z + 1)
        solution[: len(energies)] = energies
        solution[-1] = -1.0
        return float(np.linalg.norm(self.factor @ solution) / np.sqrt(max(self.num_energies, 1)))

    @property
    def present(self) -> np.ndarray:
        """Indices into (MAX_Z,) of the elements that occur."""
        return np.nonzero(self.element_counts)[0]

    @property
    def rank(self) -> int:
        """How many combinations of reference energies the compositions determine; at most `len(present)`."""
        return int(np.linalg.matrix_rank(self.factor[:, self.present], rtol=_RCOND)) if self.num_energies else 0

    @property
    def rms_force(self) -> float | None:
        """RMS force component, eV/A; None without forces, or if all are zero."""
        if self.squared_force_sum == 0.0:
            return None
        return float(np.sqrt(self.squared_force_sum / self.num_force_components))


def statistics_by_task(dataset: StructureDataset, mesh: Mesh) -> dict[str, LabelStatistics]:
    """`label_statistics` of the structures of each level of theory that the data set has, in the order of its names."""
    return {name: label_statistics(part, mesh) for name, part in dataset.by_task().items()}


def label_statistics(dataset: StructureDataset, mesh: Mesh) -> LabelStatistics:
    """Of the whole data set; every rank reads its share once, in bounded memory, and gathers 72 kB from each."""
    parts = gather_objects(_own_statistics(dataset, range(mesh.rank, len(dataset), mesh.world_size)), mesh)
    return LabelStatistics(
        factor=_triangle([part.factor for part in parts]),
        num_energies=sum(part.num_energies for part in parts),
        element_counts=np.sum([part.element_counts for part in parts], axis=0),
        elements=frozenset().union(*(part.elements for part in parts)),
        squared_force_sum=sum(part.squared_force_sum for part in parts),
        num_force_components=sum(part.num_force_components for part in parts),
        digest=f"{sum(int(part.digest, 16) for part in parts) % 2**64:016x}",
        isolated={number: energy for part in parts for number, energy in part.isolated.items()},
    )


def _own_statistics(dataset: StructureDataset, indices: Iterable[int]) -> LabelStatistics:
    factor = np.zeros((0, MAX_Z + 1))
    rows: list[np.ndarray] = []
    element_counts = np.zeros(MAX_Z, dtype=np.int64)
    elements: set[int] = set()
    num_energies = num_components = digest = 0
    squared = 0.0
    isolated: dict[int, float] = {}
    for index in indices:
        sample = dataset[index]
        numbers, labels = sample.structure.numbers, sample.labels
        elements.update(numbers.tolist())
        digest += _digest(index, sample)
        if labels.energy is not None:
            counts = np.bincount(numbers - 1, minlength=MAX_Z)
            element_counts += counts > 0
            num_energies += 1
            rows.append(np.append(counts, labels.energy) / len(numbers))
            if len(rows) == _ROWS:
                factor, rows = _triangle([factor, *rows]), []
            if len(numbers) == 1 and dataset.sizes[index, 1] == 0:
                isolated[int(numbers[0])] = labels.energy
        if labels.forces is not None:
            squared += float(np.square(labels.forces).sum())
            num_components += labels.forces.size
    return LabelStatistics(
        # Rows of zeros change nothing, and make the factor square however few structures there are.
        factor=_triangle([factor, *rows, np.zeros((MAX_Z + 1, MAX_Z + 1))]),
        num_energies=num_energies,
        element_counts=element_counts,
        elements=frozenset(elements),
        squared_force_sum=squared,
        num_force_components=num_components,
        digest=f"{digest % 2**64:016x}",
        isolated=isolated,
    )


def reference_energies(source: str, statistics: LabelStatistics) -> np.ndarray:
    """Reference energies of all elements, (MAX_Z,) eV; zero for elements that are not in the data.

    Args:
        source: `fit` (least squares of the energies per atom; the shortest solution where compositions do not tell
            elements apart), `none`, `isolated`, or the path of a JSON file {"Si": -0.82, ...}.

    Raises:
        ValueError: no energies to fit, elements without an isolated atom or entry, an unreadable file.
    """
    present = statistics.present
    energies = np.zeros(MAX_Z)
    if source == "fit":
        if not statistics.num_energies:
            raise ValueError("reference energies cannot be fitted: no training structure has an energy; use none")
        matrix, target = statistics.factor[:, present], statistics.factor[:, -1]
        energies[present] = np.linalg.lstsq(matrix, target, rcond=_RCOND)[0]
    elif source != "none":
        known = statistics.isolated if source == "isolated" else _read(Path(source))
        missing = [SYMBOLS[number + 1] for number in present if number + 1 not in known]
        if missing:
            where = "isolated atom in the training data" if source == "isolated" else f"entry in {source}"
            raise ValueError(f"reference energies: no {where} for {', '.join(missing)}; add them, or use fit")
        for number, energy in known.items():
            energies[number - 1] = energy
    return energies


def reference_table(energies: np.ndarray, statistics: LabelStatistics) -> str:
    """A line per element of the training data."""
    lines = [f"  {'element':<9}{'structures':>11}{'energy (eV)':>16}"]
    for number in statistics.present:
        count = int(statistics.element_counts[number])
        lines.append(f"  {SYMBOLS[number + 1]:<9}{count:>11}{energies[number]:>16.6f}")
    return "\n".join(lines)


def _digest(index: int, sample: Sample) -> int:
    """64 bits of what is learned from a record at its place. Their sum does not depend on who adds them up."""
    structure, labels = sample.structure, sample.labels
    digest = hashlib.blake2b(f"{index} {labels.energy!r}".encode(), digest_size=8)
    arrays = (structure.numbers, structure.positions, structure.cell, structure.pbc)
    for array in (*arrays, labels.forces, labels.stress, labels.magmoms):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "big")


def _triangle(rows: list[np.ndarray]) -> np.ndarray:
    """R of the QR factorisation of the stacked rows."""
    return np.linalg.qr(np.vstack(rows)).R


def _read(path: Path) -> dict[int, float]:
    try:
        entries = json.loads(path.read_text())
        energies = {number_of(symbol): float(energy) for symbol, energy in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'reference energies {path}: {error}; expected JSON such as {{"Si": -0.82}}, eV') from error
    if not all(np.isfinite(energy) for energy in energies.values()):
        raise ValueError(f"reference energies {path}: all must be finite numbers of eV")
    return energies
