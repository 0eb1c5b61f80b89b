"""Do energies, forces and stresses of a data set belong together? Told from pairs of similar structures.

Between two structures with the same atoms in the same order, to third order in the difference,

    dE = - (F_1 + F_2)/2 . u + (V_1 s_1 + V_2 s_2)/2 : e

with u the displacements at the mean cell and e the strain that leads from one cell to the other. Fitting

    dE = a (force term) + b (stress term)

over many pairs gives a = b = 1 if units and signs are right; b = -1 is a stress of the opposite sign, b = 1/160.2 one
that was given in GPa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from matris.data.records import Sample
from matris.units import GPA, KBAR

MAX_STRAIN = 0.06
MAX_DISPLACEMENT = 0.4  # Angstrom, of any atom
MIN_PAIRS = 8
MIN_EXPLAINED = 0.8  # of the variance of dE, for the fit to count as evidence
TOLERANCE = 0.25  # relative, around the coefficients that stand for a unit


class Verdict(Enum):
    """What the pairs say about a label."""

    plausible = "plausible"
    wrong = "wrong"
    unclear = "not enough evidence"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """About one label.

    Attributes:
        verdict: plausible, wrong, or not enough evidence.
        slope: fitted coefficient, 1 if all is right; None without a fit.
        error: its standard error.
        num_pairs: pairs of structures it rests on.
        text: for people.
    """

    verdict: Verdict
    slope: float | None
    error: float | None
    num_pairs: int
    text: str


@dataclass(frozen=True, kw_only=True)
class EnergyPairs:
    """Energy differences per atom and what the labels predict, (P,) eV each.

    `distance` (P,) is how different the structures are, 1 at the limits of displacement and strain.
    """

    difference: np.ndarray
    from_forces: np.ndarray
    from_stress: np.ndarray
    distance: np.ndarray

    @staticmethod
    def join(pairs: Sequence[EnergyPairs]) -> EnergyPairs:
        """Of several groups."""
        columns = ("difference", "from_forces", "from_stress", "distance")
        return EnergyPairs(
            **{name: np.concatenate([np.empty(0), *(getattr(pair, name) for pair in pairs)]) for name in columns}
        )


_STRESS_MEANINGS = (
    (1.0, Verdict.plausible, "unit eV/A^3, tensile positive"),
    (-1.0, Verdict.wrong, "the sign is opposite (compression positive); negate it"),
    (GPA, Verdict.wrong, "it is in GPa; use --stress_unit GPa"),
    (-GPA, Verdict.wrong, "it is in GPa with the opposite sign"),
    (KBAR, Verdict.wrong, "it is in kbar, tensile positive"),
    (-KBAR, Verdict.wrong, "it is in kbar as VASP prints it; use --stress_unit kbar-vasp"),
)
_FORCE_MEANINGS = (
    (1.0, Verdict.plausible, "unit eV/A, minus the gradient of the energy"),
    (-1.0, Verdict.wrong, "the sign is opposite: these are gradients"),
    (51.422067, Verdict.wrong, "they are in Hartree/Bohr"),
    (27.211386, Verdict.wrong, "they are in Hartree/A"),
    (0.0433641, Verdict.wrong, "they are in kcal/mol/A"),
)


def energy_pairs(samples: Sequence[Sample]) -> EnergyPairs:
    """All pairs of similar structures among samples with the same atoms in the same order, and the same pbc.

    Samples without energy are left out; without forces, only pairs with undisplaced atoms count; without stress, only
    pairs with the same cell.
    """
    samples = [sample for sample in samples if sample.labels.energy is not None]
    if len(samples) < 2:
        return EnergyPairs.join([])
    no_stress = np.full((3, 3), np.nan)
    cell = np.stack([_full_cell(s) for s in samples])  # (S, 3, 3)
    position = np.stack([s.structure.positions for s in samples])  # (S, N, 3)
    force = np.stack(
        [np.full_like(position[0], np.nan) if s.labels.forces is None else s.labels.forces for s in samples]
    )
    stress = np.stack([no_stress if s.labels.stress is None else s.labels.stress for s in samples])
    energy = np.array([s.labels.energy for s in samples])
    # The same orientation for all: first lattice vector along x, second in the xy plane.
    turn = np.linalg.qr(cell.transpose(0, 2, 1))[0]
    turn *= np.sign(np.einsum("sij,sij->sj", turn, cell.transpose(0, 2, 1)))[:, None, :]
    cell, position, force = cell @ turn, position @ turn, force @ turn
    stress = turn.transpose(0, 2, 1) @ stress @ turn
    virial = np.abs(np.linalg.det(cell))[:, None, None] * stress

    i, j = np.triu_indices(len(samples), 1)
    close = np.abs(np.linalg.solve(cell[i], cell[j]) - np.eye(3)).max(axis=(1, 2)) < 2.0 * MAX_STRAIN
    i, j = i[close], j[close]
    mean_cell = 0.5 * (cell[i] + cell[j])
    deformation = np.linalg.solve(mean_cell, cell[j] - cell[i])  # rows: x -> x (1 + deformation)
    strain = 0.5 * (deformation + deformation.transpose(0, 2, 1))
    fractional = position @ np.linalg.inv(cell)
    if samples[0].structure.pbc.any():
        shift = fractional[j] - fractional[i]
        shift -= np.round(shift) * samples[0].structure.pbc
        displacement = (shift - shift.mean(axis=1, keepdims=True)) @ mean_cell
        force_sum = force[i] + force[j]
    else:
        displacement, force_sum = _align(position[i], position[j], force[i], force[j])
    moved = np.linalg.norm(displacement, axis=2).max(axis=1)
    size = np.abs(strain).max(axis=(1, 2))
    from_forces = -0.5 * (force_sum * displacement).sum(axis=(1, 2))
    from_forces[moved < 1e-3] = 0.0  # written positions are rounded
    from_stress = 0.5 * ((virial[i] + virial[j]) * strain).sum(axis=(1, 2))
    from_stress[size < 1e-6] = 0.0
    distance = np.maximum(moved / MAX_DISPLACEMENT, size / MAX_STRAIN)
    good = (distance < 1.0) & (distance > 1e-4) & np.isfinite(from_forces) & np.isfinite(from_stress)
    num_atoms = position.shape[1]
    return EnergyPairs(
        difference=(energy[j] - energy[i])[good] / num_atoms,
        from_forces=from_forces[good] / num_atoms,
        from_stress=from_stress[good] / num_atoms,
        distance=distance[good],
    )


def _align(
    first: np.ndarray, second: np.ndarray, force_first: np.ndarray, force_second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Displacements and sums of forces, (P, N, 3) each, once the second molecule is laid onto the first (Kabsch)."""
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    u, _, vt = np.linalg.svd(second.transpose(0, 2, 1) @ first)
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    rotation = u @ vt
    return second @ rotation - first, force_first + force_second @ rotation


def judge_forces(pairs: EnergyPairs) -> Evidence:
    """Unit and sign of the forces."""
    return _judge(pairs, "forces", _FORCE_MEANINGS)


def judge_stress(pairs: EnergyPairs, pressure_slopes: np.ndarray) -> Evidence:
    """Unit and sign of the stress; the sign alone from pressure and volume where no pairs tell more.

    Args:
        pressure_slopes: (P,) change of pressure with volume, any unit, between structures of the same composition.
    """
    evidence = _judge(pairs, "stress", _STRESS_MEANINGS)
    if evidence.verdict is not Verdict.unclear or len(pressure_slopes) < 20:
        return evidence
    falling = float((pressure_slopes < 0.0).mean())
    text = f"{falling:.0%} of {len(pressure_slopes)} pairs of one composition have less pressure at more volume"
    if falling > 0.75:
        verdict, text = Verdict.plausible, f"{text}: the sign is right; nothing tells the unit"
    elif falling < 0.25:
        verdict, text = Verdict.wrong, f"{text}: the sign is probably opposite"
    else:
        verdict, text = Verdict.unclear, f"{evidence.text}; {text}"
    return Evidence(verdict=verdict, slope=None, error=None, num_pairs=len(pressure_slopes), text=text)


def pressure_slopes(volume: np.ndarray, pressure: np.ndarray) -> np.ndarray:
    """Change of pressure over change of volume of all pairs of structures whose volumes differ by more than 2 %."""
    i, j = np.triu_indices(len(volume), 1)
    apart = np.abs(volume[j] - volume[i]) > 0.02 * (volume[i] + volume[j]) / 2
    return ((pressure[j] - pressure[i]) / np.where(apart, volume[j] - volume[i], 1.0))[apart]


def _judge(pairs: EnergyPairs, label: str, meanings: Sequence[tuple[float, Verdict, str]]) -> Evidence:
    which = 0 if label == "forces" else 1
    columns = np.stack([pairs.from_forces, pairs.from_stress], axis=1)
    telling = columns[:, which] != 0.0
    num_pairs = int(telling.sum())
    text = f"{num_pairs} pairs of similar structures"
    nothing = Evidence(verdict=Verdict.unclear, slope=None, error=None, num_pairs=num_pairs, text=text)
    if num_pairs < MIN_PAIRS:
        return nothing
    # The error of the prediction grows with the third power of the distance, the energy with the first or second.
    weight = 1.0 / np.maximum(pairs.distance[telling], 0.05) ** 2
    columns, difference = columns[telling] * weight[:, None], pairs.difference[telling] * weight
    present = (columns != 0.0).any(axis=0)
    which, columns = int(present[:which].sum()), columns[:, present]
    scale = np.sqrt((columns**2).mean(axis=0))  # makes the fit and its rank independent of units
    columns = columns / scale
    keep = np.ones(num_pairs, dtype=bool)
    for _ in range(5):  # leave out pairs on other branches of the energy surface
        solution, _, rank, _ = np.linalg.lstsq(columns[keep], difference[keep], rcond=1e-6)
        if rank < columns.shape[1]:
            return nothing
        residual = difference - columns @ solution
        kept, keep = keep, np.abs(residual) <= max(5.0 * 1.4826 * np.median(np.abs(residual)), 1e-9)
    variance = (residual[kept] ** 2).sum() / max(1, kept.sum() - len(solution))
    covariance = variance * np.linalg.inv(columns[kept].T @ columns[kept])
    slope, error = float(solution[which] / scale[which]), float(np.sqrt(covariance[which, which]) / scale[which])
    explained = 1.0 - float((residual[kept] ** 2).sum() / max((difference[kept] ** 2).sum(), 1e-300))
    text = f"dE against its prediction: slope {slope:.3g} +- {error:.1g}, {explained:.0%} explained, {num_pairs} pairs"
    verdict = Verdict.unclear
    if explained >= MIN_EXPLAINED and error < 0.2 * abs(slope) and kept.mean() > 0.5:
        for value, known, meaning in meanings:
            if abs(slope / value - 1.0) < TOLERANCE:
                verdict, text = known, f"{text}: {meaning}"
        if verdict is Verdict.unclear and not 0.4 < slope < 2.5:
            verdict, text = Verdict.wrong, f"{text}: the labels do not belong to these energies"
    return Evidence(verdict=verdict, slope=slope, error=error, num_pairs=num_pairs, text=text)


def _full_cell(sample: Sample) -> np.ndarray:
    """The cell, with unit vectors in place of those that are absent."""
    cell = sample.structure.cell.copy()
    missing = ~cell.any(axis=1)
    if missing.any():
        _, _, directions = np.linalg.svd(cell[~missing].reshape(-1, 3), full_matrices=True)
        cell[missing] = directions[int((~missing).sum()) :]
    return cell
