"""The options that say where the labels are, shared by the verbs that read files."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matris.data.labels import LabelKeys

STRESS_UNITS = ("eV/A^3", "GPa", "kbar-vasp")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def num_available_cores() -> int:
    """Cores that this process may use, which a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """--energy_key, --forces_key, --stress_key, --virials_key, --magmoms_key and --stress_unit."""
    for name, meaning, default in (
        ("energy", "total energy, eV", "the first of REF_energy, energy, the calculator's result"),
        ("forces", "forces, eV/A", "the first of REF_forces, forces, the calculator's result"),
        (
            "stress",
            "stress: 3x3, 9 or 6 values xx yy zz yz xz xy",
            "the first of REF_stress, REF_virials, REF_virial, stress, virials, virial, the calculator's stress; "
            "--virials_key turns this search off too",
        ),
        ("virials", "virials, eV (stress = -virials / volume)", "see --stress_key"),
        ("magmoms", "magnetic moments, Bohr magnetons", "the first of REF_magmoms, magmoms, the calculator's result"),
    ):
        parser.add_argument(f"--{name}_key", metavar="KEY", help=f"key of the {meaning} (default: {default})")
    parser.add_argument(
        "--stress_unit",
        choices=STRESS_UNITS,
        default="eV/A^3",
        help="of the stress in the files; eV/A^3 and GPa: tensile positive; kbar-vasp: compression positive",
    )


def worker_count(text: str) -> int:
    """The type of `--num_workers`: a whole number, not negative."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes: 0 (only this one) or more")
    return int(text)


def label_keys(options: argparse.Namespace) -> LabelKeys:
    """The keys that the parsed options name."""
    from matris.data.labels import LabelKeys, StressUnit

    return LabelKeys(
        energy=options.energy_key,
        forces=options.forces_key,
        stress=options.stress_key,
        virials=options.virials_key,
        magmoms=options.magmoms_key,
        stress_unit=StressUnit(options.stress_unit),
    )
