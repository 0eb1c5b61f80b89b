"""Structures of every kind that a graph must handle, and shorthands to run a model on them."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from matris.config import ModelConfig, Precision
from matris.graph.batch import GraphBatch, collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS, Prediction


def rattled(atoms: Atoms, scale: float = 0.05, seed: int = 0) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(scale=scale, size=atoms.positions.shape)
    return atoms


def _left_handed() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.set_cell(atoms.cell[[1, 0, 2]], scale_atoms=False)
    return atoms


def _mixed(pbc) -> Atoms:
    atoms = bulk("Si")
    atoms.pbc = pbc
    return atoms


def all_kinds() -> dict[str, Atoms]:
    """By name: dense and sparse crystals, self-images, slabs, wires, molecules, isolated atoms, odd cells."""
    return {
        "fcc supercell": rattled(bulk("Cu", cubic=True) * (2, 2, 1)),
        "one atom with self-images": bulk("Fe"),
        "one atom, thin triclinic cell": Atoms("Al", cell=[[2.4, 0, 0], [1.1, 2.5, 0], [0.3, 0.9, 9.0]], pbc=True),
        "left-handed cell": rattled(_left_handed()),
        "slab": rattled(fcc111("Pt", (2, 2, 2), vacuum=8.0)),
        "wire": Atoms("C2", [[0, 0, 0], [1.4, 0.2, 0]], cell=[2.8, 0, 0], pbc=[True, False, False]),
        "periodic in x and z": rattled(_mixed([True, False, True])),
        "molecule without a cell": molecule("C2H6"),
        "molecule in a box, not periodic": Atoms(
            "H2O", [[0, 0, 0.1], [0, 0.76, -0.5], [0, -0.76, -0.5]], cell=[4, 4, 4]
        ),
        "isolated atom": Atoms("He"),
        "dimer without an edge": Atoms("Ar2", [[0, 0, 0], [0, 0, 7.0]]),
        "dimer without an angle": Atoms("Ar2", [[0, 0, 0], [0, 0, 5.0]]),
        "atoms far outside the cell": Atoms("Si2", [[100, 7, -33], [101.3, 8.4, -31.6]], cell=[5.4] * 3, pbc=True),
    }


TINY = ModelConfig(num_layers=2, hidden_size=16, readout_hidden_sizes=(16,), pairwise_cutoff=5.0, three_body_cutoff=4.0)

EXPERTS = ModelConfig(
    **{
        **vars(TINY),
        "num_elements": 118,
        "num_moe_experts": 5,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12,
        "kv_channels": 4,
    }
)


def batch_of(*atoms: Atoms, config: ModelConfig = TINY) -> GraphBatch:
    cutoffs = {"pairwise_cutoff": config.pairwise_cutoff, "three_body_cutoff": config.three_body_cutoff}
    return collate_graphs([build_graph(Structure.from_atoms(item), **cutoffs) for item in atoms])


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> MatRIS:
    return MatRIS(config, precision=Precision.fp64, seed=seed)


def predict(model: MatRIS, *atoms: Atoms) -> Prediction:
    return model(batch_of(*atoms, config=model.hyper))
