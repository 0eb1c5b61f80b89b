"""Number formats of training against fp64: bounds that the measured errors in docs/benchmarks.md keep."""

from dataclasses import replace

import pytest
import torch
from ase.build import bulk, molecule

from matris.config import ModelConfig, Precision
from matris.model import MatRIS
from tests.matris.structures import TINY, batch_of, rattled

CONFIG = ModelConfig(**{**vars(TINY), "hidden_size": 64})
BATCH = batch_of(rattled(bulk("NaCl", "rocksalt", a=5.2, cubic=True), 0.1), molecule("C2H6"), config=CONFIG)


def outputs(precision: Precision, recompute: str = "selective") -> dict[str, torch.Tensor]:
    model = MatRIS(CONFIG, precision=precision, seed=0)
    model.set_recompute(recompute)
    prediction = model(BATCH, create_graph=True)
    results = {
        "energy": prediction.interaction_energy,
        "forces": prediction.forces,
        "stress": prediction.stress[:1],
    }
    for name in ("energy", "forces"):
        loss = results[name].square().sum()
        parameters = [p for p in model.blocks.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        results[f"weight gradient of {name}"] = torch.cat([g.double().flatten() for g in gradients])
    return {name: value.detach() for name, value in results.items()}


def relative_errors(precision: Precision) -> dict[str, float]:
    exact, rounded = outputs(Precision.fp64), outputs(precision)
    return {name: float((rounded[name] - value).norm() / value.norm()) for name, value in exact.items()}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16_mixed])
def test_recomputation_changes_no_bit(precision: Precision) -> None:
    expected = outputs(precision, "none")
    for name, value in outputs(precision, "all").items():
        assert torch.equal(value, expected[name]), name


def test_single_precision():
    errors = relative_errors(Precision.fp32)
    assert all(1e-10 < error < 2e-5 for error in errors.values()), errors


def test_bfloat16_products():
    errors = relative_errors(Precision.bf16_mixed)
    assert max(errors.values()) < 0.1, errors
    # They do act: an option without effect would leave fp32's errors.
    assert min(errors.values()) > 1e-4, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tf32 products exist on CUDA only, and no device is here")
def test_tf32_products():
    model = MatRIS(CONFIG, precision=Precision.tf32, seed=0).cuda()
    exact = outputs(Precision.fp64)
    torch.set_float32_matmul_precision("high")
    try:
        prediction = model(BATCH.to("cuda"))
    finally:
        torch.set_float32_matmul_precision("highest")
    error = float((prediction.forces.cpu() - exact["forces"]).norm() / exact["forces"].norm())
    assert 1e-6 < error < 2e-2


def test_parameters_stay_in_fp32():
    model = MatRIS(replace(CONFIG, num_layers=1), precision=Precision.bf16_mixed)
    assert {p.dtype for p in model.blocks.parameters()} == {torch.float32}
    prediction = model(BATCH)
    assert prediction.forces.dtype == torch.float64
