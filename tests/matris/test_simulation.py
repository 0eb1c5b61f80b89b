"""Relaxation and molecular dynamics, as functions and as verbs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.io import read, write

from matris.ase_files import output_directory, read_structure
from matris.cli import main
from matris.md import fit_drift, run_md
from matris.relax import relax
from matris.simulation_config import Barostat, Ensemble, MDConfig, Optimizer, RelaxConfig

FILES = {"trajectory.traj", "log.txt", "final.extxyz", "summary.json"}


@pytest.fixture
def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    return atoms


@pytest.fixture
def structure_file(tmp_path: Path) -> Path:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    write(tmp_path / "cu.extxyz", atoms)
    return tmp_path / "cu.extxyz"


def test_relax(copper: Atoms, tmp_path: Path) -> None:
    summary = relax(copper, RelaxConfig(fmax=0.01), directory=tmp_path)
    assert summary.converged
    assert summary.max_force_eV_per_A < 0.01
    assert np.abs(copper.get_forces()).max() < 0.01
    assert {path.name for path in tmp_path.iterdir()} == FILES
    frames = read(tmp_path / "trajectory.traj", ":")
    assert frames[0].get_potential_energy() == pytest.approx(summary.initial_energy_eV)
    assert frames[-1].get_potential_energy() == pytest.approx(summary.final_energy_eV)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == summary.steps == len(frames) - 1
    assert read(tmp_path / "final.extxyz").positions == pytest.approx(copper.positions, abs=1e-7)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_relax_cell_under_pressure(tmp_path: Path, optimizer: Optimizer) -> None:
    atoms = bulk("Cu", a=3.7)
    atoms.calc = EMT()
    config = RelaxConfig(cell=True, pressure_GPa=5.0, fmax=1e-3, optimizer=optimizer)
    summary = relax(atoms, config, directory=tmp_path)
    assert summary.converged
    assert summary.final_pressure_GPa == pytest.approx(5.0, abs=0.1)
    assert summary.final_volume_A3 < summary.initial_volume_A3


def test_relax_reports_what_did_not_converge(copper: Atoms, tmp_path: Path) -> None:
    summary = relax(copper, RelaxConfig(steps=2, fmax=1e-6), directory=tmp_path)
    assert not summary.converged
    assert summary.steps == 2


def test_drift_is_the_slope_of_the_energy() -> None:
    times = np.linspace(0.0, 2.0, 101)
    drift, fluctuation = fit_drift(times, -1e4 + 0.25 * times + 0.01 * np.sin(200.0 * np.pi * times))
    assert drift == pytest.approx(0.25, abs=0.01)
    assert fluctuation < 0.01


def test_nve_conserves_energy(copper: Atoms, tmp_path: Path) -> None:
    summary = run_md(copper, MDConfig(timestep_fs=2.0, steps=100, save_interval=25), directory=tmp_path)
    assert abs(summary.energy_drift_meV_per_atom_per_ps) < 5.0
    assert summary.total_energy_last_eV == pytest.approx(summary.total_energy_first_eV, abs=0.02)
    assert len(read(tmp_path / "trajectory.traj", ":")) == 5
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 6
    assert read(tmp_path / "final.extxyz").get_momenta() == pytest.approx(copper.get_momenta(), abs=1e-6)


def test_drift_is_seen(copper: Atoms, tmp_path: Path) -> None:
    """Forces that do not belong to the energy heat or cool the system."""

    class Leaky(EMT):
        def calculate(self, *args: object, **named: object) -> None:
            super().calculate(*args, **named)
            self.results["forces"] = self.results["forces"] + 0.5 * self.atoms.get_velocities()

    copper.calc = Leaky()
    summary = run_md(copper, MDConfig(timestep_fs=2.0, steps=100), directory=tmp_path)
    assert summary.energy_drift_meV_per_atom_per_ps > 5.0


def test_nvt_reaches_the_temperature(copper: Atoms, tmp_path: Path) -> None:
    config = MDConfig(ensemble=Ensemble.nvt, temperature_K=600.0, steps=300, timestep_fs=3.0, friction_per_ps=50.0)
    summary = run_md(copper, config, directory=tmp_path)
    assert summary.temperature_mean_K == pytest.approx(600.0, rel=0.25)
    assert summary.energy_drift_meV_per_atom_per_ps is None


@pytest.mark.parametrize("barostat", Barostat)
def test_npt_moves_the_cell_towards_the_pressure(copper: Atoms, tmp_path: Path, barostat: Barostat) -> None:
    start = copper.cell.volume
    config = MDConfig(
        ensemble=Ensemble.npt, pressure_GPa=20.0, barostat=barostat, steps=150, timestep_fs=3.0, barostat_fs=200.0
    )
    summary = run_md(copper, config, directory=tmp_path)
    assert summary.volume_mean_A3 < 0.99 * start
    sheared = copper.cell.angles() != pytest.approx(90.0, abs=1e-6)
    assert sheared is (barostat is Barostat.full)


def test_same_seed_same_run(copper: Atoms, tmp_path: Path) -> None:
    config = MDConfig(ensemble=Ensemble.nvt, steps=5, seed=7)
    ends = []
    for name in ("a", "b"):
        atoms = copper.copy()
        atoms.calc = EMT()
        (tmp_path / name).mkdir()
        run_md(atoms, config, directory=tmp_path / name)
        ends.append(atoms.positions)
    assert np.array_equal(*ends)


def test_velocities_are_kept(copper: Atoms, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no velocities"):
        run_md(copper, MDConfig(keep_velocities=True, steps=1), directory=tmp_path)
    copper.set_velocities(np.full((len(copper), 3), 0.001))
    run_md(copper, MDConfig(keep_velocities=True, steps=1), directory=tmp_path)
    first = read(tmp_path / "trajectory.traj", 0)
    assert first.get_velocities() == pytest.approx(0.001)


def test_a_run_that_blows_up_is_told(copper: Atoms, tmp_path: Path) -> None:
    class Broken(EMT):
        def calculate(self, *args: object, **named: object) -> None:
            super().calculate(*args, **named)
            self.results["energy"] = np.nan

    copper.calc = Broken()
    with pytest.raises(ValueError, match="step 0.*blew up"):
        run_md(copper, MDConfig(steps=2), directory=tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timestep_fs": 0.0}, "timestep_fs"),
        ({"steps": -1}, "steps"),
        ({"temperature_K": -5.0}, "temperature_K"),
        ({"temperature_K": float("nan")}, "temperature_K"),
        ({"pressure_GPa": 1.0}, "acts in npt only"),
        ({"friction_per_ps": 1.0}, "acts in nvt only"),
        ({"keep_velocities": True, "temperature_K": 900.0}, "temperature_K does nothing in nve"),
        ({"keep_velocities": True, "seed": 1}, "seed does nothing in nve"),
        ({"keep_velocities": True, "seed": 1, "ensemble": Ensemble.npt}, "seed does nothing in npt"),
    ],
)
def test_md_options_are_checked(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MDConfig(**values)


def test_kept_velocities_leave_what_acts() -> None:
    MDConfig(ensemble=Ensemble.nvt, keep_velocities=True, temperature_K=900.0, seed=1)
    MDConfig(ensemble=Ensemble.npt, keep_velocities=True, temperature_K=900.0)


def test_relax_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fmax"):
        RelaxConfig(fmax=0.0)
    with pytest.raises(ValueError, match="give --cell"):
        RelaxConfig(pressure_GPa=1.0)
    water = molecule("H2O")
    water.calc = EMT()
    with pytest.raises(ValueError, match="all three are periodic"):
        relax(water, RelaxConfig(cell=True), directory=tmp_path)


def test_npt_needs_a_periodic_free_structure(copper: Atoms, tmp_path: Path) -> None:
    config = MDConfig(ensemble=Ensemble.npt, steps=1)
    copper.set_constraint(FixAtoms([0]))
    with pytest.raises(ValueError, match="1 constraints"):
        run_md(copper, config, directory=tmp_path)
    copper.set_constraint()
    copper.pbc = (True, True, False)
    with pytest.raises(ValueError, match="three periodic directions"):
        run_md(copper, config, directory=tmp_path)


def test_time_step_unit(tmp_path: Path) -> None:
    """A free atom flies velocity times time."""
    atoms = Atoms("Ar", velocities=[[0.01, 0.0, 0.0]])
    atoms.calc = LennardJones()
    run_md(atoms, MDConfig(keep_velocities=True, steps=10, timestep_fs=2.0), directory=tmp_path)
    assert atoms.positions[0, 0] == pytest.approx(0.01 * 20.0 * units.fs)


def test_output_directory_is_whole_or_partial(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with output_directory(target, overwrite=False) as directory:
        (directory / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    with pytest.raises(ValueError, match="--overwrite"), output_directory(target, overwrite=False):
        pass
    (target / "other").write_text("kept")
    with output_directory(target, overwrite=True) as directory:
        (directory / "a").write_text("newer")
        assert (target / "a").read_text() == "new"
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "newer", "other": "kept"}
    with pytest.raises(RuntimeError), output_directory(tmp_path / "b", overwrite=False) as directory:
        raise RuntimeError

    def write_and_fail(directory: Path) -> None:
        (directory / "a").write_text("so far")
        raise RuntimeError

    with pytest.raises(RuntimeError), output_directory(tmp_path / "c", overwrite=False) as directory:
        write_and_fail(directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.partial", "deep"]


def test_read_structure(tmp_path: Path) -> None:
    write(tmp_path / "two.extxyz", [Atoms("H"), Atoms("He")])
    assert read_structure(tmp_path / "two.extxyz").symbols[0] == "He"
    assert read_structure(tmp_path / "two.extxyz", 0).symbols[0] == "H"
    assert read_structure(tmp_path / "two.extxyz", -2).symbols[0] == "H"
    with pytest.raises(OSError, match="no structure file"):
        read_structure(tmp_path / "none.extxyz")


@pytest.mark.parametrize("name", ["two.extxyz", "two.xyz", "two.traj", "two.cif"])
@pytest.mark.parametrize("index", [2, 5, -3, -5])
def test_structures_that_a_file_lacks_are_refused(tmp_path: Path, name: str, index: int) -> None:
    write(tmp_path / name, [bulk("Cu"), bulk("Au")])
    assert read_structure(tmp_path / name, -1).symbols[0] == "Au"
    with pytest.raises(ValueError, match=rf"{name} has no structure {index}"):
        read_structure(tmp_path / name, index)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.traj", b"junk", "cannot read it as traj.*ULM"),
        ("x.cif", b"junk", "cannot read it as cif.*AssertionError"),
        ("x.cif", b"\x00\xff", "cannot read it as cif"),
        ("x.cif", b"data_x\n_cell_length_a 3.0\n", "finds no complete structure in it, read as cif"),
        ("POSCAR", b"junk", "cannot read it as vasp"),
        ("x.extxyz", b"", "does not recognise its format"),
        ("x.unknown", b"junk", "does not recognise its format"),
    ],
)
def test_unreadable_structures_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: ASE {message}"):
        read_structure(tmp_path / name)


@pytest.mark.parametrize("verb", ["relax", "md"])
def test_options_of_the_wrong_kind(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--steps", "x"], ["--pressure_GPa", "nan"], ["--no_such_option", "1"]):
        assert main([verb, "x.cif", "--model", "m", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"janus-matris {verb}: error: ")
        assert error.count("\n") == 1
        assert options[0].strip("-") in error
        assert "<class" not in error


@pytest.mark.parametrize("verb", ["relax", "md"])
def test_help_names_no_classes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "<class" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["relax", "--steps", "3", "--fmax", "1e-9"], "NOT converged in 3 steps"),
        (["relax", "--cell", "--fmax", "100"], "converged in 0 steps"),
        (["md", "--steps", "3"], "energy drift"),
        (["md", "--steps", "3", "--ensemble", "nvt", "--temperature-K", "50"], "3 steps of 1.0 fs"),
        (["md", "--steps", "3", "--ensemble", "npt", "--dtype", "float64"], "3 steps of 1.0 fs"),
    ],
)
def test_verbs(
    structure_file: Path,
    tiny_model_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    verb, *options = arguments
    output = tmp_path / "out"
    command = [verb, str(structure_file), "--model", str(tiny_model_directory), "--output", str(output), *options]
    status = main(command)
    captured = capsys.readouterr()
    assert status == (1 if "NOT" in words else 0), captured.err
    assert words in captured.out
    assert {path.name for path in output.iterdir()} == FILES
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["relax", "md"])
@pytest.mark.parametrize("wrong", ["structure", "model", "output", "task"])
def test_verbs_bad_input(
    structure_file: Path,
    tiny_model_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    wrong: str,
) -> None:
    blocked = structure_file / "out"  # below a file: cannot be made, even by root
    command = [
        verb,
        str(tmp_path / "none.xyz" if wrong == "structure" else structure_file),
        *("--model", str(tmp_path / "none" if wrong == "model" else tiny_model_directory)),
        *("--output", str(blocked if wrong == "output" else tmp_path / "out")),
        *(("--task", "unknown") if wrong == "task" else ()),
    ]
    before = sorted(tmp_path.iterdir())
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"janus-matris {verb}: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
