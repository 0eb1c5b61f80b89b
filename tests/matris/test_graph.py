"""Graphs against ASE's neighbour list and against direct enumeration."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from matris.graph.batch import collate_graphs, collate_labels
from matris.graph.build import build_graph, count_graph
from matris.graph.structure import Labels, Structure
from tests.matris.structures import all_kinds

CUTOFFS = {"pairwise_cutoff": 5.0, "three_body_cutoff": 4.0}
KINDS = all_kinds()


@pytest.mark.parametrize("name", KINDS)
def test_edges_are_those_of_ase(name):
    graph = build_graph(Structure.from_atoms(KINDS[name]), **CUTOFFS)
    i, j, image = neighbor_list("ijS", KINDS[name], CUTOFFS["pairwise_cutoff"])
    expected = sorted(map(tuple, np.column_stack([i, j, image]).tolist()))
    found = np.column_stack([graph.edge_target, graph.edge_source, graph.edge_image]).tolist()
    assert sorted(map(tuple, found)) == expected
    assert (np.diff(graph.edge_target) >= 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_undirected_edges_pair_both_directions(name):
    graph = build_graph(Structure.from_atoms(KINDS[name]), **CUTOFFS)
    assert 2 * len(graph.undirected_edge) == graph.num_edges
    directed = np.column_stack([graph.edge_target, graph.edge_source, graph.edge_image])
    backward = np.column_stack([graph.edge_source, graph.edge_target, -graph.edge_image])
    for undirected in range(len(graph.undirected_edge)):
        first, second = np.nonzero(graph.edge_undirected == undirected)[0]
        assert graph.undirected_edge[undirected] == first
        assert (directed[first] == backward[second]).all()


@pytest.mark.parametrize("name", KINDS)
def test_angles_are_all_ordered_pairs_of_short_edges(name):
    atoms = KINDS[name]
    structure = Structure.from_atoms(atoms)
    graph = build_graph(structure, **CUTOFFS)
    vectors = (
        atoms.positions[graph.edge_target] - atoms.positions[graph.edge_source] - graph.edge_image @ atoms.cell.array
    )
    short = np.nonzero(np.linalg.norm(vectors, axis=1) < CUTOFFS["three_body_cutoff"])[0]
    expected = {(a, b) for a in short for b in short if a != b and graph.edge_target[a] == graph.edge_target[b]}
    found = list(zip(graph.angle_target_edge.tolist(), graph.angle_source_edge.tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert (np.diff(graph.angle_target_edge) >= 0).all()
    size = count_graph(structure, **CUTOFFS)
    assert (size.num_atoms, size.num_edges, size.num_angles) == (len(atoms), graph.num_edges, graph.num_angles)


def test_known_count():
    # fcc copper: 18 neighbours within 4 A make 18 * 17 angles per atom.
    atoms = KINDS["fcc supercell"]
    atoms = Atoms("Cu", cell=[[0, 1.805, 1.805], [1.805, 0, 1.805], [1.805, 1.805, 0]], pbc=True)
    assert count_graph(Structure.from_atoms(atoms), pairwise_cutoff=6.0, three_body_cutoff=4.0).num_angles == 306


def test_batches_shift_indices_only():
    graphs = [build_graph(Structure.from_atoms(atoms), **CUTOFFS) for atoms in KINDS.values()]
    batch = collate_graphs(graphs)
    assert batch.num_structures == len(graphs)
    assert batch.num_edges == sum(graph.num_edges for graph in graphs)
    edges_of = batch.structure_index[batch.edge_target]
    assert (edges_of == batch.structure_index[batch.edge_source]).all()
    assert (batch.edge_target[batch.angle_target_edge] == batch.angle_center).all()
    assert (batch.edge_target[batch.angle_source_edge] == batch.angle_center).all()
    assert (batch.edge_undirected[batch.undirected_edge].numpy() == np.arange(batch.num_edges // 2)).all()


def test_labels_are_masked_not_filled():
    labels = [Labels(energy=-1.0, forces=np.ones((2, 3))), Labels(stress=np.eye(3), magmoms=np.ones(1))]
    batch = collate_labels(labels, [2, 1])
    assert batch.energy_mask.tolist() == [True, False]
    assert batch.forces_mask.tolist() == [True, False]
    assert batch.stress_mask.tolist() == [False, True]
    assert batch.magmoms_mask.tolist() == [False, True]
    assert batch.forces.shape == (3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.array([0, 6])}, "atomic number 0"),
        ({"numbers": np.array([6, 119])}, "atomic number 119"),
        ({"positions": np.array([[0.0, 0.0, np.nan], [1.0, 0.0, 0.0]])}, "position of atom 0"),
        ({"positions": np.zeros((3, 3))}, "shapes"),
        ({"cell": np.diag([np.inf, 1.0, 1.0])}, "cell is"),
        ({"pbc": np.array([True, False, False])}, "linearly independent"),
        ({"numbers": np.array([], dtype=int), "positions": np.zeros((0, 3))}, "no atoms"),
    ],
)
def test_bad_structures_are_refused(change, message):
    good = {
        "numbers": np.array([6, 8]),
        "positions": np.array([[0.0, 0, 0], [1.1, 0, 0]]),
        "cell": np.zeros((3, 3)),
        "pbc": np.zeros(3, dtype=bool),
    }
    Structure(**good)
    with pytest.raises(ValueError, match=message):
        Structure(**{**good, **change})
    if message != "shapes":  # of arrays that are joined they are right
        with pytest.raises(ValueError, match=message):
            several(Structure(**good), SimpleNamespace(**{**good, **change}))


def several(*structures):
    """Of the arrays of some."""
    sizes = [len(structure.numbers) for structure in structures]
    ends = np.cumsum(sizes)
    return Structure.several(
        numbers=np.concatenate([structure.numbers for structure in structures]),
        positions=np.concatenate([structure.positions for structure in structures]),
        cells=np.stack([structure.cell for structure in structures]),
        pbc=np.stack([structure.pbc for structure in structures]),
        atoms=[slice(end - size, end) for end, size in zip(ends, sizes, strict=True)],
    )


def test_several_structures_are_each_one():
    expected = [Structure.from_atoms(atoms) for atoms in KINDS.values()]
    for got, structure in zip(several(*expected), expected, strict=True):
        for name, value in vars(structure).items():
            np.testing.assert_array_equal(getattr(got, name), value, strict=True)


def test_coincident_atoms_are_refused():
    with pytest.raises(ValueError, match="same place"):
        build_graph(Structure.from_atoms(Atoms("H2", [[0, 0, 0], [0, 0, 1e-5]])), **CUTOFFS)
