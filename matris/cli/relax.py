"""`janus-matris relax`: relax a structure."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from matris.cli.simulation import add_common_options, output_of, parse_options, read_atoms
from matris.simulation_config import RelaxConfig


def main(arguments: list[str]) -> int:
    """Exit status 0, or 1 if the steps did not suffice (the results are written all the same)."""
    parser = ArgumentParser(
        prog="janus-matris relax",
        description="Relax a structure, with or without its cell, to the nearest minimum.",
        exit_on_error=False,
    )
    add_common_options(parser, dtype="float64")
    parser.add_argument("--cell", action="store_true", help="relax the lattice vectors as well (FrechetCellFilter)")
    names = parser.add_class_arguments(RelaxConfig, skip={"cell"})
    options = parse_options(parser, arguments)
    config = RelaxConfig(cell=options.cell, **{name: options[name] for name in names})

    from matris.ase_files import output_directory
    from matris.relax import relax

    atoms, output = read_atoms(options), output_of(options, "relax")
    with output_directory(output, overwrite=options.overwrite) as directory:
        summary = relax(atoms, config, directory=directory)
    state = "converged" if summary.converged else "NOT converged"
    print(
        f"{state} in {summary.steps} steps: energy {summary.final_energy_eV:.6f} eV "
        f"(change {summary.final_energy_eV - summary.initial_energy_eV:+.6f}), "
        f"largest force {summary.max_force_eV_per_A:.5f} eV/A"
    )
    if summary.final_volume_A3 is not None:
        print(
            f"volume {summary.final_volume_A3:.4f} A^3 (was {summary.initial_volume_A3:.4f}), "
            f"pressure {summary.final_pressure_GPa:+.4f} GPa"
        )
    print(f"written: {output}")
    return 0 if summary.converged else 1
