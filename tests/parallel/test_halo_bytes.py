"""What a step of MatRIS sends over the graph axis: the ledger against closed formulas, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from janus.graph_parallel.halo import HaloPlan
from janus.mesh import Mesh
from matris.config import ModelConfig, Precision
from matris.graph.batch import GraphBatch, collate_labels
from matris.graph.partition import partition_batch
from matris.graph.structure import Labels
from matris.model import MatRIS
from tests.parallel.ranks import run_ranks
from tests.parallel.test_graph_parallel import RELEASED, SMOOTH, batch

NUMBER = 8  # bytes of a float64


def both_ways(plan: HaloPlan, row_bytes: int) -> int:
    """Bytes of one exchange and of its adjoint."""
    return plan.gather_bytes(row_bytes) + plan.reduce_bytes(row_bytes)


def exchanges(config: ModelConfig) -> tuple[int, int]:
    """Exchanges of undirected edges and of atoms in one forward pass.

    Line attention borrows edges and returns four sums over angles; atom attention borrows atoms and edges, and returns
    two sums over edges to the atoms and a mean to the edges; line refinement borrows edges and returns a sum; atom
    refinement borrows atoms and edges, and returns a mean to the edges, which the last block leaves out.
    """
    edges = config.num_layers * ((1 + 4) + (1 + 1) + (1 + 1) + (1 + 1)) - 1
    atoms = config.num_layers * ((1 + 2) + 1)
    return edges, atoms


def of_training(part: GraphBatch, config: ModelConfig) -> tuple[int, int]:
    """Bytes and calls of energy, forces, stress and the weight gradients of a loss of them.

    Each exchange runs once forward, its adjoint in the force pass, and both of them are differentiated once more. Not
    so: the atoms that the first block borrows do not depend on positions, hence take no part in the force pass; the
    positions, on whose exchange no weight acts, so that it is not differentiated for weights; the largest logits of the
    released attention, which are constants.
    """
    width = config.hidden_size * NUMBER
    edges, atoms = exchanges(config)
    atom_halo, edge_halo = part.atom_halo, part.edge_halo
    assert atom_halo is not None
    assert edge_halo is not None
    sent = 2 * edges * both_ways(edge_halo, width) + (2 * atoms - 1) * both_ways(atom_halo, width)
    sent += both_ways(atom_halo, 3 * NUMBER) + atom_halo.gather_bytes(3 * NUMBER)
    calls = 4 * edges + 4 * atoms - 2 + 3
    if not config.smooth_attention:
        sent += config.num_layers * (2 * both_ways(edge_halo, width) + both_ways(atom_halo, width))
        calls += config.num_layers * (2 + 1) * 2
    return sent, calls


def of_prediction(part: GraphBatch, config: ModelConfig) -> int:
    """Bytes of energy and forces without weight gradients: each exchange and its adjoint."""
    width = config.hidden_size * NUMBER
    edges, atoms = exchanges(replace(config, smooth_attention=True))
    assert part.atom_halo is not None
    assert part.edge_halo is not None
    sent = edges * both_ways(part.edge_halo, width) + (atoms - 1) * both_ways(part.atom_halo, width)
    return sent + part.atom_halo.gather_bytes(width) + both_ways(part.atom_halo, 3 * NUMBER)


def counted(mesh: Mesh, name: str, config: ModelConfig) -> int:
    """Runs a step and compares. Returns the bytes that this rank sends to others."""
    whole = batch(name)
    atoms = whole.atoms_per_structure.tolist()
    labels = collate_labels([Labels() for _ in atoms], atoms)
    part, _ = partition_batch(whole, labels, num_parts=mesh.graph.size, part=mesh.graph.rank, partitioner="morton")
    model = MatRIS(config, precision=Precision.fp64, seed=0, mesh=mesh)
    ledger = mesh.ledger
    ledger.clear()
    prediction = model(part, create_graph=True)
    loss = prediction.energy.square().sum() + prediction.forces.square().sum() + prediction.magmoms.sum()
    loss = loss + prediction.stress[prediction.stress.isfinite()].square().sum()
    loss.backward(inputs=[value for value in model.parameters() if value.requires_grad])
    sent, calls = of_training(part, config)
    assert ledger.bytes["graph/all_to_all"] == ledger.wire_bytes["graph/all_to_all"] == sent
    assert ledger.calls["graph/all_to_all"] == calls
    # Interaction and reference energies, and the gradient of the strain; their adjoints send nothing.
    assert ledger.calls["graph/all_reduce"] == 3
    assert ledger.bytes["graph/all_reduce"] == (1 + 1 + 9) * NUMBER * whole.num_structures
    assert set(ledger.calls) == {"graph/all_to_all", "graph/all_reduce"}
    if config.smooth_attention:
        ledger.clear()
        model(part, stress=False)
        assert ledger.bytes["graph/all_to_all"] == of_prediction(part, config)
    return sent


def all_counted(mesh: Mesh) -> list[int]:
    return [counted(mesh, name, config) for name in ("mixed", "crystal", "few") for config in (SMOOTH, RELEASED)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_of_a_step(world_size: int) -> None:
    results = run_ranks(world_size, all_counted, layout={"graph": world_size})
    assert sum(map(sum, results)) > 0
