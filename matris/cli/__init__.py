"""The command `janus-matris`: finds the verb and imports its module alone, so that help is quick.

A verb's module has `main(arguments: list[str]) -> int`, imports nothing heavy at its top, raises ValueError or
OSError for what a user did wrong, and returns the exit status. Option names arrive with `_` for `-`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from janus import __version__

# verb: (module, one line)
VERBS = {
    "prepare": ("matris.cli.prepare", "structures and labels from any file into an HDF5 store"),
    "doctor": ("matris.cli.doctor", "look for what is wrong with a data set; suggest batch budgets"),
    "plan": ("matris.cli.plan", "memory, traffic and time of a layout of ranks, predicted; find the best one"),
    "train": ("matris.cli.train", "train or fine-tune a model"),
    "verify": ("matris.cli.verify", "whether layouts of ranks give the numbers of one process, on this machine"),
    "eval": ("matris.cli.evaluate", "errors of a model on labelled structures"),
    "convert": (
        "matris.cli.convert",
        "weights from one format into another: models, checkpoints, reference package, Megatron",
    ),
    "relax": ("matris.cli.relax", "relax a structure, with or without its cell"),
    "md": ("matris.cli.md", "molecular dynamics: NVE, NVT, NPT"),
    "info": ("matris.cli.info", "parameters, hyper-parameters, elements and provenance of a model"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status 0, 2 for a user's mistake, 130 after Ctrl-C, or what the verb returns."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("JANUS_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    if not debug:
        # One message for a lost rank: torch's C++ code, which reads this when it is imported, would add a stack.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = _run(given)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"janus-matris {given[0]}: error: {_message(error)}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if given else 2
    verb, *rest = given
    if verb == "--version":
        print(f"janus-matris {__version__}")
        return 0
    if verb not in VERBS:
        print(f"janus-matris: error: no verb {verb!r}; one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(VERBS[verb][0]).main(normalise_option_names(rest)) or 0)


def normalise_option_names(arguments: Sequence[str]) -> list[str]:
    """`--dry-run` to `--dry_run`, `--data.max-atoms=5` to `--data.max_atoms=5`; values, and all after `--`, stay."""
    names: list[str] = []
    for position, word in enumerate(arguments):
        if word == "--":
            return names + list(arguments[position:])
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
        names.append(word)
    return names


def _help() -> str:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return (
        "usage: janus-matris VERB [OPTIONS]\n\n"
        "Train and use the MatRIS interatomic potential.\n"
        "Units: eV, Angstrom, eV/A, stress eV/A^3 (tensile positive), Bohr magneton.\n\n"
        f"{lines}\n\n"
        "janus-matris VERB --help   options of a verb, with units and defaults\n"
        "janus-matris --version\n"
        "--debug, or JANUS_DEBUG=1  a traceback instead of a one-line error"
    )


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__
