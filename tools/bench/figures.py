"""A picture of reports of tools/bench/step.py: how many times as fast as the reference, with which share of its memory.

    python -m tools.bench.figures step.json step_216_atoms.json --output docs/figures/step.png

All systems of all reports stand side by side, with a bar for each variant; the goals are lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from matris.writable import writable_file
from tools.bench.report import BenchHelp, run

PANELS = (("faster", 4.0, "times as fast as the reference"), ("memory", 0.3, "share of the reference's peak memory"))
"""Ratio in a report, its goal, and what it is."""


def main(words: list[str] | None = None) -> int:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files of tools.bench.step")
    parser.add_argument("--output", type=writable_file, required=True, metavar="PATH", help="PNG to write")
    options = parser.parse_args(words)
    plot_steps([system for path in options.reports for system in read_systems(path)], options.output)
    return 0


def read_systems(path: Path) -> list[dict[str, Any]]:
    """Entries of a report of `tools.bench.step`, one for each system, in which the reference was timed.

    Raises:
        ValueError: the file is not such a report, or ours was timed alone.
    """
    try:
        report = json.loads(path.read_text())
        systems = [_read_system(entry) for entry in report["systems"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a report of step times: expected what `python -m tools.bench.step --output` writes, "
            "without --largest"
        ) from error
    if not systems or any("reference" not in entry["sides"] or len(entry["sides"]) < 2 for entry in systems):
        raise ValueError(f"{path} has no times of the reference and ours: make it with --reference_python")
    return systems


def _read_system(entry: dict[str, Any]) -> dict[str, Any]:
    """What is drawn of an entry."""
    sides = {side: {ratio: float(facts[ratio]) for ratio, *_ in PANELS} for side, facts in entry["sides"].items()}
    counts = {name: int(entry[name]) for name in ("num_atoms", "num_angles")}
    return {"system": str(entry["system"]), **counts, "sides": sides}


def plot_steps(systems: list[dict[str, Any]], output: Path) -> None:
    """Two panels, each with a group of bars for a system (an entry of `read_systems`), written as PNG."""
    variants = list(dict.fromkeys(side for entry in systems for side in entry["sides"] if side != "reference"))
    labels = [
        f"{entry['system']}\n{entry['num_atoms']} atoms\n{entry['num_angles'] / 1000:.3g}k angles" for entry in systems
    ]
    width = 0.8 / len(variants)
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    for panel, (ratio, goal, what) in enumerate(PANELS):
        axes = figure.add_subplot(1, 2, panel + 1)
        for index, variant in enumerate(variants):
            shown = [number for number, entry in enumerate(systems) if variant in entry["sides"]]
            bars = axes.bar(
                [number + (index + 0.5) * width - 0.4 for number in shown],
                [systems[number]["sides"][variant][ratio] for number in shown],
                width,
                color=f"C{index}",
                label=f"ours, {variant}",
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(goal, color="0.3", linestyle="--", linewidth=1.0, label=f"goal, {goal:g}")
        axes.set_xticks(range(len(systems)), labels, fontsize=8)
        axes.margins(y=0.2)  # room for the legend
        axes.set_title(what, fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    sys.exit(run(main))
