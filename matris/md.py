"""Molecular dynamics through ASE: constant energy, Langevin, and constant pressure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import Trajectory, write
from ase.md.langevin import Langevin
from ase.md.logger import MDLogger
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm

from matris.simulation_config import Barostat, Ensemble, MDConfig
from matris.units import GPA, MILLI


@dataclass(frozen=True, kw_only=True)
class MDSummary:
    """Means over the run. `energy_drift` is the slope of a straight line through the total energy."""

    ensemble: Ensemble
    num_atoms: int
    steps: int
    timestep_fs: float
    temperature_mean_K: float
    temperature_std_K: float
    total_energy_first_eV: float
    total_energy_last_eV: float
    energy_drift_meV_per_atom_per_ps: float | None  # nve only
    energy_fluctuation_meV_per_atom: float | None  # nve only: rms around that line
    volume_mean_A3: float | None  # npt only
    seconds: float
    steps_per_second: float


def run_md(atoms: Atoms, config: MDConfig, *, directory: Path) -> MDSummary:
    """Move `atoms` (edited in place; its calculator is used).

    Args:
        directory: where `trajectory.traj`, `log.txt`, `final.extxyz` and `summary.json` are written.

    Raises:
        ValueError: an ensemble that the structure does not allow, or a run that blew up.
    """
    rng = np.random.default_rng(config.seed)
    _check(atoms, config)
    _set_velocities(atoms, config, rng)
    start = time.perf_counter()
    # Row s: total energy (eV), temperature (K), volume (A^3; 0 without a cell) after step s.
    history = np.zeros((config.steps + 1, 3))
    with (
        Trajectory(str(directory / "trajectory.traj"), "w", atoms) as trajectory,
        _dynamics(atoms, config, rng) as dynamics,
        MDLogger(dynamics, atoms, str(directory / "log.txt"), stress=config.ensemble is Ensemble.npt) as logger,
        tqdm(total=config.steps, desc=config.ensemble.value, unit="step") as bar,
    ):
        dynamics.attach(trajectory.write, interval=config.save_interval)
        dynamics.attach(logger, interval=config.save_interval)
        for step, _ in enumerate(dynamics.irun(steps=config.steps)):
            history[step] = atoms.get_total_energy(), atoms.get_temperature(), atoms.cell.volume
            if not np.isfinite(history[step]).all():
                raise ValueError(
                    f"step {step}: total energy {history[step, 0]} eV, temperature {history[step, 1]} K: the run blew "
                    "up; use a shorter --timestep_fs, or look whether the model knows such structures"
                )
            bar.update(step - bar.n)
            bar.set_postfix_str(f"{history[step, 1]:.0f} K, E {history[step, 0]:.4f} eV", refresh=False)
    summary = _summarise(history, len(atoms), config, time.perf_counter() - start)
    write(directory / "final.extxyz", atoms)
    (directory / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def fit_drift(times_ps: np.ndarray, energies: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line through `energies` (T,) at `times_ps` (T,), and the rms around it."""
    slope, offset = np.polyfit(times_ps, energies - energies[0], 1)
    residual = energies - energies[0] - slope * times_ps - offset
    return float(slope), float(np.sqrt(np.mean(residual**2)))


def _check(atoms: Atoms, config: MDConfig) -> None:
    if config.keep_velocities and not atoms.has("momenta"):
        raise ValueError("--keep_velocities: the structure has no velocities (momenta)")
    if config.ensemble is Ensemble.npt and (not atoms.pbc.all() or atoms.constraints or len(atoms) < 2):
        raise ValueError(
            f"npt with pbc {atoms.pbc.tolist()}, {len(atoms.constraints)} constraints, {len(atoms)} atoms: it needs "
            "three periodic directions, no constraints and at least two atoms; use nvt"
        )


def _set_velocities(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> None:
    """Maxwell-Boltzmann momenta; those of a free system are at rest as a whole."""
    if config.keep_velocities:
        return
    mass = atoms.get_masses()[:, None]
    momenta = rng.normal(size=(len(atoms), 3)) * np.sqrt(mass * units.kB * config.temperature_K)
    if len(atoms) > 1 and not atoms.constraints:
        momenta -= momenta.sum(axis=0) * mass / mass.sum()
    atoms.set_momenta(momenta)


def _dynamics(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> MolecularDynamics:
    timestep = config.timestep_fs * units.fs
    if config.ensemble is Ensemble.nve:
        return VelocityVerlet(atoms, timestep)
    if config.ensemble is Ensemble.nvt:
        return Langevin(
            atoms,
            timestep,
            temperature_K=config.temperature_K,
            friction=config.friction_per_ps / (1000.0 * units.fs),
            fixcm=False,
            rng=rng,
        )
    method = IsotropicMTKNPT if config.barostat is Barostat.isotropic else MTKNPT
    return method(
        atoms,
        timestep,
        temperature_K=config.temperature_K,
        pressure_au=config.pressure_GPa * GPA,
        tdamp=config.thermostat_fs * units.fs,
        pdamp=config.barostat_fs * units.fs,
    )


def _summarise(history: np.ndarray, num_atoms: int, config: MDConfig, seconds: float) -> MDSummary:
    energy, temperature, volume = history.T
    drift = fluctuation = None
    if config.ensemble is Ensemble.nve:
        times_ps = np.arange(len(energy)) * config.timestep_fs / 1000.0
        drift, fluctuation = fit_drift(times_ps, energy * MILLI / num_atoms)
    return MDSummary(
        ensemble=config.ensemble,
        num_atoms=num_atoms,
        steps=config.steps,
        timestep_fs=config.timestep_fs,
        temperature_mean_K=float(temperature.mean()),
        temperature_std_K=float(temperature.std()),
        total_energy_first_eV=float(energy[0]),
        total_energy_last_eV=float(energy[-1]),
        energy_drift_meV_per_atom_per_ps=drift,
        energy_fluctuation_meV_per_atom=fluctuation,
        volume_mean_A3=float(volume.mean()) if config.ensemble is Ensemble.npt else None,
        seconds=seconds,
        steps_per_second=config.steps / seconds,
    )
