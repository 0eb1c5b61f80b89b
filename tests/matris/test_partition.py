"""Parts of a batch: together they are the whole batch, and each has all that its owner needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from janus.graph_parallel.partition import PARTITIONERS
from matris.graph.batch import GraphBatch, LabelBatch, collate_graphs, collate_labels
from matris.graph.partition import cut_report, own, partition_batch
from matris.graph.structure import Labels
from tests.matris.structures import all_kinds, batch_of

KINDS = all_kinds()


def labels_of(batch: GraphBatch) -> LabelBatch:
    atoms = batch.atoms_per_structure.tolist()
    rng = np.random.default_rng(0)
    labels = [
        Labels(energy=1.0 + n, forces=rng.normal(size=(n, 3)), stress=np.eye(3), magmoms=rng.normal(size=n))
        for n in atoms
    ]
    return collate_labels(labels, atoms)


def vectors(batch: GraphBatch, positions: torch.Tensor) -> torch.Tensor:
    """Edge vectors (E, 3) from local positions."""
    shift = torch.einsum("ex,exy->ey", batch.edge_image.double(), batch.cell[batch.structure_index[batch.edge_target]])
    return positions[batch.edge_target] - positions[batch.edge_source] - shift


def assert_parts_are_the_whole(batch: GraphBatch, num_parts: int, partitioner: str) -> None:
    labels = labels_of(batch)
    owners = own(batch, num_parts, partitioner)
    parts = [
        partition_batch(batch, labels, num_parts=num_parts, part=part, partitioner=partitioner)
        for part in range(num_parts)
    ]
    whole_vectors = vectors(batch, batch.positions)
    atoms, edges, undirected, angles = [], [], [], []
    for part, (local, local_labels) in enumerate(parts):
        atom_halo, atom_rows = owners.atom_reads.plan(part)
        _, edge_rows = owners.edge_reads.plan(part)
        own_atoms = torch.from_numpy(atom_rows[: local.num_atoms])
        own_edges = torch.from_numpy(np.flatnonzero(owners.edge_reads.reader == part))
        own_angles = torch.from_numpy(np.flatnonzero(owners.atoms[batch.angle_center.numpy()] == part))
        atoms.append(own_atoms)
        edges.append(own_edges)
        undirected.append(torch.from_numpy(edge_rows[: local.num_undirected]))
        angles.append(own_angles)
        # Rows refer to the same atoms and edges as in the whole batch.
        rows = torch.from_numpy(atom_rows)
        assert torch.equal(rows[local.edge_target], batch.edge_target[own_edges])
        assert torch.equal(rows[local.edge_source], batch.edge_source[own_edges])
        assert torch.equal(rows[local.angle_center], batch.angle_center[own_angles])
        assert torch.equal(torch.from_numpy(edge_rows)[local.edge_undirected], batch.edge_undirected[own_edges])
        assert torch.equal(own_edges[local.angle_target_edge], batch.angle_target_edge[own_angles])
        assert torch.equal(own_edges[local.angle_source_edge], batch.angle_source_edge[own_angles])
        assert torch.equal(local.edge_undirected[local.angle_target_edge], local.angle_target)
        assert torch.equal(local.edge_undirected[local.angle_source_edge], local.angle_source)
        assert (local.edge_target < local.num_atoms).all()
        assert (local.edge_source < atom_halo.num_local).all()
        assert (torch.diff(local.edge_target) >= 0).all()
        assert (torch.diff(local.angle_target_edge) >= 0).all()
        # A local direction stands for each local undirected edge; for an owned one the first of the whole batch.
        assert torch.equal(local.edge_undirected[local.undirected_edge], torch.arange(len(edge_rows)))
        assert torch.equal(
            own_edges[local.undirected_edge[: local.num_undirected]], batch.undirected_edge[undirected[-1]]
        )
        # Geometry.
        torch.testing.assert_close(vectors(local, batch.positions[rows]), whole_vectors[own_edges], rtol=0, atol=0)
        # Values of atoms and labels.
        for name in ("numbers", "positions", "structure_index"):
            assert torch.equal(getattr(local, name), getattr(batch, name)[own_atoms])
        for name in ("forces", "magmoms"):
            assert torch.equal(getattr(local_labels, name), getattr(labels, name)[own_atoms])
        for name in ("energy", "stress", "energy_mask", "forces_mask"):
            assert torch.equal(getattr(local_labels, name), getattr(labels, name))
        assert torch.equal(local.cell, batch.cell)
        assert torch.equal(local.atoms_per_structure, batch.atoms_per_structure)
    for found, count in (
        (atoms, batch.num_atoms),
        (edges, batch.num_edges),
        (undirected, batch.num_undirected),
        (angles, batch.num_angles),
    ):
        assert torch.equal(torch.cat(found).sort().values, torch.arange(count))


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_a_batch_of_all_kinds(partitioner: str, num_parts: int) -> None:
    assert_parts_are_the_whole(batch_of(*KINDS.values()), num_parts, partitioner)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_parts", [2, 4])
def test_each_kind_alone(name: str, num_parts: int) -> None:
    """Among them are structures with fewer atoms than parts, without angles and without edges."""
    assert_parts_are_the_whole(batch_of(KINDS[name]), num_parts, "morton")


def test_a_batch_without_structures() -> None:
    batch = collate_graphs([])
    assert (batch.num_structures, batch.num_atoms, batch.num_edges, batch.num_angles) == (0, 0, 0, 0)
    assert_parts_are_the_whole(batch, 3, "morton")


def test_some_part_is_empty() -> None:
    batch = batch_of(KINDS["isolated atom"], KINDS["dimer without an angle"])
    sizes = [
        partition_batch(batch, labels_of(batch), num_parts=8, part=part, partitioner="balanced")[0].num_atoms
        for part in range(8)
    ]
    assert sum(sizes) == 3
    assert 0 in sizes


def test_cuts_are_measured() -> None:
    """A long bar: the curve cuts it across, and every part but the ends has two neighbours."""
    bar = Atoms("Cu512", np.stack(np.meshgrid(np.arange(128), [0, 1], [0, 1]), axis=-1).reshape(-1, 3) * 2.5)
    batch = batch_of(bar)
    reports = {name: cut_report(batch, num_parts=4, partitioner=name) for name in PARTITIONERS}
    assert reports["morton"].imbalance < 1.05
    assert reports["balanced"].imbalance < 1.02
    assert reports["morton"].cost.sum() == batch.num_atoms + batch.num_edges + batch.num_angles
    borrowed = reports["morton"].atoms
    assert np.diag(borrowed).sum() == 0
    assert (borrowed > 0).sum() == 6  # three cuts, both ways
    assert reports["morton"].atoms.sum() < 0.2 * reports["balanced"].atoms.sum()
    assert reports["morton"].edges.sum() < 0.2 * reports["balanced"].edges.sum()
