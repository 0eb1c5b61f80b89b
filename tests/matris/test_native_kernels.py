"""A model with C++ kernels against one with torch's: all outputs, and the weight gradient of each loss term alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ase.build import bulk, molecule
from torch import Tensor

from janus.ops.fused import using_kernels
from matris.config import ModelConfig, NormType, Precision
from matris.model import MatRIS
from tests.matris.structures import batch_of, rattled

CPU = torch.device("cpu")
DENSE = ModelConfig(num_layers=2, hidden_size=24, three_body_cutoff=4.2, readout_hidden_sizes=(16,))
CONFIGS = {
    "dense": DENSE,
    "released form": replace(DENSE, smooth_attention=False),
    "RMS norm": replace(DENSE, norm_type=NormType.rms),
    "experts": replace(DENSE, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16, kv_channels=8),
}


def everything(config: ModelConfig, recompute: str) -> dict[str, Tensor]:
    """Energies, forces and stress, and the weight gradient of each squared on its own."""
    model = MatRIS(config, precision=Precision.fp64, seed=0)
    model.set_recompute(recompute)
    batch = batch_of(rattled(bulk("Cu", cubic=True)), rattled(molecule("CH3CH2OH")), config=config)
    prediction = model(batch, create_graph=True)
    assert prediction.forces is not None
    assert prediction.stress is not None
    # A molecule without a cell has no stress.
    found = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress[:1]}
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    terms = {name: value.square().sum() for name, value in found.items()}
    for term, loss in terms.items():
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, materialize_grads=True)
        found |= {f"{name} of {term}": value for name, value in zip(weights, gradients, strict=True)}
    return found


@pytest.mark.parametrize("recompute", ["none", "all", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_derivatives(name: str, recompute: str) -> None:
    expected = everything(CONFIGS[name], "none")
    with using_kernels("native", CPU):
        found = everything(CONFIGS[name], recompute)
    assert found.keys() == expected.keys()
    for key, plain in expected.items():
        allowed = 1e-10 * max(plain.abs().max().item(), 1e-2)
        assert (found[key] - plain).abs().max().item() <= allowed, key
