"""Weights of tasks in the loss, against a loop over structures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from matris.config import ForceReduction, LossConfig
from matris.loss import LabelTotals, force_matching_loss
from tests.matris.structures import tiny_model
from tests.matris.test_loss import ALL_TERMS, KINDS_OF_LOSS, LABELS, part

TASKS = torch.tensor([1, 0, 2, 1])
WEIGHTS = torch.tensor([[1.0, 2.0, 0.5, 3.0], [0.25, 4.0, 0.0, 1.0], [7.0, 0.1, 1.0, 0.6]], dtype=torch.float64)
TERMS = ("energy", "forces", "stress", "magmoms")


def of(indices: list[int], config: LossConfig, weights: torch.Tensor | None, totals: LabelTotals):
    batch, labels = part(indices)
    batch = replace(batch, task=TASKS[indices])
    return force_matching_loss(tiny_model()(batch), labels, batch, totals, config, weights)


@pytest.mark.parametrize("config", KINDS_OF_LOSS)
def test_against_a_loop_over_structures(config: LossConfig) -> None:
    totals = LabelTotals.of([part(range(4))])
    found = of([0, 1, 2, 3], config, WEIGHTS, totals)
    alone = [of([index], config, None, totals) for index in range(len(LABELS))]
    total = 0.0
    for term, name in enumerate(TERMS):
        expected = sum(
            WEIGHTS[task, term].item() * getattr(one, name).item()
            for task, one in zip(TASKS.tolist(), alone, strict=True)
        )
        assert getattr(found, name).item() == pytest.approx(expected, rel=1e-12)
        total += getattr(config, f"{name}_weight") * expected
    assert found.total.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("reduction", ForceReduction)
def test_weights_of_one_change_nothing(reduction: ForceReduction) -> None:
    config = replace(ALL_TERMS, force_reduction=reduction)
    totals = LabelTotals.of([part(range(4))])
    plain = of([0, 1, 2, 3], config, None, totals)
    assert of([0, 1, 2, 3], config, torch.ones_like(WEIGHTS), totals).total.equal(plain.total)


def test_a_weight_of_zero_leaves_no_gradient() -> None:
    totals = LabelTotals.of([part(range(4))])
    batch, labels = part(range(4))
    batch = replace(batch, task=torch.tensor([0, 1, 0, 0]))
    weights = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    model = tiny_model()
    prediction = model(batch, create_graph=True)
    force_matching_loss(prediction, labels, batch, totals, ALL_TERMS, weights).total.backward()
    of_all = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    model.zero_grad()
    batch, labels = part([1])
    force_matching_loss(model(batch, create_graph=True), labels, batch, totals, ALL_TERMS).total.backward()
    of_one = [value.grad for value in model.parameters() if value.grad is not None]
    for ours, theirs in zip(of_all, of_one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
