"""A model with experts, cut down to some elements."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from ase.build import bulk, molecule

from matris.blocks.moe import RoutedExperts
from matris.calculator import MatRISCalculator
from matris.cli import main
from matris.exported import load_model, save_model
from matris.model import MatRIS
from matris.pruning import keep_elements
from tests.matris.structures import EXPERTS, predict, rattled, tiny_model


@pytest.fixture
def model() -> MatRIS:
    model = tiny_model(EXPERTS)
    model.set_reference_energies({1: -1.0, 8: -2.0, 14: -3.0})
    return model


def test_same_results_with_fewer_experts(model: MatRIS) -> None:
    pruned = keep_elements(model, [8, 1])
    assert pruned.hyper.num_moe_experts < model.hyper.num_moe_experts
    assert pruned.elements == (1, 8)
    ours, whole = (predict(each, rattled(molecule("H2O")), rattled(molecule("H2O2"))) for each in (pruned, model))
    for name in ("energy", "forces", "stress", "magmoms"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=0, atol=1e-13, equal_nan=True)


def test_every_site_keeps_the_experts_of_its_elements(model: MatRIS) -> None:
    pruned = keep_elements(model, [14])
    assert pruned.hyper.num_moe_experts == model.hyper.moe_router_topk
    assert pruned.num_active_parameters() < model.num_active_parameters()  # a narrower router
    for ours, whole in zip(pruned.modules(), model.modules(), strict=True):
        if isinstance(whole, RoutedExperts):
            chosen = whole.router()[0][13].sort().values
            assert ours.inner.equal(whole.inner[chosen])


def test_what_cannot_be_kept_is_refused(model: MatRIS) -> None:
    model.elements = (1, 8)
    with pytest.raises(ValueError, match="not trained on Si"):
        keep_elements(model, [1, 14])
    with pytest.raises(ValueError, match="name at least one"):
        keep_elements(model, [])
    with pytest.raises(ValueError, match="no experts"):
        keep_elements(tiny_model(), [1])


def test_verb(model: MatRIS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model, tmp_path / "whole", provenance={"made": "here"})
    words = ["convert", "--input", str(tmp_path / "whole"), "--elements", "Si", "--output", str(tmp_path / "silicon")]
    assert main(words) == 0
    assert "experts at each site" in capsys.readouterr().out
    silicon = load_model(tmp_path / "silicon")
    ours, whole = (predict(each, rattled(bulk("Si"))) for each in (silicon, model))
    torch.testing.assert_close(ours.forces, whole.forces, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="it knows Si;"):
        silicon.check_elements([8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--elements", "Si,Xx"], "Xx"),
        ([], "is a model already: say with --to"),
        (["--from", "reference", "--elements", "Si"], "is a model, and should be a reference"),
        (["--elements", "Si", "--to", "reference"], "cannot represent this model: it has experts"),
        (["--elements", "Si", "--to", "moe"], "needs --experts and --topk"),
        (["--elements", "Si", "--topk", "2"], "--topk: only with --to moe"),
        (["--elements", "Si", "--weights", "raw"], "--weights belongs to a training checkpoint"),
        (["--elements", "Si", "--like", "x"], "--like belongs to a Megatron checkpoint"),
    ],
)
def test_wrong_options(
    model: MatRIS, tmp_path: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "whole", provenance={})
    words = ["convert", "--input", str(tmp_path / "whole"), "--output", str(tmp_path / "new"), *changes]
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}


def test_the_calculator_holds_the_experts_that_it_needs(model: MatRIS, tmp_path: Path) -> None:
    model.elements = (1, 8, 14)
    save_model(model, tmp_path / "whole", provenance={})
    calculator = MatRISCalculator(tmp_path / "whole", dtype="float64")
    assert calculator.model.hyper.num_moe_experts == model.hyper.moe_router_topk
    sizes = []
    for atoms in (bulk("Si"), molecule("H2O"), bulk("Si")):
        expected = predict(model, rattled(atoms))
        rattled_atoms = rattled(atoms)
        rattled_atoms.calc = calculator
        assert rattled_atoms.get_potential_energy() == pytest.approx(expected.energy.item(), abs=1e-12)
        sizes.append(calculator.model.hyper.num_moe_experts)
    assert sizes[0] < sizes[1] == sizes[2]  # what was read stays
    rattled_atoms = bulk("Cu")
    rattled_atoms.calc = pickle.loads(pickle.dumps(calculator))
    with pytest.raises(ValueError, match=r"not trained on Cu: it knows H, O, Si"):
        rattled_atoms.get_potential_energy()
