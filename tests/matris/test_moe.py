"""Experts: routed by element alone, exactly the sum that they stand for, of the published sizes."""

import pytest
import torch
from ase.build import bulk, molecule
from torch.nn import functional

from janus.ops.grouped import grouped_linear
from matris.blocks.moe import RoutedExperts
from matris.config import ModelConfig
from matris.model import MatRIS
from matris.presets import PRESETS
from tests.matris.structures import EXPERTS, batch_of, predict, rattled, tiny_model


def experts() -> RoutedExperts:
    return tiny_model(EXPERTS, seed=2).blocks[0].atom_attention.update_experts


def test_routed_experts_are_the_gated_sum_over_an_elements_experts():
    layer = experts()
    x = torch.randn(7, 3 * EXPERTS.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    element = torch.tensor([0, 5, 5, 117, 10, 0, 52])
    core, gate = layer(x, element)
    for token, row in enumerate(x):
        logits = layer.router.table[element[token]]
        chosen = logits.argsort(descending=True)[: EXPERTS.moe_router_topk]
        weights = logits[chosen].softmax(dim=0)
        for result, half, outer in ((core, 0, layer.core), (gate, 1, layer.gate)):
            expected = sum(
                w * outer[e] @ functional.silu(layer.inner[e, half] @ row) for w, e in zip(weights, chosen, strict=True)
            )
            torch.testing.assert_close(result[token], expected, rtol=1e-12, atol=1e-13)


def test_the_experts_of_an_atom_depend_on_its_element_alone(monkeypatch):
    seen = []
    forward = RoutedExperts.forward

    def watched(self, x, element):
        used = self.router()[0].index_select(0, element)
        seen.append({(int(z), tuple(sorted(row.tolist()))) for z, row in zip(element, used, strict=True)})
        return forward(self, x, element)

    monkeypatch.setattr(RoutedExperts, "forward", watched)
    model = tiny_model(EXPERTS, seed=2)
    sets = []
    for atoms in (
        bulk("NaCl", "rocksalt", a=5.2),
        bulk("NaCl", "rocksalt", a=6.9),
        rattled(bulk("NaCl", "cesiumchloride", a=3.4)),
    ):
        seen.clear()
        predict(model, atoms)
        sets.append([site for site in seen if site])
    assert sets[0] == sets[1] == sets[2]
    assert {z for z, _ in sets[0][1]} == {10, 16}


def test_experts_without_tokens_have_the_gradient_zero():
    model = tiny_model(EXPERTS, seed=2)
    prediction = model(batch_of(rattled(bulk("Cu", cubic=True)), config=EXPERTS), create_graph=True)
    prediction.forces.square().sum().backward()
    layer = model.blocks[0].atom_attention.message_experts
    used = set(layer.router()[0][28].tolist())
    assert len(used) == EXPERTS.moe_router_topk
    for expert in range(EXPERTS.num_moe_experts):
        assert bool(layer.inner.grad[expert].any()) == (expert in used)
    # The table's row of copper alone learns, and its other columns do not.
    assert set(layer.router.table.grad.nonzero()[:, 0].tolist()) == {28}


@pytest.mark.parametrize("sizes", [(3, 0, 5), (0, 0, 0), (4, 1, 0)])
def test_grouped_product_in_both_forms(sizes):
    counts = torch.tensor(sizes)
    rows = torch.randn(sum(sizes), 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 16, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, counts), (rows, weight))
    assert torch.autograd.gradgradcheck(lambda r, w: grouped_linear(r, w, counts), (rows, weight))

    def second(r, w):
        (force,) = torch.autograd.grad(grouped_linear(r, w, counts).pow(3).sum(), r, create_graph=True)
        return torch.autograd.grad(force.square().sum() + 0 * w.sum(), (r, w))

    single = second(rows.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    for found, expected in zip(single, second(rows, weight), strict=True):
        scale = 1e-5 * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=scale)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("moe-s", 1.09e9, 0.19e9), ("moe-m", 2.47e9, 0.56e9), ("moe-l", 11.5e9, 2.89e9)]
)
def test_presets_have_the_published_sizes(name, total, active):
    with torch.device("meta"):
        model = MatRIS(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(total, rel=0.05)
    assert model.num_active_parameters() == pytest.approx(active, rel=0.05)


def test_a_model_without_experts_uses_all_of_its_parameters():
    model = tiny_model()
    assert model.num_active_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_topk": 9}, "moe_router_topk is 9, but there are 5 experts"),
        ({"moe_ffn_hidden_size": 0}, "give all three as positive numbers"),
        ({"kv_channels": 5}, "kv_channels is 5: the width of a head must divide"),
        ({"smooth_attention": False}, "smooth_attention is false"),
        ({"num_elements": 119}, "num_elements is 119"),
    ],
)
def test_wrong_experts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(EXPERTS), **changes})


def test_heavy_elements_work():
    atoms = molecule("CO")
    atoms.numbers[:] = (118, 95)
    assert torch.isfinite(predict(tiny_model(EXPERTS), atoms).forces).all()
    with pytest.raises(ValueError, match="not trained on Am, Og"):
        tiny_model().check_elements(atoms.numbers)
