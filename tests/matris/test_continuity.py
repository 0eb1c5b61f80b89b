"""Smooth attention: energy, forces and stress are continuous when an atom crosses either cutoff."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms

from matris.config import ModelConfig, RadialBasis
from tests.matris.structures import EXPERTS, TINY, predict, tiny_model

CROWD = Atoms(
    "CuAuPdNaClO",
    [[0, 0, 0], [2.4, 0.3, 0.1], [0.2, 2.5, -0.4], [-1.7, 1.1, 1.9], [1.1, 1.6, 2.3], [0.0, 0.0, -2.0]],
    cell=[18.0, 17.0, 16.0],
    pbc=True,
)


def crossing(cutoff: float, offset: float) -> Atoms:
    """The crowd with its last atom pulled away along z until it is `cutoff` + `offset` from the first."""
    atoms = CROWD.copy()
    atoms.positions[5, 2] = -(cutoff + offset)
    return atoms


def pulled(cutoff: float, offset: float) -> Atoms:
    """A dimer, so that the crossing edge is the only one."""
    return Atoms("NaCl", [[0, 0, 0], [0, 0, cutoff + offset]], cell=[30.0, 30.0, 30.0], pbc=True)


@pytest.fixture(scope="module", params=["bessel", "gaussian", "experts"])
def model(request):
    gaussian = replace(TINY, radial_basis=RadialBasis.gaussian)
    return tiny_model({"bessel": TINY, "gaussian": gaussian, "experts": EXPERTS}[request.param], seed=3)


@pytest.mark.parametrize("cutoff", [TINY.pairwise_cutoff, TINY.three_body_cutoff])
@pytest.mark.parametrize("scene", [crossing, pulled])
def test_no_jump_at_a_cutoff(model, scene, cutoff):
    step = 1e-9
    prediction = predict(model, scene(cutoff, -step), scene(cutoff, step))
    half = len(prediction.forces) // 2
    assert abs(prediction.interaction_energy[0] - prediction.interaction_energy[1]) < 1e-8
    assert (prediction.forces[:half] - prediction.forces[half:]).abs().max() < 1e-8
    assert (prediction.stress[0] - prediction.stress[1]).abs().max() < 1e-8


@pytest.mark.parametrize("cutoff", [TINY.pairwise_cutoff, TINY.three_body_cutoff])
@pytest.mark.parametrize("scene", [crossing, pulled])
def test_no_force_spike_near_a_cutoff(model, scene, cutoff):
    """The force between neighbouring points of a scan changes by no more than its slope allows anywhere else."""
    offsets = np.linspace(-0.5, 0.1, 241)
    prediction = predict(model, *[scene(cutoff, offset) for offset in offsets])
    forces = prediction.forces.view(len(offsets), -1, 3)
    energy = prediction.interaction_energy
    # Trapezoid: the energy is the integral of the force on the atom that is moved, so no spike hides between points.
    moved = 5 if scene is crossing else 1
    direction = -1.0 if scene is crossing else 1.0
    pull = direction * forces[:, moved, 2]
    work = -torch.cumulative_trapezoid(pull, dx=float(offsets[1] - offsets[0]))
    assert (energy[1:] - energy[0] - work).abs().max() < 1e-5 * max(1e-2, float(pull.abs().max()))
    change = (forces[1:] - forces[:-1]).abs().amax(dim=(1, 2))
    assert change.max() < 0.05 * forces.abs().max() + 1e-9


def test_the_released_form_does_jump():
    """The control: without smooth attention this very test would fail."""
    model = tiny_model(ModelConfig(**{**vars(TINY), "smooth_attention": False}), seed=3)
    energy = predict(model, crossing(TINY.pairwise_cutoff, -1e-9), crossing(TINY.pairwise_cutoff, 1e-9))
    assert abs(energy.interaction_energy[0] - energy.interaction_energy[1]) > 1e-6
