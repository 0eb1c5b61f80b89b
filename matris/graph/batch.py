"""Batches: graphs of several structures as one graph without edges between them, and their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from janus.graph_parallel.halo import HaloPlan
from matris.graph.build import Graph
from matris.graph.structure import Labels

_T = TypeVar("_T", bound="_TensorFields")


@dataclass(frozen=True, kw_only=True)
class _TensorFields:
    """A frozen dataclass whose fields are tensors, plans of exchanges, or None."""

    def to(self: _T, device: torch.device | str) -> _T:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self: _T) -> _T:
        """The same batch in page-locked memory."""
        return self._map(lambda value: value.pin_memory())

    def _map(self: _T, function: Callable[[Any], Any]) -> _T:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else function(value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class GraphBatch(_TensorFields):
    """Structures of a batch. N atoms, E directed edges, U = E/2 undirected edges, A angles, G structures.

    Or one rank's part of it (`matris.graph.partition`): then N, E and A count what the rank owns; sources, undirected
    edges and what refers to them are local rows, the owned ones first, then those borrowed from other ranks.

    Attributes:
        numbers: (N,) int64 atomic numbers.
        positions: (N, 3) float64, Angstrom.
        cell: (G, 3, 3) float64, lattice vectors as rows, Angstrom.
        structure_index: (N,) int64 structure of each atom.
        atoms_per_structure: (G,) int64.
        task: (G,) int64 number of each structure's level of theory.
        charge: (G,) float64 total charge, e; NaN where it is not stated.
        spin: (G,) float64 spin multiplicity 2S + 1; 0 where it is not stated.
        edge_target, edge_source: (E,) int64 atoms, sorted by target.
        edge_image: (E, 3) int64 lattice translation of the source.
        edge_undirected: (E,) int64; undirected_edge: (E/2,) int64 (see `Graph`).
        angle_target_edge, angle_source_edge: (A,) int64 directed edges a and b, sorted by a.
        angle_target, angle_source: (A,) int64 undirected edges of a and b, the nodes of the line graph.
        angle_center: (A,) int64 common target atom.
        atom_halo, edge_halo: which atoms and undirected edges are borrowed; None for a whole batch.
    """

    numbers: Tensor
    positions: Tensor
    cell: Tensor
    structure_index: Tensor
    atoms_per_structure: Tensor
    task: Tensor
    charge: Tensor
    spin: Tensor
    edge_target: Tensor
    edge_source: Tensor
    edge_image: Tensor
    edge_undirected: Tensor
    undirected_edge: Tensor
    angle_target_edge: Tensor
    angle_source_edge: Tensor
    angle_target: Tensor
    angle_source: Tensor
    angle_center: Tensor
    atom_halo: HaloPlan | None = None
    edge_halo: HaloPlan | None = None

    @property
    def num_structures(self) -> int:
        return len(self.atoms_per_structure)

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    @property
    def num_edges(self) -> int:
        return len(self.edge_target)

    @property
    def num_undirected(self) -> int:
        """Undirected edges that are owned."""
        return len(self.undirected_edge) if self.edge_halo is None else self.edge_halo.num_owned

    @property
    def num_angles(self) -> int:
        return len(self.angle_target)


@dataclass(frozen=True, kw_only=True)
class LabelBatch(_TensorFields):
    """Labels of a batch, float64; entries whose mask is False are zero and must not be read.

    Attributes:
        energy: (G,) eV; energy_mask: (G,) bool.
        forces: (N, 3) eV/A; forces_mask: (G,) bool.
        stress: (G, 3, 3) eV/A^3; stress_mask: (G,) bool.
        magmoms: (N,) Bohr magnetons; magmoms_mask: (G,) bool.
    """

    energy: Tensor
    energy_mask: Tensor
    forces: Tensor
    forces_mask: Tensor
    stress: Tensor
    stress_mask: Tensor
    magmoms: Tensor
    magmoms_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class LabelTotals:
    """How many labels the global batch has: the denominators of the loss terms, known before any micro-batch is read.

    Attributes:
        energy_structures, forces_structures, stress_structures: structures with that label.
        forces_atoms, magmoms_atoms: atoms of the structures with forces, with magnetic moments.
    """

    energy_structures: float
    forces_structures: float
    forces_atoms: float
    stress_structures: float
    magmoms_atoms: float

    @staticmethod
    def of(labels: Iterable[tuple[GraphBatch, LabelBatch]]) -> LabelTotals:
        """Counted from batches themselves."""
        counts = torch.zeros(5, dtype=torch.float64)
        for graph, label in labels:
            atoms = graph.atoms_per_structure
            counts += torch.stack(
                [
                    label.energy_mask.sum(),
                    label.forces_mask.sum(),
                    atoms[label.forces_mask].sum(),
                    label.stress_mask.sum(),
                    atoms[label.magmoms_mask].sum(),
                ]
            ).cpu()
        energy, forces, forces_atoms, stress, magmoms = counts.tolist()
        return LabelTotals(
            energy_structures=energy,
            forces_structures=forces,
            forces_atoms=forces_atoms,
            stress_structures=stress,
            magmoms_atoms=magmoms,
        )


def collate_graphs(
    graphs: Sequence[Graph],
    *,
    tasks: Sequence[int] | None = None,
    charges: Sequence[float] | None = None,
    spins: Sequence[float] | None = None,
) -> GraphBatch:
    """Join graphs into one batch; indices are shifted, nothing else changes. Without graphs the batch is empty.

    Args:
        tasks, charges, spins: of each structure, as in `GraphBatch`; task 0 and nothing stated by default.
    """
    atoms = np.array([graph.num_atoms for graph in graphs], dtype=np.int64)
    edges = np.array([graph.num_edges for graph in graphs], dtype=np.int64)
    atom_offset = np.cumsum(atoms) - atoms
    edge_offset = np.cumsum(edges) - edges

    def join(name: str, offsets: np.ndarray) -> np.ndarray:
        shifted = [getattr(graph, name) + offset for graph, offset in zip(graphs, offsets, strict=True)]
        return np.concatenate([np.empty(0, np.int64), *shifted])

    edge_target = join("edge_target", atom_offset)
    edge_undirected = join("edge_undirected", edge_offset // 2)
    angle_target_edge = join("angle_target_edge", edge_offset)
    angle_source_edge = join("angle_source_edge", edge_offset)
    structures = [graph.structure for graph in graphs]
    arrays = {
        "numbers": np.concatenate([np.empty(0, np.int64), *(structure.numbers for structure in structures)]),
        "positions": np.concatenate([np.empty((0, 3)), *(structure.positions for structure in structures)]),
        "cell": np.array([structure.cell for structure in structures]).reshape(-1, 3, 3),
        "structure_index": np.repeat(np.arange(len(graphs)), atoms),
        "atoms_per_structure": atoms,
        "task": np.zeros(len(graphs), np.int64) if tasks is None else np.array(tasks, np.int64),
        "charge": np.full(len(graphs), np.nan) if charges is None else np.array(charges, np.float64),
        "spin": np.zeros(len(graphs)) if spins is None else np.array(spins, np.float64),
        "edge_target": edge_target,
        "edge_source": join("edge_source", atom_offset),
        "edge_image": np.concatenate([np.empty((0, 3), np.int64), *(graph.edge_image for graph in graphs)]),
        "edge_undirected": edge_undirected,
        "undirected_edge": join("undirected_edge", edge_offset),
        "angle_target_edge": angle_target_edge,
        "angle_source_edge": angle_source_edge,
        "angle_target": edge_undirected[angle_target_edge],
        "angle_source": edge_undirected[angle_source_edge],
        "angle_center": edge_target[angle_target_edge],
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return GraphBatch(**tensors)


def collate_labels(labels: Sequence[Labels], num_atoms: Sequence[int]) -> LabelBatch:
    """Stack labels, with masks for the missing ones. Without labels the result is empty.

    Args:
        labels: one per structure.
        num_atoms: atoms of each structure.
    """

    def per_atom(name: str, width: tuple[int, ...]) -> Tensor:
        rows = [
            np.zeros((count, *width)) if getattr(label, name) is None else np.asarray(getattr(label, name), np.float64)
            for label, count in zip(labels, num_atoms, strict=True)
        ]
        return torch.from_numpy(np.concatenate([np.empty((0, *width)), *rows]))

    def mask(name: str) -> Tensor:
        return torch.tensor([getattr(label, name) is not None for label in labels], dtype=torch.bool)

    stress = [np.zeros((3, 3)) if label.stress is None else label.stress for label in labels]
    return LabelBatch(
        energy=torch.tensor([label.energy or 0.0 for label in labels], dtype=torch.float64),
        energy_mask=mask("energy"),
        forces=per_atom("forces", (3,)),
        forces_mask=mask("forces"),
        stress=torch.from_numpy(np.array(stress, dtype=np.float64).reshape(-1, 3, 3)),
        stress_mask=mask("stress"),
        magmoms=per_atom("magmoms", ()),
        magmoms_mask=mask("magmoms"),
    )
