"""What the verbs `relax` and `md` share on the command line."""

from __future__ import annotations

import re
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from ase import Atoms


def add_common_options(parser: ArgumentParser, *, dtype: str) -> None:
    """Structure, model and output options; `dtype` is the verb's default number format."""
    parser.add_argument("structure", type=str, help="file with the structure, any format that ASE reads")
    parser.add_argument("--model", type=str, required=True, help="model directory")
    parser.add_argument("--index", type=int, default=-1, help="which structure of the file; -1 is the last")
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="directory for trajectory, log, final structure and summary; by default STRUCTURE's name and the verb's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["float32", "float64"], default=dtype, help="number format of the model")
    parser.add_argument("--task", type=str, default=None, help="level of theory, for models that know several")
    parser.add_argument("--charge", type=float, help="total charge, e; by default the structure's info entry `charge`")
    parser.add_argument("--spin", type=float, help="spin multiplicity 2S + 1; by default the info entry `spin`")


def parse_options(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parsed options; ValueError, in one line, for what is wrong with them (the parser does not exit)."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()))
        raise ValueError(f"{message} (see {parser.prog} --help)") from error


def output_of(options: Namespace, verb: str) -> Path:
    """The output directory, by default in the working directory."""
    return Path(options.output or f"{Path(options.structure).stem}-{verb}")


def read_atoms(options: Namespace) -> Atoms:
    """The structure, with the model as its calculator."""
    from matris.ase_files import read_structure
    from matris.calculator import MatRISCalculator

    atoms = read_structure(Path(options.structure), options.index)
    atoms.calc = MatRISCalculator(
        options.model, options.device, options.dtype, options.task, options.charge, options.spin
    )
    return atoms
