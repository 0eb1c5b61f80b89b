"""A diagnosis as text, JSON and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from matris.data.consistency import Evidence
from matris.data.doctor import Diagnosis, describe_ranges
from matris.data.records import LABEL_NAMES
from matris.elements import SYMBOLS

INK, GRID = "#1f4e79", "#d9d9d9"


def to_text(diagnosis: Diagnosis, *, max_findings: int = 20) -> str:
    """For a terminal."""
    found = diagnosis.found
    lines = [f"structures  {found.num_frames}"]
    if diagnosis.facts is not None:
        lines.append(f"tasks       {', '.join(diagnosis.task_names)}")
        elements = ", ".join(f"{symbol} {count}" for symbol, count in _elements(diagnosis).items())
        lines.append(f"elements    {elements}  (structures with it)")
    lines += ["", "labels"]
    for name in LABEL_NAMES:
        sources = found.sources.get(name, {})
        total = sum(count for source, count in sources.items() if "put aside" not in source)
        where = ", ".join(f"{source}: {count}" for source, count in sources.items()) or "not found"
        lines.append(f"  {name:<8} {total / max(found.num_frames, 1):>5.0%}  {where}")
    lines.append(f"  keys in the data: {', '.join(found.keys) or 'none'}")
    ranges = describe_ranges(diagnosis)
    if ranges:
        lines += ["", f"{'':<18} {'':<9} {'smallest':>12} {'median':>12} {'largest':>12}"]
        lines += [f"{name:<18} {unit:<9} {a:>12.5g} {b:>12.5g} {c:>12.5g}" for name, unit, a, b, c in ranges]
    for label, evidence in (("forces", diagnosis.forces), ("stress", diagnosis.stress)):
        if evidence is not None:
            lines += ["", f"{label} against energies: {evidence.verdict.value}", f"  {evidence.text}"]
    if diagnosis.budgets is not None:
        atoms, edges, angles = diagnosis.budgets
        lines += [
            "",
            "suggested budgets of a micro-batch (about 16 average structures, and the largest fits):",
            f"  --data.max_atoms {atoms} --data.max_edges {edges} --data.max_angles {angles}",
        ]
    lines.append("")
    for finding in diagnosis.findings[:max_findings]:
        lines.append(f"{finding.severity.value.upper():<8} {finding.text}")
    if len(diagnosis.findings) > max_findings:
        lines.append(f"... and {len(diagnosis.findings) - max_findings} more")
    if not diagnosis.findings:
        lines.append("nothing wrong found")
    return "\n".join(lines)


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The same, for programs."""
    budgets = diagnosis.budgets
    return {
        "num_structures": diagnosis.found.num_frames,
        "task_names": list(diagnosis.task_names),
        "elements": _elements(diagnosis),
        "labels": diagnosis.found.sources,
        "keys": list(diagnosis.found.keys),
        "ranges": [
            {"quantity": name, "unit": unit, "min": low, "median": middle, "max": high}
            for name, unit, low, middle, high in describe_ranges(diagnosis)
        ],
        "forces_consistency": _evidence(diagnosis.forces),
        "stress_consistency": _evidence(diagnosis.stress),
        "histograms": {
            name: _histogram(diagnosis.sizes[:, column]) for column, name in enumerate(("atoms", "edges", "angles"))
        },
        "suggested_budgets": budgets and dict(zip(("max_atoms", "max_edges", "max_angles"), budgets, strict=True)),
        "findings": [{"severity": finding.severity.value, "text": finding.text} for finding in diagnosis.findings],
        "fatal": diagnosis.fatal,
    }


def draw(diagnosis: Diagnosis, folder: Path | str) -> list[Path]:
    """Write `sizes.png`, `labels.png` and, where there are pairs, `consistency.png`."""
    if diagnosis.facts is None:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = diagnosis.facts
    pictures = {
        "sizes.png": [
            (diagnosis.sizes[:, column].astype(float), f"{name} per structure", False)
            for column, name in enumerate(("atoms", "edges", "angles"))
        ],
        "labels.png": [
            (facts.energy_per_atom, "energy, eV/atom", True),
            (facts.max_force, "largest force, eV/A", True),
            (facts.pressure, "pressure, eV/A^3", True),
            (np.where(np.isinf(facts.shortest), np.nan, facts.shortest), "shortest distance, A", True),
        ],
    }
    written = []
    for name, panels in pictures.items():
        figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="constrained")
        for axes, (values, label, logarithmic) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            known = values[np.isfinite(values)]
            if len(known):
                axes.hist(known, bins=40, color=INK, log=logarithmic)
            else:
                axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
            axes.set_xlabel(label)
            axes.set_ylabel("structures")
            axes.grid(color=GRID, linewidth=0.5)
            axes.set_axisbelow(True)
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)
    pairs = diagnosis.pairs
    if pairs is not None and len(pairs.difference):
        figure = Figure(figsize=(3.8, 3.6), layout="constrained")
        axes = figure.subplots()
        predicted = 1000.0 * (pairs.from_forces + pairs.from_stress)
        axes.scatter(predicted, 1000.0 * pairs.difference, s=6, color=INK, alpha=0.5)
        axes.axline((0.0, 0.0), slope=1.0, color="black", linewidth=0.8)
        axes.set_xlabel("predicted from forces and stress, meV/atom")
        axes.set_ylabel("energy difference, meV/atom")
        axes.set_title("pairs of similar structures", fontsize=10)
        axes.grid(color=GRID, linewidth=0.5)
        figure.savefig(folder / "consistency.png", dpi=120)
        written.append(folder / "consistency.png")
    return written


def _elements(diagnosis: Diagnosis) -> dict[str, int]:
    """Structures that contain each element."""
    if diagnosis.facts is None:
        return {}
    counts = (diagnosis.facts.elements > 0).sum(axis=0)
    return {SYMBOLS[number]: int(counts[number]) for number in np.nonzero(counts)[0]}


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    if not len(values):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(values, bins=20)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _evidence(evidence: Evidence | None) -> dict[str, Any] | None:
    return None if evidence is None else {**asdict(evidence), "verdict": evidence.verdict.value}
