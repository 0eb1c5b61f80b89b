"""What any potential must satisfy, in fp64 and with random weights."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation

from matris.config import AngularBasis, ModelConfig, NormType, RadialBasis
from matris.model import MatRIS, Prediction
from tests.matris.structures import EXPERTS, TINY, all_kinds, predict, rattled, tiny_model


def variant(**changes) -> ModelConfig:
    return ModelConfig(**{**vars(TINY), **changes})


VARIANTS = {
    "default": TINY,
    "rms norm, spherical angles": variant(norm_type=NormType.rms, angular_basis=AngularBasis.spherical),
    "gaussian, biased ffn, enveloped edges": variant(
        radial_basis=RadialBasis.gaussian, ffn_bias=True, enveloped_edge_update=True
    ),
    "fixed basis, one layer": variant(learnable_basis=False, num_layers=1),
    "released form": variant(smooth_attention=False),
    "experts": EXPERTS,
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request) -> MatRIS:
    return tiny_model(VARIANTS[request.param], seed=1)


def crystal() -> Atoms:
    return rattled(bulk("NaCl", "rocksalt", a=5.2, cubic=True), 0.1)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1e-12) -> None:
    assert (ours - theirs).abs().max() <= scale * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("improper", [False, True])
def test_rotation_and_inversion(model, improper):
    atoms = crystal()
    matrix = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix() * (-1 if improper else 1)
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ matrix.T)
    turned.positions = atoms.positions @ matrix.T
    before, after = predict(model, atoms), predict(model, turned)
    rotation = torch.from_numpy(matrix)
    assert_same(after.interaction_energy, before.interaction_energy)
    assert_same(after.forces, before.forces @ rotation.T)
    assert_same(after.stress, rotation @ before.stress @ rotation.T)
    assert_same(after.magmoms, before.magmoms)


def test_translation_and_wrapping(model):
    atoms = crystal()
    moved = atoms.copy()
    moved.positions += [11.3, -7.1, 0.4]
    before = predict(model, atoms)
    for candidate in (moved, Atoms(moved, positions=moved.get_positions(wrap=True))):
        after = predict(model, candidate)
        assert_same(after.interaction_energy, before.interaction_energy)
        assert_same(after.forces, before.forces)


def test_permutation(model):
    atoms = crystal()
    order = np.random.default_rng(0).permutation(len(atoms))
    before, after = predict(model, atoms), predict(model, atoms[order])
    assert_same(after.interaction_energy, before.interaction_energy)
    assert_same(after.forces, before.forces[order])
    assert_same(after.energies, before.energies[order])


def test_supercell(model):
    atoms = rattled(bulk("Si"), 0.1)
    single, double = predict(model, atoms), predict(model, atoms * (2, 1, 1))
    assert_same(double.interaction_energy, 2 * single.interaction_energy)
    assert_same(double.forces, single.forces.repeat(2, 1))
    assert_same(double.stress, single.stress)


def test_handedness_does_not_flip_the_stress(model):
    atoms = crystal()
    mirrored = atoms.copy()
    mirrored.set_cell(atoms.cell[[1, 0, 2]], scale_atoms=False)
    assert_same(predict(model, mirrored).stress, predict(model, atoms).stress)


def test_energy_does_not_depend_on_batch_mates(model):
    kinds = list(all_kinds().values())
    together = predict(model, *kinds)
    atoms = 0
    for index, item in enumerate(kinds):
        alone = predict(model, item)
        assert_same(together.interaction_energy[index], alone.interaction_energy[0])
        assert_same(together.forces[atoms : atoms + len(item)], alone.forces)
        if item.cell.volume:
            assert_same(together.stress[index], alone.stress[0])
        atoms += len(item)


def slope(model: MatRIS, displaced: Callable[[float], Atoms], step: float) -> float:
    """dE/dx of the energy of `displaced(x)` at zero, by the fourth-order central difference."""
    energies = predict(model, *(displaced(k * step) for k in (-2, -1, 1, 2))).interaction_energy
    return float((energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step))


@pytest.mark.parametrize("atoms", [crystal(), molecule("C2H6")], ids=["crystal", "molecule"])
def test_forces_are_the_slope_of_the_energy(model, atoms):
    forces = predict(model, atoms).forces.numpy()
    for atom, axis in ((0, 0), (1, 1), (2, 2)):

        def displaced(x: float, atom: int = atom, axis: int = axis) -> Atoms:
            image = atoms.copy()
            image.positions[atom, axis] += x
            return image

        assert abs(-slope(model, displaced, 3e-4) - forces[atom, axis]) <= 1e-7 * np.abs(forces).max()


def test_stress_is_the_slope_of_the_energy(model):
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.2), 0.1)
    stress = predict(model, atoms).stress[0].numpy()
    assert np.allclose(stress, stress.T, atol=1e-15)
    for row, column in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)):

        def strained(x: float, row: int = row, column: int = column) -> Atoms:
            strain = np.zeros((3, 3))
            strain[row, column] += x / 2
            strain[column, row] += x / 2
            image = atoms.copy()
            image.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            return image

        value = slope(model, strained, 1e-4) / atoms.cell.volume
        assert abs(value - stress[row, column]) <= 1e-7 * np.abs(stress).max()


def test_isolated_atoms_have_an_energy_and_no_force(model):
    prediction = predict(model, Atoms("He"))
    assert torch.isfinite(prediction.interaction_energy).all()
    assert prediction.forces.tolist() == [[0.0, 0.0, 0.0]]
    assert prediction.stress.isnan().all()


def test_modes_agree(model):
    """Without derivatives, under no_grad and with a recorded graph the numbers are the same."""
    from tests.matris.structures import batch_of

    batch = batch_of(crystal(), config=model.hyper)
    full = model(batch)
    recorded = model(batch, create_graph=True)
    with torch.no_grad():
        quiet = model(batch)
        energy_only = model(batch, forces=False, stress=False)
    for other in (recorded, quiet):
        assert torch.equal(other.forces, full.forces)
        assert torch.equal(other.stress, full.stress)
    assert recorded.forces.requires_grad
    assert not full.forces.requires_grad
    assert energy_only.forces is None
    assert energy_only.stress is None
    assert_same(energy_only.interaction_energy, full.interaction_energy)


def test_weight_gradients_of_each_loss_term_are_slopes(model):
    """The gradient through forces and stress, the double backward, against finite differences along a direction."""
    from tests.matris.structures import batch_of

    batch = batch_of(crystal(), molecule("H2O"), config=model.hyper)

    def terms(prediction: Prediction) -> list[torch.Tensor]:
        return [
            prediction.interaction_energy.square().sum(),
            prediction.forces.square().sum(),
            prediction.stress[:1].square().sum(),
            prediction.magmoms.square().sum(),
        ]

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    analytic = []
    for index in range(4):
        gradients = torch.autograd.grad(
            terms(model(batch, create_graph=True))[index], parameters, allow_unused=True, materialize_grads=True
        )
        analytic.append(sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item())
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter += sign * step * change
            values.append(torch.stack(terms(model(batch))))
            for parameter, change in zip(parameters, direction, strict=True):
                parameter -= sign * step * change
    numeric = ((values[0] - values[1]) / (2 * step)).tolist()
    assert analytic == pytest.approx(numeric, rel=1e-5)
