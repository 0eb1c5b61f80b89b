"""What a benchmark leaves: JSON, which names the machine and the versions that its numbers belong to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from matris.writable import writable_file

PACKAGES = ("torch", "numpy", "ase", "h5py", "megatron-core")


class BenchHelp(argparse.RawDescriptionHelpFormatter):
    """`formatter_class` of every benchmark: its description as written, and behind each option's text its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # argparse's own formatter of defaults also names None and False, and lists as Python writes them.
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return action.help
        words = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, words))})"


def add_output(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The option `--output`, refused before the work where its directory is missing."""
    parser.add_argument("--output", type=writable_file, required=required, metavar="PATH", help="JSON file to write")


def at_least(smallest: int) -> Callable[[str], int]:
    """For a number on the command line."""

    def number(word: str) -> int:
        if (value := int(word)) < smallest:
            raise argparse.ArgumentTypeError(f"{word} is less than {smallest}")
        return value

    return number


def run(main: Callable[[], int]) -> int:
    """Exit status of a benchmark; a user's mistake is told in a line."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Writes it in one piece, with this machine and its versions where it does not say them; no path, no file."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"machine": machine(), "versions": versions()} | report, indent=1) + "\n")
    os.replace(partial, path)


def machine() -> dict[str, Any]:
    """Name of the processor and number of CPUs."""
    names = []
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor() or platform.machine(), "cpus": os.cpu_count()}


def versions() -> dict[str, str]:
    """Of Python and the packages that figures depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
