"""The loss: its definition, missing labels, and that splitting a batch changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import molecule

from matris.config import ForceReduction, LossConfig, LossKind
from matris.graph.batch import collate_labels
from matris.graph.structure import Labels
from matris.loss import LabelTotals, force_matching_loss
from tests.matris.structures import all_kinds, batch_of, tiny_model

KINDS = all_kinds()
ATOMS = [KINDS["fcc supercell"], KINDS["left-handed cell"], molecule("H2O"), KINDS["isolated atom"]]
RNG = np.random.default_rng(0)
LABELS = [
    Labels(energy=-3.0, forces=RNG.normal(size=(16, 3)), stress=RNG.normal(size=(3, 3)), magmoms=RNG.normal(size=16)),
    Labels(forces=RNG.normal(size=(2, 3)), stress=RNG.normal(size=(3, 3))),
    Labels(energy=-14.0, forces=RNG.normal(size=(3, 3)), magmoms=RNG.normal(size=3)),
    Labels(energy=-0.5),
]
ALL_TERMS = LossConfig(energy_weight=1.0, forces_weight=2.0, stress_weight=3.0, magmoms_weight=4.0)
KINDS_OF_LOSS = [
    ALL_TERMS,
    replace(ALL_TERMS, force_reduction=ForceReduction.atom),
    replace(ALL_TERMS, energy=LossKind.mse, forces=LossKind.mse, stress=LossKind.huber, magmoms=LossKind.mse),
    replace(ALL_TERMS, energy=LossKind.huber, forces=LossKind.huber, force_reduction=ForceReduction.atom),
    replace(ALL_TERMS, forces=LossKind.mae),
]


def part(indices):
    return batch_of(*[ATOMS[i] for i in indices]), collate_labels(
        [LABELS[i] for i in indices], [len(ATOMS[i]) for i in indices]
    )


def test_default_terms_by_hand():
    model = tiny_model()
    model.set_reference_energies({29: 1.25, 8: -7.0})
    batch, labels = part(range(4))
    prediction = model(batch)
    terms = force_matching_loss(prediction, labels, batch, LabelTotals.of([(batch, labels)]), ALL_TERMS)
    energy = prediction.energy
    by_hand = (abs(energy[0] + 3.0) / 16 + abs(energy[2] + 14.0) / 3 + abs(energy[3] + 0.5)) / 3
    assert terms.energy.item() == pytest.approx(by_hand.item(), rel=1e-12)
    lengths = (prediction.forces - labels.forces).norm(dim=1)
    by_hand = (lengths[:16].mean() + lengths[16:18].mean() + lengths[18:21].mean()) / 3
    assert terms.forces.item() == pytest.approx(by_hand.item(), rel=1e-12)
    by_hand = (prediction.stress[:2] - labels.stress[:2]).abs().mean()
    assert terms.stress.item() == pytest.approx(by_hand.item(), rel=1e-12)
    rows = [*range(16), *range(18, 21)]
    by_hand = (prediction.magmoms[rows] - labels.magmoms[rows].abs()).abs().mean()
    assert terms.magmoms.item() == pytest.approx(by_hand.item(), rel=1e-12)
    total = terms.energy + 2 * terms.forces + 3 * terms.stress + 4 * terms.magmoms
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize("config", KINDS_OF_LOSS)
def test_splitting_the_batch_changes_nothing(config):
    model = tiny_model()
    totals = LabelTotals.of([part(range(4))])

    def gradient(parts):
        model.zero_grad()
        value = 0.0
        for indices in parts:
            batch, labels = part(indices)
            terms = force_matching_loss(model(batch, create_graph=True), labels, batch, totals, config)
            terms.total.backward()
            value += terms.total.item()
        return value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    value, whole = gradient([range(4)])
    for parts in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        other_value, other = gradient(parts)
        assert other_value == pytest.approx(value, rel=1e-12)
        assert (other - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_missing_labels_carry_no_gradient():
    model = tiny_model()
    batch, labels = part([3])
    totals = LabelTotals.of([part([0])])
    terms = force_matching_loss(
        model(batch, create_graph=True), labels, batch, totals, replace(ALL_TERMS, energy_weight=0.0)
    )
    assert terms.total.item() == 0.0
    terms.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_term_without_its_prediction_is_refused():
    model = tiny_model()
    batch, labels = part([0])
    totals = LabelTotals.of([(batch, labels)])
    with pytest.raises(ValueError, match="stress term"):
        force_matching_loss(model(batch, stress=False), labels, batch, totals, ALL_TERMS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"energy_weight": -1.0}, "not be negative"),
        (dict.fromkeys(("energy_weight", "forces_weight", "stress_weight", "magmoms_weight"), 0.0), "at least one"),
        ({"stress": LossKind.l2norm}, "loss.stress"),
        ({"huber_delta": 0.0}, "huber_delta"),
    ],
)
def test_senseless_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
