"""Predicted memory of a training step against the bytes of all tensors that live at its peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ase.build import bulk, molecule

from janus.ops.fused import using_kernels
from janus.sharding import weight_memory
from matris.config import ModelConfig, NormType, Precision
from matris.cost import Counts
from matris.graph.batch import GraphBatch
from matris.memory import _BATCH_BYTES, step_memory, unit_bytes
from matris.model import MatRIS
from tests.matris.live_bytes import LiveBytes
from tests.matris.structures import batch_of, rattled

DENSE = ModelConfig(num_layers=3, hidden_size=40, three_body_cutoff=4.2, readout_hidden_sizes=(40, 40))
EXPERTS = replace(DENSE, num_moe_experts=6, moe_router_topk=3, moe_ffn_hidden_size=88, kv_channels=8)


def counted(model: MatRIS, batch: GraphBatch) -> int:
    """Bytes at the peak, with the batch and without weights and their gradients."""
    weights = [value for value in model.parameters() if value.requires_grad]
    for value in weights:
        value.grad = torch.zeros_like(value)
    with LiveBytes() as bytes_:
        prediction = model(batch, create_graph=True)
        loss = prediction.energy.sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        loss.backward(inputs=weights)
    return bytes_.peak + sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))


def counts_of(batch: GraphBatch) -> Counts:
    return Counts(
        structures=batch.num_structures,
        atoms=batch.num_atoms,
        edges=batch.num_edges,
        undirected=batch.num_undirected,
        angles=batch.num_angles,
    )


def waiting(model: MatRIS) -> int:
    """Bytes of gradients that wait where blocks are not made again."""
    return weight_memory(model, (), shards=1, tensor=1).waiting


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("recompute_bytes", [None, 0])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_prediction_is_within_a_tenth(kind: str, recompute_bytes: int | None, large: bool) -> None:
    config = {"dense": DENSE, "experts": EXPERTS}[kind]
    if large:
        config = replace(config, num_layers=4, hidden_size=96)
    model = MatRIS(config, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.recompute_bytes = recompute_bytes
    frames = [bulk("Si", cubic=True), bulk("Cu", cubic=True), molecule("CH3CH2OH")]
    batch = batch_of(*(rattled(frame) for frame in frames), config=config)
    predicted = waiting(model) + step_memory(config, counts_of(batch), recompute_bytes=recompute_bytes)
    assert predicted == pytest.approx(counted(model, batch), rel=0.1)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_prediction_of_full_recomputation(kind: str, large: bool) -> None:
    config = {"dense": DENSE, "experts": EXPERTS}[kind]
    if large:
        config = replace(config, num_layers=6, hidden_size=64)
    model = MatRIS(config, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.recompute_bytes, model.recompute_blocks = 0, True
    batch = batch_of(*(rattled(frame) for frame in (bulk("Si", cubic=True), bulk("Cu", cubic=True))), config=config)
    predicted = step_memory(config, counts_of(batch), recompute_bytes=0, recompute_blocks=True)
    found = counted(model, batch)
    assert predicted == pytest.approx(found, rel=0.1)
    model.recompute_blocks = False
    assert found < (0.4 if large else 0.7) * counted(model, batch)


@pytest.mark.parametrize("three_body_cutoff", [3.0, 4.2])
@pytest.mark.parametrize("sizes", [(8, 2, 160), (16, 16, 96), (48, 2, 48)])
def test_prediction_of_full_recomputation_with_large_experts(
    sizes: tuple[int, int, int], three_body_cutoff: float
) -> None:
    """Tokens or gradients of experts are the most of it, as in the published sizes."""
    experts, topk, hidden = sizes
    config = replace(
        EXPERTS,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=hidden,
        three_body_cutoff=three_body_cutoff,
    )
    model = MatRIS(config, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.recompute_bytes, model.recompute_blocks = 0, True
    batch = batch_of(rattled(bulk("Cu", cubic=True)), config=config)
    predicted = step_memory(config, counts_of(batch), recompute_bytes=0, recompute_blocks=True)
    assert predicted == pytest.approx(counted(model, batch), rel=0.1)


@pytest.mark.parametrize("experts", [0, 48])
@pytest.mark.parametrize("policy", ["none", "all", "full"])
def test_prediction_for_few_angles_and_many_weights(policy: str, experts: int) -> None:
    """Fewer angles than edges, and gradients of weights that are much of it: of experts the most."""
    config = replace(DENSE, hidden_size=64, three_body_cutoff=2.8)
    if experts:
        config = replace(config, num_moe_experts=experts, moe_router_topk=2, moe_ffn_hidden_size=48, kv_channels=8)
    model = MatRIS(config, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.set_recompute(policy)
    batch = batch_of(rattled(bulk("Si", cubic=True)), config=config)
    assert batch.num_angles < batch.num_undirected
    predicted = step_memory(
        config, counts_of(batch), recompute_bytes=model.recompute_bytes, recompute_blocks=policy == "full"
    )
    predicted += 0 if policy == "full" else waiting(model)
    assert predicted == pytest.approx(counted(model, batch), rel=0.1)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_only_large_results_are_made_again(kind: str) -> None:
    """Those of angles and tokens reach the limit, those of edges do not; some of one kind do and others do not."""
    config = {"dense": DENSE, "experts": EXPERTS}[kind]
    batch = batch_of(rattled(bulk("Cu", cubic=True).repeat((2, 1, 1))), config=config)
    limit = batch.num_angles * config.hidden_size * 4
    assert limit > 2 * batch.num_edges * config.hidden_size * 4
    model = MatRIS(config, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.recompute_bytes = limit
    predicted = waiting(model) + step_memory(config, counts_of(batch), recompute_bytes=limit)
    assert predicted == pytest.approx(counted(model, batch), rel=0.1)


@pytest.mark.parametrize("way", ["native", "bf16-mixed", "native bf16-mixed", "released form", "RMS norm"])
@pytest.mark.parametrize("policy", ["none", "all", "full"])
def test_other_ways_of_computing(way: str, policy: str) -> None:
    others = {"released form": {"smooth_attention": False}, "RMS norm": {"norm_type": NormType.rms}}
    config = replace(DENSE, num_layers=4, hidden_size=96, **others.get(way, {}))
    bf16, kernels = "bf16-mixed" in way, "native" if "native" in way else "torch"
    model = MatRIS(config, precision=Precision.bf16_mixed if bf16 else Precision.fp32, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.set_recompute(policy)
    batch = batch_of(*(rattled(frame) for frame in (bulk("Si", cubic=True), bulk("Cu", cubic=True))), config=config)
    predicted = step_memory(
        config,
        counts_of(batch),
        recompute_bytes=model.recompute_bytes,
        recompute_blocks=policy == "full",
        bf16=bf16,
        kernels=kernels,
    )
    predicted += 0 if policy == "full" else waiting(model)
    with using_kernels(kernels, torch.device("cpu")):
        model(batch, create_graph=True).forces.sum().backward()  # a kernel's first call is compared with torch's
        assert predicted == pytest.approx(counted(model, batch), rel=0.1)


def test_double_precision() -> None:
    model = MatRIS(DENSE, precision=Precision.fp64, seed=0)
    model.readout.magmom.requires_grad_(False)
    model.recompute_bytes = 0
    batch = batch_of(rattled(bulk("Si", cubic=True)), config=DENSE)
    predicted = waiting(model) + step_memory(DENSE, counts_of(batch), recompute_bytes=0, itemsize=8)
    assert predicted == pytest.approx(counted(model, batch), rel=0.1)


@pytest.mark.parametrize("recompute_bytes", [None, 0, 1 << 20])
@pytest.mark.parametrize("config", [DENSE, EXPERTS])
def test_linear_bound(config: ModelConfig, recompute_bytes: int | None) -> None:
    bound = unit_bytes(config, recompute_bytes=recompute_bytes)
    for atoms, edges, angles in ((1, 0, 0), (10, 300, 4000), (500, 4000, 5000), (3000, 200_000, 2_500_000)):
        counts = Counts(structures=1, atoms=atoms, edges=edges, undirected=edges // 2, angles=angles)
        linear = bound.constant + atoms * bound.atom + edges * bound.edge + angles * bound.angle
        exact = step_memory(config, counts, recompute_bytes=recompute_bytes)
        assert linear >= exact * (1.0 - 1e-9)
    assert linear <= 1.05 * exact


@pytest.mark.parametrize("config", [DENSE, EXPERTS])
def test_linear_bound_of_full_recomputation(config: ModelConfig) -> None:
    full: dict[str, Any] = {"recompute_bytes": 0, "recompute_blocks": True}
    bound = unit_bytes(config, **full)
    for atoms, edges, angles in ((1, 0, 0), (10, 300, 4000), (500, 40_000, 5000), (3000, 200_000, 2_500_000)):
        counts = Counts(structures=1, atoms=atoms, edges=edges, undirected=edges // 2, angles=angles)
        linear = bound.constant + atoms * bound.atom + edges * bound.edge + angles * bound.angle
        exact = step_memory(config, counts, **full)
        assert exact * (1.0 - 1e-9) <= linear <= 1.2 * exact
    shared = step_memory(config, counts, **full, expert_ranks=2)
    # Two sites, and in float32.
    site = 8 * config.hidden_size * config.moe_ffn_hidden_size * 4
    assert exact - shared == pytest.approx(config.num_moe_experts // 2 * 2 * site)


def test_bytes_of_a_batch() -> None:
    """All that grows with atoms, edges and angles."""
    small, large = (batch_of(rattled(bulk("Cu", cubic=True).repeat(size)), config=DENSE) for size in (1, 2))
    for batch in (small, large):
        of_structure = sum(
            getattr(batch, name).nbytes for name in ("cell", "atoms_per_structure", "task", "charge", "spin")
        )
        held = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
        numbers = {"atom": batch.num_atoms, "undirected": batch.num_undirected, "angle": batch.num_angles}
        predicted = sum(count * getattr(_BATCH_BYTES, kind).numbers for kind, count in numbers.items())
        assert held - of_structure == predicted
