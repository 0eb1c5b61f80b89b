"""MatRIS over tensor-parallel ranks against one process, fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ase.build
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from janus.comm.adjoint import gather
from janus.mesh import Mesh
from janus.tensor_parallel import VocabParallelEmbedding
from matris.blocks.module import MatRISConfig
from matris.config import ModelConfig, NormType, Precision
from matris.graph.batch import GraphBatch, collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS, Prediction
from tests.parallel.ranks import run_ranks

TERMS = ("energy", "forces", "stress", "magmoms")


def batch() -> GraphBatch:
    silicon, salt = ase.build.bulk("Si", cubic=True), ase.build.bulk("NaCl", "rocksalt", a=5.6)
    graphs = []
    for seed, atoms in enumerate((silicon, salt, ase.build.molecule("CH3CH2OH"))):
        atoms.rattle(0.1, seed=seed)
        graphs.append(build_graph(Structure.from_atoms(atoms), pairwise_cutoff=4.0, three_body_cutoff=3.0))
    return collate_graphs(graphs)


def term(prediction: Prediction, name: str) -> Tensor:
    if name == "energy":
        return prediction.energy.square().sum()
    if name == "forces":
        return prediction.forces.square().sum()
    if name == "stress":
        return prediction.stress[:2].square().sum()  # the molecule has no volume
    return prediction.magmoms.square().sum()


def measured(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """Predictions, and this rank's part of the weight gradients of each term, made whole."""
    model = MatRIS(config, precision=Precision.fp64, seed=1, mesh=mesh)
    prediction = model(batch(), create_graph=True)
    result: dict[str, Any] = {
        name: getattr(prediction, name).detach() for name in ("energy", "forces", "stress", "magmoms")
    }
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name in TERMS:
        wanted = [value for value in parameters if value.requires_grad]
        gradients = torch.autograd.grad(term(prediction, name), wanted, retain_graph=True, materialize_grads=True)
        found = dict(
            zip([n for n, v in zip(names, parameters, strict=True) if v.requires_grad], gradients, strict=True)
        )
        result[f"{name} gradients"] = {n: whole(found[n], v, mesh) for n, v in model.named_parameters() if n in found}
    result["weights"] = {n: whole(v.detach(), v, mesh) for n, v in model.named_parameters()}
    result["share"] = sum(
        v.numel() for n, v in model.named_parameters() if n.startswith("blocks.") and v.ndim > 1 and "router" not in n
    )
    return result


def whole(value: Tensor, parameter: Tensor | None, mesh: Mesh) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    runs = value.chunk(parameter.partition_stride, dim=parameter.partition_dim)
    return torch.cat([gather(run, mesh.tensor, dim=parameter.partition_dim) for run in runs], parameter.partition_dim)


CONFIGS = [
    ModelConfig(num_layers=2, hidden_size=16, pairwise_cutoff=4.0, three_body_cutoff=3.0, ffn_bias=True),
    ModelConfig(
        num_layers=1,
        hidden_size=16,
        pairwise_cutoff=4.0,
        three_body_cutoff=3.0,
        norm_type=NormType.rms,
        smooth_attention=False,
    ),
    ModelConfig(
        num_layers=2,
        hidden_size=16,
        pairwise_cutoff=4.0,
        three_body_cutoff=3.0,
        num_moe_experts=5,
        moe_router_topk=2,
        moe_ffn_hidden_size=8,
        kv_channels=4,
    ),
    ModelConfig(
        num_layers=1,
        hidden_size=16,
        pairwise_cutoff=4.0,
        three_body_cutoff=3.0,
        num_moe_experts=5,
        moe_router_topk=2,
        moe_ffn_hidden_size=8,
        separable_attention=True,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["layer norm", "rms norm", "experts", "experts of separable attention"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_model_is_that_of_one_process(world_size: int, config: ModelConfig) -> None:
    alone = measured(Mesh(), config)
    for result in run_ranks(world_size, measured, config, layout={"tensor": world_size}):
        for name, value in alone["weights"].items():
            assert torch.equal(result["weights"][name], value), name
        for name in TERMS:
            torch.testing.assert_close(
                result[name], alone[name], rtol=1e-10, atol=1e-12, equal_nan=name == "stress", msg=name
            )
            gradients = alone[f"{name} gradients"]
            largest = max(float(value.abs().max()) for value in gradients.values())
            assert largest > 0.0
            for parameter, value in gradients.items():
                found = result[f"{name} gradients"][parameter]
                difference = float((found - value).abs().max())
                assert difference <= 1e-10 * max(float(value.abs().max()), 1e-3 * largest), (
                    name,
                    parameter,
                    difference,
                )
        assert result["share"] == pytest.approx(alone["share"] / world_size, rel=1e-3)


def described(mesh: Mesh) -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Name, whole shape and place of every piece that Megatron's checkpoints would write."""
    model = MatRIS(CONFIGS[0], seed=1, mesh=mesh)
    found = {}
    for name, entry in model.sharded_state_dict().items():
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        found[name] = [(piece.key, tuple(piece.global_shape), tuple(piece.global_offset)) for piece in pieces]
        for piece in pieces:
            local = tuple(slice(o, o + n) for o, n in zip(piece.global_offset, piece.local_shape, strict=True))
            # The piece lies in the whole tensor where Megatron is told that it does.
            whole_tensor = whole(model.state_dict()[name], dict(model.named_parameters()).get(name), mesh)
            assert torch.equal(whole_tensor[local], piece.data), name
    return found


def test_megatron_checkpoints_know_the_pieces() -> None:
    shapes = {name: tuple(value.shape) for name, value in MatRIS(CONFIGS[0]).state_dict().items()}
    for found in run_ranks(2, described, layout={"tensor": 2}):
        assert found.keys() == shapes.keys()
        for name, pieces in found.items():
            assert {(key, shape) for key, shape, _ in pieces} == {(name, shapes[name])}
        assert len(found["blocks.0.line_attention.logits.weight"]) == 2


def flops(mesh: Mesh) -> tuple[int, int]:
    """Matrix-product FLOPs of a forward pass and of a training step on this rank."""
    model = MatRIS(replace(CONFIGS[0], hidden_size=64), seed=1, mesh=mesh)
    model.readout.magmom.requires_grad_(False)
    structures = batch()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(structures, forces=False, stress=False)
    with FlopCounterMode(display=False) as step:
        prediction = model(structures, create_graph=True)
        sum(term(prediction, name) for name in ("energy", "forces", "stress")).backward()
    return forward.get_total_flops(), step.get_total_flops()


def test_ranks_share_the_products_and_the_force_pass_has_no_weight_gradients() -> None:
    forward_alone, _ = flops(Mesh())
    for forward, step in run_ranks(2, flops, layout={"tensor": 2}):
        assert 0.5 <= forward / forward_alone <= 0.53  # embeddings and readout are replicated
        assert 5.8 <= step / forward <= 6.05


def embed(mesh: Mesh) -> tuple[Tensor, Tensor]:
    config = MatRISConfig(params_dtype=torch.float64, use_cpu_initialization=True)
    torch.manual_seed(0)
    layer = VocabParallelEmbedding(config, 8, 3, tensor=mesh.tensor)
    rows = layer(torch.tensor([7, 0, 3, 3]))
    rows.square().sum().backward()
    return rows.detach(), gather(layer.weight.grad, mesh.tensor)


def test_vocabulary_parallel_embedding() -> None:
    expected = embed(Mesh())
    for found in run_ranks(4, embed, layout={"tensor": 4}):
        torch.testing.assert_close(found, expected)


def test_a_width_that_does_not_divide_is_refused() -> None:
    for message in run_ranks(2, refused, layout={"tensor": 2}):
        assert "do not divide into" in message


def refused(mesh: Mesh) -> str:
    with pytest.raises(ValueError, match="do not divide into") as caught:
        MatRIS(ModelConfig(num_layers=1, hidden_size=7), mesh=mesh)
    return str(caught.value)
