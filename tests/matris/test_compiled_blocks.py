"""Interaction blocks as programs, uncompiled: compilation takes minutes, and each compiled block is checked in use."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from janus.blockwise.traced import trace_block
from janus.ops.fused import using_kernels
from matris.blocks.compiled import CompiledBlocks
from matris.config import ModelConfig, Precision
from matris.graph.batch import GraphBatch
from matris.model import MatRIS
from matris.train_config import TrainingConfig
from tests.matris.structures import batch_of, rattled

CONFIG = ModelConfig(
    num_layers=2, hidden_size=8, pairwise_cutoff=4.0, three_body_cutoff=3.0, num_radial=3, num_angular=3
)
EXPERTS = replace(CONFIG, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=4, kv_channels=4)


def results(model: MatRIS, batch: GraphBatch) -> list[torch.Tensor]:
    """Predictions, and the weight gradients of each term of a loss alone."""
    prediction = model(batch, create_graph=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = [prediction.energy, prediction.forces, prediction.stress]
    for term in (prediction.energy.sum(), prediction.forces.abs().sum(), prediction.stress.square().sum()):
        found += torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    detached = model(batch)
    # The stress of a molecule is not a number.
    return [value.detach().nan_to_num() for value in (*found, detached.forces, detached.stress)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (CONFIG, ["block", "block of the last block"]),
        (EXPERTS, ["line attention", "refinements", "refinements of the last block"]),
    ],
    ids=["dense", "experts"],
)
def test_programs_equal_autograd(config: ModelConfig, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = MatRIS(config, precision=Precision.fp64, seed=0)
    monkeypatch.setattr("matris.model.CompiledBlocks", partial(CompiledBlocks, compiled=False))
    monkeypatch.setattr("matris.blocks.compiled.trace_block", traced := Mock(side_effect=trace_block))
    frames = [bulk("Si", cubic=True), bulk("Cu").repeat((2, 1, 1)), molecule("CH3CH2OH")]
    batches = [  # programs of the first serve the others
        batch_of(*(rattled(frame) for frame in chosen), config=config)
        for chosen in (frames[:2], frames[2:], [Atoms("O")])
    ]
    expected = [results(model, batch) for batch in batches]
    assert not traced.called
    model.compile_blocks(or_plain=False)
    with using_kernels("native", torch.device("cpu")):  # for what stays outside
        for batch, plain in zip(batches, expected, strict=True):
            for ours, theirs in zip(results(model, batch), plain, strict=True):
                scale = max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1e-6)
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-10 * scale)
    assert traced.call_count == len(names)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="training.recompute is full and training.compile is blocks"):
        TrainingConfig(train_iters=1, compile="blocks", recompute="full")


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_missing_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    model = MatRIS(CONFIG, precision=Precision.fp64, seed=0)
    batch = batch_of(rattled(bulk("Si", cubic=True)), config=CONFIG)
    expected = model(batch).forces
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", Mock(side_effect=exc.InvalidCxxCompiler))
    with pytest.raises(ValueError, match=r"compiled blocks need a C\+\+ compiler.*leave training.compile at none"):
        model.compile_blocks(or_plain=False)
    with pytest.warns(RuntimeWarning, match="goes on without compiled blocks: compiled blocks need a C"):
        model.compile_blocks(or_plain=True)
    assert torch.equal(model(batch).forces, expected)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_plain_blocks_where_programs_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no kernels today")

    monkeypatch.setattr("matris.blocks.compiled.trace_block", fails)
    model = MatRIS(CONFIG, precision=Precision.fp64, seed=0)
    batch = batch_of(rattled(bulk("Si", cubic=True)), config=CONFIG)
    expected = model(batch).forces
    model.compile_blocks(or_plain=False)
    with pytest.raises(RuntimeError, match="no kernels today"):
        model(batch)
    model.compile_blocks(or_plain=True)
    with pytest.warns(RuntimeWarning, match=r"without compiled programs of the block.*: no kernels today"):
        assert torch.equal(model(batch).forces, expected)
