"""Whether two models are one: energies, forces, stress and magnetic moments of a small crystal."""

from __future__ import annotations

import numpy as np
import torch

from matris.exported import StoredModel
from matris.graph.batch import GraphBatch, collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS
from matris.pruning import pruned

_NUM_ELEMENTS = 3
_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Differences that the order of sums makes, relative to the largest value, or to 1 eV, eV/A, ..."""


def check_equal(before: StoredModel, after: StoredModel) -> str:
    """Compares predictions in the models' precision; of experts only those that serve the structure are read.

    Returns:
        What was compared, for the user.

    Raises:
        ValueError: they differ by more than rounding; says by how much.
    """
    known = [number for number in after.model.elements if number in before.model.elements]
    task = after.model.hyper.tasks[0] if after.model.hyper.tasks else None
    if task is not None:
        known = [number for number in known if number in after.model.elements_of_task[task]] or known
    if not known:
        raise ValueError("the models know no element in common, so they cannot be compared: give --no-verify")
    # First, middle and last, as far as there are so many.
    elements = sorted({known[0], known[len(known) // 2], known[-1]})[:_NUM_ELEMENTS]
    structure = small_crystal(elements, after.model.hyper.three_body_cutoff)
    first, second = (_predictions(_part(each, elements), structure) for each in (before, after))
    allowed = _ALLOWED[after.model.config.params_dtype]
    largest = 0.0
    for name, expected in first.items():
        scale = max(1.0, float(expected.abs().max()))
        difference = float((second[name] - expected).abs().max()) / scale if name in second else float("inf")
        if not difference <= allowed:
            raise ValueError(
                f"the result is another model: {name} of {len(structure.numbers)} atoms differ by {difference:.3g}, "
                f"allowed is {allowed:g}; nothing was written"
            )
        largest = max(largest, difference)
    return f"{', '.join(first)} of {structure.num_atoms} atoms are equal (largest difference {largest:.1g})"


def small_crystal(elements: list[int], cutoff: float) -> Structure:
    """Eight atoms of these elements in a periodic cell without symmetry, dense enough for angles."""
    generator = np.random.default_rng(0)
    edge = 0.85 * cutoff
    corners = np.array([[0, 0, 0], [0, 0.5, 0.25], [0.5, 0, 0.25], [0.5, 0.5, 0]])
    fractional = np.concatenate([corners, corners + np.array([0, 0, 0.5])])
    cell = np.diag([edge, edge, 2 * edge]) + generator.normal(scale=0.02 * edge, size=(3, 3))
    positions = fractional @ cell + generator.normal(scale=0.03 * edge, size=(8, 3))
    numbers = np.resize(np.array(elements, dtype=np.int64), 8)
    return Structure(numbers=numbers, positions=positions, cell=cell, pbc=np.ones(3, dtype=bool))


def _part(stored: StoredModel, elements: list[int]) -> MatRIS:
    """The model, of its experts only those for some elements."""
    return (pruned(stored, elements) if stored.model.hyper.num_moe_experts else stored).build()


def _predictions(model: MatRIS, structure: Structure) -> dict[str, torch.Tensor]:
    prediction = model(_batch(model, structure))
    found = {"energies": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
    if prediction.magmoms is not None:
        found["magnetic moments"] = prediction.magmoms
    return {name: value for name, value in found.items() if value is not None}


def _batch(model: MatRIS, structure: Structure) -> GraphBatch:
    hyper = model.hyper
    graph = build_graph(structure, pairwise_cutoff=hyper.pairwise_cutoff, three_body_cutoff=hyper.three_body_cutoff)
    # Of any task: a charge and a spin are stated, which all may have.
    return collate_graphs([graph], tasks=[0], charges=[0.0], spins=[1])
