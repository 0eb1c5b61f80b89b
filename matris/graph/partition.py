"""One rank's part of a batch whose atoms are shared over the graph axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from janus.graph_parallel.partition import Nodes, Reads, assign_owners
from matris.graph.batch import GraphBatch, LabelBatch


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Which part owns what: an atom's owner also has the directed edges that end at it and their angles.

    Attributes:
        atoms: (N,) owner of each atom.
        cost: (N,) work of each atom: itself, its edges and its angles.
        atom_reads: which atoms a part needs: the sources of its directed edges.
        edge_reads: which undirected edges it needs: those of its directed edges. An undirected edge belongs to the
            owner of its first direction.
    """

    atoms: np.ndarray
    cost: np.ndarray
    atom_reads: Reads
    edge_reads: Reads


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """How well a batch is cut.

    Attributes:
        cost: (num_parts,) work of each part.
        atoms, edges: (num_parts, num_parts) atoms and undirected edges that one part (first index) lends to another.
    """

    cost: np.ndarray
    atoms: np.ndarray
    edges: np.ndarray

    @property
    def imbalance(self) -> float:
        """Largest cost over the mean one."""
        return float(self.cost.max() / max(self.cost.mean(), 1e-300))


def own(batch: GraphBatch, num_parts: int, partitioner: str) -> Ownership:
    """Divides the atoms of a whole batch; the same on every rank."""
    target, source = batch.edge_target.numpy(), batch.edge_source.numpy()
    cost = 1 + np.bincount(target, minlength=batch.num_atoms)
    cost = cost + np.bincount(batch.angle_center.numpy(), minlength=batch.num_atoms)
    nodes = Nodes(positions=_wrapped(batch), group=batch.structure_index.numpy(), cost=cost)
    atoms = assign_owners(partitioner, nodes, num_parts)
    reader = atoms[target]
    return Ownership(
        atoms=atoms,
        cost=cost,
        atom_reads=Reads(owner=atoms, reader=reader, row=source, num_parts=num_parts),
        edge_reads=Reads(
            owner=reader[batch.undirected_edge.numpy()],
            reader=reader,
            row=batch.edge_undirected.numpy(),
            num_parts=num_parts,
        ),
    )


def cut_report(batch: GraphBatch, *, num_parts: int, partitioner: str) -> CutReport:
    """Measures what a partitioner does to a whole batch."""
    owners = own(batch, num_parts, partitioner)
    return CutReport(
        cost=np.bincount(owners.atoms, weights=owners.cost, minlength=num_parts),
        atoms=owners.atom_reads.cut(),
        edges=owners.edge_reads.cut(),
    )


def partition_batch(
    batch: GraphBatch, labels: LabelBatch, *, num_parts: int, part: int, partitioner: str
) -> tuple[GraphBatch, LabelBatch]:
    """One part of a whole batch: owned atoms, edges and angles, plans for what it borrows, and labels of its atoms.

    Needs no communication: every rank of the graph axis divides the same batch in the same way. Cells, atom counts,
    energies and stresses stay those of the whole structures.
    """
    owners = own(batch, num_parts, partitioner)
    atom_halo, atom_rows = owners.atom_reads.plan(part)
    edge_halo, edge_rows = owners.edge_reads.plan(part)
    owned = torch.from_numpy(atom_rows[: atom_halo.num_owned])
    edges = np.flatnonzero(owners.edge_reads.reader == part)
    angles = np.flatnonzero(owners.atoms[batch.angle_center.numpy()] == part)
    local_atom = _inverse(atom_rows, batch.num_atoms)
    local_undirected = _inverse(edge_rows, batch.num_undirected)
    local_edge = _inverse(edges, batch.num_edges)
    edge_undirected = local_undirected[batch.edge_undirected.numpy()[edges]]
    # The first local direction stands for its undirected edge: of an owned one that is the first of the whole batch.
    undirected_edge = np.empty(len(edge_rows), dtype=np.int64)
    undirected_edge[edge_undirected[::-1]] = np.arange(len(edges))[::-1]
    graph = GraphBatch(
        numbers=batch.numbers[owned],
        positions=batch.positions[owned],
        cell=batch.cell,
        structure_index=batch.structure_index[owned],
        atoms_per_structure=batch.atoms_per_structure,
        task=batch.task,
        charge=batch.charge,
        spin=batch.spin,
        edge_target=_take(local_atom, batch.edge_target, edges),
        edge_source=_take(local_atom, batch.edge_source, edges),
        edge_image=batch.edge_image[torch.from_numpy(edges)],
        edge_undirected=torch.from_numpy(edge_undirected),
        undirected_edge=torch.from_numpy(undirected_edge),
        angle_target_edge=_take(local_edge, batch.angle_target_edge, angles),
        angle_source_edge=_take(local_edge, batch.angle_source_edge, angles),
        angle_target=_take(local_undirected, batch.angle_target, angles),
        angle_source=_take(local_undirected, batch.angle_source, angles),
        angle_center=_take(local_atom, batch.angle_center, angles),
        atom_halo=atom_halo,
        edge_halo=edge_halo,
    )
    return graph, replace(labels, forces=labels.forces[owned], magmoms=labels.magmoms[owned])


def _take(local: np.ndarray, values: Tensor, chosen: np.ndarray) -> Tensor:
    return torch.from_numpy(local[values.numpy()[chosen]])


def _inverse(rows: np.ndarray, count: int) -> np.ndarray:
    """(count,) local number of each row; -1 for those that are not here."""
    local = np.full(count, -1, dtype=np.int64)
    local[rows] = np.arange(len(rows))
    return local


def _wrapped(batch: GraphBatch) -> np.ndarray:
    """Positions inside the cells that have a volume: close atoms of a crystal should be close along a curve too."""
    positions, structure = batch.positions.numpy(), batch.structure_index.numpy()
    cell = batch.cell.numpy()
    has_volume = np.abs(np.linalg.det(cell)) > 0.0
    whole = np.where(has_volume[:, None, None], cell, np.eye(3))
    fractional = np.einsum("nx,nxy->ny", positions, np.linalg.inv(whole)[structure])
    wrapped = np.einsum("nx,nxy->ny", fractional - np.floor(fractional), whole[structure])
    return np.where(has_volume[structure, None], wrapped, positions)
