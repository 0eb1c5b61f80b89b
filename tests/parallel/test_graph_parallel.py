"""MatRIS with the atoms of a batch shared over ranks against one process, fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ase.build
import numpy as np
import pytest
import torch
from torch import Tensor

from janus.comm.adjoint import all_reduced
from janus.comm.collectives import gather_objects
from janus.mesh import Mesh
from matris.config import ModelConfig, NormType, Precision
from matris.graph.batch import GraphBatch, collate_graphs, collate_labels
from matris.graph.partition import own, partition_batch
from matris.graph.structure import Labels
from matris.model import MatRIS, Prediction
from tests.matris.structures import all_kinds, batch_of, rattled
from tests.parallel.ranks import run_ranks
from tests.parallel.test_tensor_parallel import whole

TERMS = ("energy", "forces", "stress", "magmoms")
SMOOTH = ModelConfig(
    num_layers=2,
    hidden_size=8,
    readout_hidden_sizes=(8,),
    pairwise_cutoff=4.0,
    three_body_cutoff=3.2,
    smooth_attention=True,
)
RELEASED = ModelConfig(
    num_layers=2,
    hidden_size=8,
    readout_hidden_sizes=(8,),
    pairwise_cutoff=4.0,
    three_body_cutoff=3.2,
    smooth_attention=False,
    ffn_bias=True,
    norm_type=NormType.rms,
)
EXPERTS = replace(SMOOTH, num_moe_experts=5, moe_router_topk=2, moe_ffn_hidden_size=6, kv_channels=4)
# Batch, hyper-parameters, partitioner.
CASES = {
    "crystals and a molecule": ("mixed", SMOOTH, "morton"),
    "crystals and a molecule, released attention": ("mixed", RELEASED, "index"),
    "as many cuts as possible": ("mixed", RELEASED, "balanced"),
    "crystals and a molecule, experts": ("mixed", EXPERTS, "morton"),
    "parts without atoms, experts": ("few", EXPERTS, "morton"),
    "one crystal": ("crystal", SMOOTH, "morton"),
    "one crystal, as many cuts as possible": ("crystal", SMOOTH, "balanced"),
    "all kinds of structures": ("kinds", SMOOTH, "morton"),
    "parts without atoms": ("few", SMOOTH, "morton"),
    "parts without atoms, released attention": ("few", RELEASED, "index"),
    "parts without edges": ("apart", RELEASED, "index"),
    "parts without angles": ("straight", RELEASED, "index"),
    "no structure": ("none", SMOOTH, "morton"),
}


def batch(name: str) -> GraphBatch:
    kinds = all_kinds()
    silicon = rattled(ase.build.bulk("Si", cubic=True), 0.1)
    salt = rattled(ase.build.bulk("NaCl", "rocksalt", a=5.6), 0.1, seed=1)
    atoms = {
        "mixed": [silicon, salt, ase.build.molecule("CH3CH2OH")],
        "crystal": [rattled(ase.build.bulk("Cu", cubic=True) * (2, 1, 1), 0.1)],
        "kinds": list(kinds.values()),
        "few": [kinds["one atom with self-images"], kinds["isolated atom"]],
        "apart": [kinds["isolated atom"], kinds["dimer without an edge"], ase.build.molecule("H2O")],
        "straight": [ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 3.7]]), ase.build.molecule("NH3")],
        "none": [],
    }[name]
    return batch_of(*atoms, config=SMOOTH) if atoms else collate_graphs([])


def term(prediction: Prediction, name: str) -> Tensor:
    """Energy and stress are the whole structures' on every rank, forces and moments those of its own atoms."""
    if name == "energy":
        return prediction.energy.square().sum()
    if name == "stress":
        return torch.nan_to_num(prediction.stress).square().sum()  # molecules have no volume
    return getattr(prediction, name).square().sum()


def measured(mesh: Mesh, name: str, config: ModelConfig, partitioner: str) -> dict[str, Any]:
    """Predictions of the whole batch, and weight gradients of each term, summed over ranks and made whole."""
    together = batch(name)
    atoms = together.atoms_per_structure.tolist()
    labels = collate_labels([Labels() for _ in atoms], atoms)
    part, rows = together, np.arange(together.num_atoms)
    if mesh.graph.size > 1:
        options = {"num_parts": mesh.graph.size, "partitioner": partitioner}
        part, _ = partition_batch(together, labels, part=mesh.graph.rank, **options)
        rows = np.flatnonzero(own(together, **options).atoms == mesh.graph.rank)
    model = MatRIS(config, precision=Precision.fp64, seed=1, mesh=mesh)
    model.set_reference_energies({number: -0.1 * number for number in range(1, 95)})
    prediction = model(part, create_graph=True)
    result: dict[str, Any] = {"energy": prediction.energy.detach(), "stress": prediction.stress.detach()}
    for quantity in ("forces", "magmoms"):
        result[quantity] = torch.empty((together.num_atoms, 3) if quantity == "forces" else together.num_atoms)
        result[quantity] = result[quantity].double()
        for its_rows, values in gather_objects((rows, getattr(prediction, quantity).detach()), mesh):
            result[quantity][torch.from_numpy(its_rows)] = values
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    for key in TERMS:
        gradients = torch.autograd.grad(
            term(prediction, key), list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        # In one sum, for each of ranks that outnumber the cores takes milliseconds.
        sums = all_reduced(torch.cat([gradient.reshape(-1) for gradient in gradients]), mesh.replicas)
        pieces = sums.split([gradient.numel() for gradient in gradients])
        result[f"{key} gradients"] = {
            which: whole(piece.view_as(parameter), parameter, mesh)
            for (which, parameter), piece in zip(parameters.items(), pieces, strict=True)
        }
    result["empty"] = (part.num_atoms == 0, part.num_edges == 0, part.num_angles == 0)
    return result


def all_measured(mesh: Mesh, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: measured(mesh, *CASES[name]) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return all_measured(Mesh(), list(CASES))


def assert_equal(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    for name in TERMS:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-11, equal_nan=name == "stress", msg=f"{case}: {name}"
        )
        gradients = expected[f"{name} gradients"]
        largest = max(float(value.abs().max()) for value in gradients.values())
        for parameter, value in gradients.items():
            difference = float((found[f"{name} gradients"][parameter] - value).abs().max())
            allowed = 1e-10 * max(float(value.abs().max()), 1e-3 * largest)
            assert difference <= allowed, f"{case}: {name}, {parameter}: {difference} of {largest}"


@pytest.mark.parametrize("graph", [2, 4])
def test_equals_one_process(graph: int, alone: dict[str, dict[str, Any]]) -> None:
    results = run_ranks(graph, all_measured, list(CASES), layout={"graph": graph})
    for case, expected in alone.items():
        for found in results:
            assert_equal(found[case], expected, case)
    empty = {case: np.array([result[case]["empty"] for result in results]) for case in CASES}
    assert not empty["one crystal"].any()
    assert empty["no structure"].all()
    if graph == 4:  # some part is without atoms, edges, angles, but not all
        assert empty["parts without atoms"][:, 0].any()
        assert empty["parts without edges"][:, 1].any()
        assert empty["parts without angles"][:, 2].any()
        assert not empty["parts without angles"].all(axis=0).any()


def test_graph_and_tensor_axes_together(alone: dict[str, dict[str, Any]]) -> None:
    names = ["crystals and a molecule", "as many cuts as possible", "parts without atoms, released attention"]
    for found in run_ranks(4, all_measured, names, layout={"graph": 2, "tensor": 2}):
        for name in names:
            assert_equal(found[name], alone[name], name)


def test_terms_are_not_trivial(alone: dict[str, dict[str, Any]]) -> None:
    for name in TERMS:
        gradients = alone["crystals and a molecule"][f"{name} gradients"].values()
        assert max(float(value.abs().max()) for value in gradients) > 1e-6, name
