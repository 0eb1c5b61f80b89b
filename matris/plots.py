"""Pictures of a run: learning curves and parity plots, as PNG. Uses no global state of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from janus.telemetry.csv_log import read_csv
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
