"""What a record costs, as a linear function of its sizes: by formula, or fitted to measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Cost of a micro-batch: a constant, and a part for each unit of its sizes. Any unit of cost.

    Attributes:
        constant: of a micro-batch, whatever is in it; at least 0.
        weights: one per column of the sizes, at least 0, not all of them 0.
    """

    constant: float
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        values = np.array([self.constant, *self.weights])
        if not (np.isfinite(values).all() and (values >= 0.0).all() and values[1:].any()):
            raise ValueError(
                f"cost model with constant {self.constant} and weights {self.weights}: they must be finite, at least "
                "0, and one of the weights positive"
            )

    def of_records(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) what each of the records (n, columns) adds to a micro-batch; positive, if any is."""
        cost = sizes @ np.array(self.weights)
        # Records that cost nothing would all go to one rank.
        return np.maximum(cost, 1e-6 * cost.max(initial=0.0))

    def of_batches(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) of micro-batches whose sizes sum to (n, columns)."""
        return self.constant + sizes @ np.array(self.weights)


def fit_cost(sizes: np.ndarray, cost: np.ndarray) -> tuple[CostModel, float] | None:
    """The model with the smallest relative squared error among those without negative coefficients.

    Args:
        sizes: (n, columns) of micro-batches.
        cost: (n,) measured, positive.

    Returns:
        the model, and the root mean square of its relative errors; None if no size explains anything.
    """
    rows = np.column_stack([np.ones(len(sizes)), sizes]) / cost[:, None]
    # Columns of like size, so that the least-squares solver's cut-off treats them alike.
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    best: tuple[float, np.ndarray] | None = None
    for subset in _subsets(rows.shape[1]):
        solution = np.linalg.lstsq(rows[:, subset] / scale[subset], np.ones(len(rows)), rcond=None)[0]
        if (solution <= 0.0).any():
            continue  # a smaller subset is better then, or as good
        error = float(np.sqrt(np.mean((rows[:, subset] / scale[subset] @ solution - 1.0) ** 2)))
        if best is None or error < best[0] - 1e-12:
            coefficients = np.zeros(rows.shape[1])
            coefficients[subset] = solution / scale[subset]
            best = error, coefficients
    if best is None:
        return None
    constant, *weights = best[1].tolist()
    return CostModel(constant=constant, weights=tuple(weights)), best[0]


def _subsets(columns: int) -> Sequence[list[int]]:
    """Of the coefficients, those with a size: there are few, so all are tried."""
    return [
        list(chosen)
        for count in range(1, columns + 1)
        for chosen in combinations(range(columns), count)
        if chosen != (0,)
    ]
