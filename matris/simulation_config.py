"""What `relax` and `md` can be told. Imports nothing heavy, so that the command line is quick."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum


class Optimizer(str, Enum):
    """ASE's optimizers that need forces only."""

    fire = "FIRE"
    bfgs = "BFGS"
    lbfgs = "LBFGS"


class Ensemble(str, Enum):
    """What is held constant."""

    nve = "nve"
    nvt = "nvt"
    npt = "npt"


class Barostat(str, Enum):
    """What a constant pressure changes: the volume alone, or every lattice vector."""

    isotropic = "isotropic"
    full = "full"


@dataclass(frozen=True, kw_only=True)
class RelaxConfig:
    """A relaxation.

    Attributes:
        fmax: stop when no atom's force is larger, eV/A; with `cell`, nor the generalised forces on the cell.
        steps: stop after so many steps at the latest.
        optimizer: `fire`, `bfgs` or `lbfgs`.
        cell: relax the lattice vectors as well (ASE's FrechetCellFilter); all three directions must be periodic.
        pressure_GPa: external pressure on the cell, GPa, compression positive; needs `cell`.
    """

    fmax: float = 0.01
    steps: int = 500
    optimizer: Optimizer = Optimizer.fire
    cell: bool = False
    pressure_GPa: float = 0.0

    def __post_init__(self) -> None:
        if not (self.fmax > 0.0 and self.steps > 0):
            raise ValueError(f"--fmax is {self.fmax} eV/A and --steps {self.steps}: both must be positive")
        if self.pressure_GPa != 0.0 and not self.cell:
            raise ValueError(f"--pressure_GPa is {self.pressure_GPa}: it acts on the cell; give --cell as well")


_ONLY_FOR = {
    "friction_per_ps": Ensemble.nvt,
    "pressure_GPa": Ensemble.npt,
    "barostat": Ensemble.npt,
    "thermostat_fs": Ensemble.npt,
    "barostat_fs": Ensemble.npt,
}
"""Options that act in one ensemble; elsewhere they are refused rather than ignored."""


@dataclass(frozen=True, kw_only=True)
class MDConfig:
    """A molecular dynamics run.

    Attributes:
        ensemble: `nve` (velocity Verlet), `nvt` (Langevin) or `npt` (Martyna-Tobias-Klein with Nose-Hoover chains).
        temperature_K: of the bath, and of the velocities drawn at the start, K.
        timestep_fs: time step, fs.
        steps: number of steps.
        friction_per_ps: nvt: coupling to the bath, 1/ps. The centre of mass diffuses, as in exact Langevin dynamics.
        pressure_GPa: npt: external pressure, GPa, compression positive.
        barostat: npt: `isotropic` changes the volume alone, `full` every lattice vector.
        thermostat_fs: npt: period of the thermostat, fs.
        barostat_fs: npt: period of the barostat, fs.
        save_interval: steps between frames of the trajectory and lines of the log.
        keep_velocities: start with the velocities in the file instead of drawing them; temperature_K and seed are then
            refused where nothing else needs them.
        seed: of the velocities drawn at the start and of the Langevin noise.
    """

    ensemble: Ensemble = Ensemble.nve
    temperature_K: float = 300.0
    timestep_fs: float = 1.0
    steps: int = 1000
    friction_per_ps: float = 10.0
    pressure_GPa: float = 0.0
    barostat: Barostat = Barostat.isotropic
    thermostat_fs: float = 100.0
    barostat_fs: float = 1000.0
    save_interval: int = 10
    keep_velocities: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("timestep_fs", "steps", "friction_per_ps", "thermostat_fs", "barostat_fs", "save_interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be positive")
        for field in fields(self):
            only = _ONLY_FOR.get(field.name, self.ensemble)
            if only is not self.ensemble and getattr(self, field.name) != field.default:
                raise ValueError(f"--{field.name} acts in {only.value} only, and --ensemble is {self.ensemble.value}")
        if self.keep_velocities:
            # None are drawn: what is left for these two is the bath, and the noise of Langevin dynamics.
            idle = {"temperature_K": self.ensemble is Ensemble.nve, "seed": self.ensemble is not Ensemble.nvt}
            for field in fields(self):
                if idle.get(field.name) and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"--{field.name} does nothing in {self.ensemble.value} with --keep_velocities: leave one away"
                    )
        lowest = 1e-3 if self.ensemble is Ensemble.npt else 0.0
        if not self.temperature_K >= lowest:
            raise ValueError(
                f"--temperature_K is {self.temperature_K}: {self.ensemble.value} needs at least {lowest} K"
            )
