"""`janus-matris md`: molecular dynamics."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from matris.cli.simulation import add_common_options, output_of, parse_options, read_atoms
from matris.simulation_config import MDConfig


def main(arguments: list[str]) -> int:
    """Exit status 0; the results are in the output directory."""
    parser = ArgumentParser(
        prog="janus-matris md", description="Molecular dynamics: NVE, Langevin NVT, NPT.", exit_on_error=False
    )
    add_common_options(parser, dtype="float32")
    parser.add_argument(
        "--keep_velocities", action="store_true", help="start with the velocities in the file instead of drawing them"
    )
    names = parser.add_class_arguments(MDConfig, skip={"keep_velocities"})
    options = parse_options(parser, arguments)
    config = MDConfig(keep_velocities=options.keep_velocities, **{name: options[name] for name in names})

    from matris.ase_files import output_directory
    from matris.md import run_md

    atoms, output = read_atoms(options), output_of(options, "md")
    with output_directory(output, overwrite=options.overwrite) as directory:
        summary = run_md(atoms, config, directory=directory)
    print(
        f"{summary.steps} steps of {summary.timestep_fs} fs, {summary.steps_per_second:.2f} steps/s: "
        f"temperature {summary.temperature_mean_K:.1f} +- {summary.temperature_std_K:.1f} K"
    )
    if summary.energy_drift_meV_per_atom_per_ps is not None:
        print(
            f"energy drift {summary.energy_drift_meV_per_atom_per_ps:+.4f} meV/atom/ps, "
            f"fluctuation {summary.energy_fluctuation_meV_per_atom:.4f} meV/atom"
        )
    print(f"written: {output}")
    return 0
