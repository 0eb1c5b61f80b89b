"""Relaxation of atoms, and of their cell, to the nearest minimum of the energy."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ase.optimize
import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, write
from tqdm import tqdm

from matris.simulation_config import RelaxConfig
from matris.units import GPA


@dataclass(frozen=True, kw_only=True)
class RelaxSummary:
    """What a relaxation came to. Energies eV, forces eV/A, volumes A^3, pressures GPa (compression positive)."""

    converged: bool
    steps: int
    initial_energy_eV: float
    final_energy_eV: float
    max_force_eV_per_A: float
    initial_volume_A3: float | None
    final_volume_A3: float | None
    final_pressure_GPa: float | None
    seconds: float


def relax(atoms: Atoms, config: RelaxConfig, *, directory: Path) -> RelaxSummary:
    """Relax `atoms` (edited in place; its calculator is used).

    Args:
        directory: where `trajectory.traj`, `log.txt`, `final.extxyz` and `summary.json` are written.

    Raises:
        ValueError: a cell to relax that is not periodic in three directions.
    """
    periodic = bool(atoms.pbc.all())
    if config.cell and not periodic:
        raise ValueError(f"--cell with pbc {atoms.pbc.tolist()}: a cell is relaxed when all three are periodic")
    start = time.perf_counter()
    initial_energy, initial_volume = atoms.get_potential_energy(), atoms.cell.volume
    target = FrechetCellFilter(atoms, scalar_pressure=config.pressure_GPa * GPA) if config.cell else atoms
    method = getattr(ase.optimize, config.optimizer.value)
    with (
        Trajectory(str(directory / "trajectory.traj"), "w", atoms) as trajectory,
        method(target, logfile=str(directory / "log.txt")) as dynamics,
        tqdm(total=config.steps, desc="relax", unit="step") as bar,
    ):
        dynamics.attach(trajectory.write)
        for step, _ in enumerate(dynamics.irun(fmax=config.fmax, steps=config.steps)):
            bar.update(step - bar.n)
            energy, largest = atoms.get_potential_energy(), _largest(target.get_forces())
            bar.set_postfix_str(f"E {energy:.4f} eV, fmax {largest:.4f} eV/A", refresh=False)
        summary = RelaxSummary(
            converged=_largest(target.get_forces()) < config.fmax,
            steps=dynamics.nsteps,
            initial_energy_eV=float(initial_energy),
            final_energy_eV=float(atoms.get_potential_energy()),
            max_force_eV_per_A=_largest(atoms.get_forces()),
            initial_volume_A3=float(initial_volume) if periodic else None,
            final_volume_A3=float(atoms.cell.volume) if periodic else None,
            final_pressure_GPa=float(-atoms.get_stress(voigt=False).trace() / 3.0 / GPA) if periodic else None,
            seconds=time.perf_counter() - start,
        )
    write(directory / "final.extxyz", atoms)
    (directory / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _largest(forces: np.ndarray) -> float:
    return float(np.linalg.norm(forces, axis=1).max())
