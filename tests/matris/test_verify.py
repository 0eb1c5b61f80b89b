"""How measurements are compared."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from matris.config import LossConfig
from matris.layouts import Layout
from matris.verify import Measurement, Row, find_unchecked, largest_error, only


def test_errors_are_relative_to_the_largest_value_of_a_tensor() -> None:
    expected = {"a": torch.tensor([1.0, -10.0]), "b": torch.tensor([0.0, 1e-9]), "none": torch.empty(0)}
    assert largest_error(expected, expected) == 0.0
    assert largest_error({**expected, "a": torch.tensor([1.1, -10.0])}, expected) == pytest.approx(0.01)
    # What cancels almost to nothing counts relative to the largest of all tensors.
    assert largest_error({**expected, "b": torch.tensor([0.0, 2e-9])}, expected) == pytest.approx(1e-8)
    assert largest_error({"a": torch.tensor(0.0)}, {"a": torch.tensor(0.0)}) == 0.0


def test_what_is_missing_or_not_a_number_is_an_infinite_error() -> None:
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    assert largest_error({"a": one}, {"a": one, "b": one}) == math.inf
    assert largest_error({"a": nan}, {"a": one}) == math.inf
    assert largest_error({"a": one / 0}, {"a": one}) == math.inf
    assert largest_error({"a": torch.ones(2)}, {"a": one}) == math.inf
    assert largest_error({"a": nan}, {"a": nan}) == 0.0  # the stress of a molecule


def test_one_large_error_fails_a_row() -> None:
    assert Row(layout=Layout(), errors={"energy": 1e-12}, tolerance=1e-10).passed
    assert not Row(layout=Layout(), errors={"energy": 1e-12, "norm": 1e-9}, tolerance=1e-10).passed
    assert not Row(layout=Layout(), errors={"norm": math.inf}, tolerance=1e-10).passed


def test_what_is_zero_throughout_on_both_sides_is_not_a_check() -> None:
    number, nothing = {"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.tensor(math.nan)}
    names = [entry.name for entry in fields(Measurement)]
    expected = Measurement(**{name: nothing if name.startswith("stress") else number for name in names})
    assert find_unchecked(expected, expected) == {"stress", "stress_gradient"}
    # What only the layout has is an error.
    assert find_unchecked(replace(expected, stress_gradient=number), expected) == {"stress"}


def test_one_term_of_the_loss() -> None:
    loss = only("forces", LossConfig())
    assert (loss.energy_weight, loss.forces_weight, loss.stress_weight, loss.magmoms_weight) == (0.0, 1.0, 0.0, 0.0)
