"""Pictures of a run: learning curves and parity plots, as PNG. Uses no global state of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter

from janus.telemetry.csv_log import read_csv
from matris.elements import SYMBOLS
from matris.units import GPA, MILLI

_CURVES = (
    ("loss", "loss"),
    ("energy_mae_meV_per_atom", "energy MAE (meV/atom)"),
    ("forces_mae_meV_per_A", "force MAE (meV/A)"),
    ("stress_mae_meV_per_A3", "stress MAE (meV/A$^3$)"),
    ("magmoms_mae_muB", "magnetic moment MAE ($\\mu_B$)"),
)

_PARITIES = (
    # quantity, what, unit of the axes, factor, name and unit of the errors
    ("energy", "energy above references", "eV/atom", 1.0, "meV_per_atom", "meV/atom"),
    ("forces", "force components", "eV/A", 1.0, "meV_per_A", "meV/A"),
    ("stress", "stress components", "GPa", 1.0 / GPA, "GPa", "GPa"),
    ("magmoms", "magnetic moments", "$\\mu_B$", 1.0, "muB", "muB"),
)


def plot_learning_curves(log: Path, output: Path) -> None:
    """Training and validation errors over updates, from a run's `log.csv`; only quantities that were logged."""
    rows = read_csv(log)
    curves = [
        (label, _series(rows, name), _series(rows, f"valid_{name}"))
        for name, label in _CURVES
        if any(name in row or f"valid_{name}" in row for row in rows)
    ]
    figure = Figure(figsize=(4.5 * max(len(curves), 1), 3.6), layout="constrained")
    for index, (label, train, valid) in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), index + 1)
        axes.plot(*train, color="0.6", linewidth=1, label="training batches")
        if len(valid[0]):
            axes.plot(*valid, color="C0", marker="o", markersize=3, label="validation, averaged weights")
        if all((series[1] > 0).all() for series in (train, valid)):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.7)))
        axes.set_xlabel("update")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if index == 0:
            axes.legend(fontsize=8)
    figure.savefig(output, dpi=120)


def plot_parity(points: Mapping[str, np.ndarray], report: Mapping[str, Any], output: Path) -> None:
    """Predictions over labels of every quantity that has labels, with the errors of `report`.

    Args:
        points: as in `evaluation.Evaluation`.
    """
    shown = [entry for entry in _PARITIES if len(points[entry[0]])]
    figure = Figure(figsize=(4.2 * max(len(shown), 1), 4.0), layout="constrained")
    for index, (quantity, what, unit, factor, error_name, error_unit) in enumerate(shown):
        labels, predictions = factor * points[quantity].T
        axes = figure.add_subplot(1, len(shown), index + 1)
        low, high = min(labels.min(), predictions.min()), max(labels.max(), predictions.max())
        margin = 0.03 * (high - low) or 1.0 / MILLI
        limits = (low - margin, high + margin)
        axes.plot(limits, limits, color="0.6", linewidth=1)
        axes.plot(labels, predictions, ".", markersize=3, alpha=0.4, rasterized=True)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"label ({unit})", ylabel=f"prediction ({unit})")
        mae, rmse = (report[f"{quantity}_{kind}_{error_name}"] for kind in ("mae", "rmse"))
        axes.set_title(f"{what}\nMAE {mae:.4g}, RMSE {rmse:.4g} {error_unit}", fontsize=9)
    figure.savefig(output, dpi=120)


def _series(rows: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the value."""
    pairs = np.array([(row["step"], row[name]) for row in rows if name in row]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def plot_experts(sites: Mapping[str, tuple[np.ndarray, np.ndarray]], elements: Sequence[int], output: Path) -> None:
    """A periodic table for each site with routed experts: number and colour tell the expert with the largest gate,
    opacity how large that is. Elements that the model was not trained on stay empty.

    Args:
        sites: by name, the experts (num_elements, topk) of Z = 1, 2, ... and their gates, largest first.
        elements: atomic numbers that the model was trained on.
    """
    num_experts = 1 + max(int(experts.max()) for experts, _ in sites.values())
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, num_experts))
    columns = min(2, len(sites))
    rows = -(-len(sites) // columns)
    figure = Figure(figsize=(9.0 * columns, 5.0 * rows), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, (name, (experts, gates)) in zip(panels, sites.items(), strict=False):
        panel.set_title(name)
        for number in range(1, len(experts) + 1):
            column, row = _place(number)
            known = number in elements
            expert, gate = int(experts[number - 1, 0]), float(gates[number - 1, 0])
            face = (*colours[expert][:3], gate) if known else "white"
            panel.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="0.7", linewidth=0.5))
            panel.text(column + 0.5, row + 0.35, SYMBOLS[number], ha="center", va="center", fontsize=8)
            if known:
                panel.text(column + 0.5, row + 0.75, str(expert), ha="center", va="center", fontsize=6)
        panel.set(xlim=(-0.1, 18.1), ylim=(9.7, -0.1), aspect="equal")
    for panel in panels:
        panel.axis("off")
    figure.savefig(output, dpi=120)


_NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)


def _place(number: int) -> tuple[int, float]:
    """Column and row of an element in the periodic table; lanthanides and actinides lie below it."""
    for first, row in ((57, 7.6), (89, 8.6)):
        if first <= number < first + 15:
            return 2 + number - first, row
    period = int(np.searchsorted(_NOBLE, number)) - 1
    from_left = number - _NOBLE[period] - 1
    in_s_block = from_left < (1 if period == 0 else 2)
    return from_left if in_s_block else 17 + number - _NOBLE[period + 1], period
