"""From a structure to its graph: directed and undirected edges, and the line graph. Pure numpy, no loop over atoms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import vesin

from matris.graph.structure import Structure


@dataclass(frozen=True, kw_only=True)
class GraphSize:
    """What a structure costs: atoms, directed edges and angles (ordered pairs of edges with a common centre)."""

    num_atoms: int
    num_edges: int
    num_angles: int


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Edges and angles of one structure, index arrays of int64.

    A directed edge points from a source (neighbour) to a target (centre). Each undirected edge has exactly two
    directed ones. An angle is an ordered pair of different directed edges a and b with the same target, a at most as
    long as `three_body_cutoff` and b shorter. (The released models treat an edge of exactly that length so; where the
    attention is smooth, such an edge has no weight anyway.)

    Attributes:
        structure: the structure itself.
        edge_target, edge_source: (E,) atoms; edges are sorted by target.
        edge_image: (E, 3) lattice translation n of the source: vector = r_target - (r_source + n cell).
        edge_undirected: (E,) undirected edge of each directed one.
        undirected_edge: (E/2,) first directed edge of each undirected one.
        angle_target_edge, angle_source_edge: (A,) directed edges a and b of each angle, sorted by a.
    """

    structure: Structure
    edge_target: np.ndarray
    edge_source: np.ndarray
    edge_image: np.ndarray
    edge_undirected: np.ndarray
    undirected_edge: np.ndarray
    angle_target_edge: np.ndarray
    angle_source_edge: np.ndarray

    @property
    def num_atoms(self) -> int:
        return self.structure.num_atoms

    @property
    def num_edges(self) -> int:
        return len(self.edge_target)

    @property
    def num_angles(self) -> int:
        return len(self.angle_target_edge)


def build_graph(structure: Structure, *, pairwise_cutoff: float, three_body_cutoff: float) -> Graph:
    """Neighbour graph and line graph of a structure.

    Args:
        pairwise_cutoff: largest edge length, Angstrom. No cap on the number of neighbours.
        three_body_cutoff: largest length of edges that form angles, Angstrom.

    Raises:
        ValueError: two atoms at the same place.
    """
    target, source, image = _directed_edges(structure, pairwise_cutoff)
    num_pairs = len(target) // 2
    # A canonical order makes every sum over edges independent of how the neighbour list was found.
    order = np.lexsort((image[:, 2], image[:, 1], image[:, 0], source, target))
    target, source, image = target[order], source[order], image[order]
    pair = order % num_pairs if num_pairs else order
    # Undirected edges are numbered by the first of their two directed edges.
    first_edge = np.full(num_pairs, 2 * num_pairs, dtype=np.int64)
    np.minimum.at(first_edge, pair, np.arange(2 * num_pairs))
    rank_of_pair = np.empty(num_pairs, dtype=np.int64)
    rank_of_pair[np.argsort(first_edge)] = np.arange(num_pairs)
    length = _edge_lengths(structure, target, source, image)
    short = np.nonzero(length <= three_body_cutoff)[0]
    a, b = _ordered_pairs(target[short], structure.num_atoms)
    shorter = length[short[b]] < three_body_cutoff
    return Graph(
        structure=structure,
        edge_target=target,
        edge_source=source,
        edge_image=image,
        edge_undirected=rank_of_pair[pair],
        undirected_edge=np.sort(first_edge),
        angle_target_edge=short[a[shorter]],
        angle_source_edge=short[b[shorter]],
    )


def count_graph(structure: Structure, *, pairwise_cutoff: float, three_body_cutoff: float) -> GraphSize:
    """Sizes of the graph that `build_graph` would give, without building its angles."""
    target, source, image = _directed_edges(structure, pairwise_cutoff)
    length = _edge_lengths(structure, target, source, image)
    targets = np.bincount(target[length <= three_body_cutoff], minlength=structure.num_atoms)
    sources = np.bincount(target[length < three_body_cutoff], minlength=structure.num_atoms)
    return GraphSize(
        num_atoms=structure.num_atoms,
        num_edges=len(target),
        num_angles=int((targets * sources - sources).sum()),
    )


def _directed_edges(structure: Structure, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target, source and image of all edges, (E,), (E,), (E, 3); edge k and k + E/2 are the two directions of one."""
    neighbors = vesin.NeighborList(cutoff=cutoff, full_list=False, n_threads=1)
    i, j, image, length = neighbors.compute(
        points=structure.positions, box=_complete_cell(structure), periodic=structure.pbc, quantities="ijSd"
    )
    if len(length) and length.min() < 1e-3:
        pair = int(length.argmin())
        raise ValueError(
            f"atoms {int(i[pair])} and {int(j[pair])} are {length[pair]:.1e} A apart (image {image[pair].tolist()}): "
            "two atoms at the same place have no energy; remove the duplicate"
        )
    i, j, image = i.astype(np.int64), j.astype(np.int64), image.astype(np.int64)
    return np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([image, -image])


def _edge_lengths(structure: Structure, target: np.ndarray, source: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Lengths (E,) that decide which edges form angles, Angstrom.

    In ideal crystals many edges are exactly as long as the cutoff, and rounding decides. The neighbour list of the
    released models wraps the source into the cell before it adds the image; done here in the same order, so that the
    same edges fall on the same side.
    """
    cell = _complete_cell(structure)
    fractional = structure.positions @ np.linalg.inv(cell)
    turns = np.where(structure.pbc, np.floor(fractional), 0.0)
    wrapped = (fractional - turns) @ cell
    vector = wrapped[source] + (image + turns[source]) @ cell - structure.positions[target]
    return np.sqrt((vector * vector).sum(axis=1))


def _complete_cell(structure: Structure) -> np.ndarray:
    """The cell with unit vectors, orthogonal to the periodic ones, in place of vectors that are not periodic.

    A non-periodic lattice vector has no meaning for the neighbours, and may be zero or parallel to another one.
    """
    if structure.pbc.all():
        return structure.cell
    periodic = structure.cell[structure.pbc]
    # Rows of the full V matrix beyond the rank span what the periodic vectors leave open.
    _, _, directions = np.linalg.svd(periodic.reshape(-1, 3), full_matrices=True)
    cell = np.empty((3, 3))
    cell[structure.pbc] = periodic
    cell[~structure.pbc] = directions[len(periodic) :]
    return cell


def _ordered_pairs(centers: np.ndarray, num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of different positions in `centers` (M,), which is sorted, that hold the same centre."""
    degree = np.bincount(centers, minlength=num_atoms)
    start = np.cumsum(degree) - degree
    partners = degree[centers]
    first = np.repeat(np.arange(len(centers)), partners)
    offset = np.arange(len(first)) - np.repeat(np.cumsum(partners) - partners, partners)
    second = np.repeat(start[centers], partners) + offset
    different = first != second
    return first[different], second[different]
