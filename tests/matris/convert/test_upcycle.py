"""A dense model and the one with experts that is made of it give the same results; then the experts learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ase.build import bulk, molecule

from matris.blocks.moe import RoutedExperts
from matris.config import ModelConfig, NormType
from matris.convert.upcycle import Upcycling, upcycled
from matris.exported import StoredModel
from matris.model import MatRIS
from matris.pruning import keep_elements
from tests.matris.structures import EXPERTS, TINY, batch_of, predict, rattled, tiny_model

OPTIONS = Upcycling(num_experts=4, topk=2)
KINDS = {
    "smooth": (TINY, OPTIONS),
    "released": (replace(TINY, smooth_attention=False, norm_type=NormType.rms), OPTIONS),
    "wider experts": (TINY, replace(OPTIONS, hidden_size=21)),
    "tasks": (replace(TINY, tasks=("pbe", "r2scan")), OPTIONS),
}


def stored(model: MatRIS) -> StoredModel:
    state = model.state_dict()
    return StoredModel(model=model, like=state, read=state.__getitem__, provenance={"made_by": "test"})


def trained(config: ModelConfig) -> MatRIS:
    """No parameter has the value that it began with."""
    model = tiny_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_equal_at_first(kind: str) -> None:
    config, options = KINDS[kind]
    dense = trained(config)
    model = upcycled(stored(dense), options).build()
    assert len(model.expert_sites()) == 2 * config.num_layers
    for atoms in (rattled(bulk("NaCl", "rocksalt", a=5.3)), rattled(molecule("C2H6")), rattled(bulk("Cu") * (2, 1, 1))):
        ours, theirs = predict(model, atoms), predict(dense, atoms)
        for name in ("energy", "forces", "stress", "magmoms"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10, equal_nan=True)
        assert theirs.forces.abs().max() > 1e-5


@pytest.mark.parametrize(
    ("options", "num_elements"),
    [(OPTIONS, 8), (replace(OPTIONS, hidden_size=21), 8), (Upcycling(num_experts=2, topk=2), 1)],
)
def test_all_experts_learn_and_apart(options: Upcycling, num_elements: int) -> None:
    """Also two experts that serve the same atoms: their gradients differ by a factor alone, which Adam takes out."""
    config = TINY
    model = upcycled(stored(trained(config)), options).build()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-3, eps=1e-30)
    atoms = bulk("NaCl", "rocksalt", a=5.3).repeat((2, 2, 1))
    elements = [1, 6, 8, 14, 20, 26, 29, 30][:num_elements]
    atoms.numbers[:] = (8 * elements)[:8]
    for _ in range(3):
        optimizer.zero_grad()
        prediction = model(batch_of(rattled(atoms), config=config), create_graph=True)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        optimizer.step()
    for site in model.expert_sites()[:-1]:  # the last layer's edges are not read
        used = site.router.table.topk(2, dim=1).indices[torch.tensor(elements) - 1].unique().tolist()
        for expert in used:
            assert site.core[expert].abs().min(dim=0).values.max() > 0.0
            others = [other for other in used if other != expert]
            assert not any(torch.allclose(site.core[expert], site.core[other]) for other in others)
            assert not any(torch.allclose(site.inner[expert], site.inner[other]) for other in others)


def test_the_seed_decides_what_is_random() -> None:
    dense = stored(trained(TINY))
    states = [upcycled(dense, replace(OPTIONS, seed=seed)).build().state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tables = [name for name in states[0] if name.endswith("router.table")]
    assert len({states[0][name].sum().item() for name in tables}) == len(tables)
    assert not any(torch.equal(states[0][name], states[2][name]) for name in tables)


def test_facts_are_kept_and_elements_can_be_cut() -> None:
    dense = trained(TINY)
    dense.elements, dense.predicts_magmoms = (11, 17), False
    result = upcycled(stored(dense), OPTIONS)
    model = result.build()
    assert model.elements == (11, 17)
    assert not model.predicts_magmoms
    assert result.provenance["made_by"] == "test"
    sodium = keep_elements(model, [11])
    assert sodium.hyper.num_moe_experts == 2
    assert isinstance(sodium.blocks[0].atom_attention.message_experts, RoutedExperts)
    atoms = rattled(bulk("Na"))
    torch.testing.assert_close(predict(sodium, atoms).stress, predict(dense, atoms).stress, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (EXPERTS, OPTIONS, "has 5 experts at each site already"),
        (TINY, replace(OPTIONS, hidden_size=15), "must hold the dense layer, so it must be at least 16"),
        (TINY, replace(OPTIONS, topk=5), "moe_router_topk is 5, but there are 4"),
        (TINY, replace(OPTIONS, num_experts=0), "give all three as positive numbers"),
    ],
)
def test_what_makes_no_model_is_refused(config: ModelConfig, options: Upcycling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycled(stored(tiny_model(config)), options)


def test_separable_attention_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="separable_attention is true without experts"):
        replace(TINY, separable_attention=True)
