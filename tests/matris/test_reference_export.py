"""Our models in the reference package: the same weights back, and with the package itself the same predictions."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk

from matris.config import AngularBasis, ModelConfig, NormType, RadialBasis
from matris.exported import StoredModel
from matris.model import MatRIS
from matris.reference import model_from_reference, read_reference
from matris.reference_export import reference_content, save_reference
from matris.units import GPA
from tests.matris.structures import EXPERTS, TINY, predict, rattled, tiny_model

SCRIPT = Path(__file__).parent / "reference_predictions.py"
INTERPRETER = "JANUS_REFERENCE_PYTHON"
"""Environment variable that names a Python with the PyPI package `matris` 0.1.0."""

PLAIN = replace(TINY, smooth_attention=False)
KINDS = {
    "released": PLAIN,
    "rms norm, spherical": replace(
        PLAIN, norm_type=NormType.rms, angular_basis=AngularBasis.spherical, num_radial=5, num_angular=9
    ),
    "gaussian, biases": replace(PLAIN, radial_basis=RadialBasis.gaussian, ffn_bias=True, learnable_basis=False),
    "enveloped edges, one hidden layer": replace(PLAIN, enveloped_edge_update=True, readout_hidden_sizes=(24, 8)),
}


def stored(model: MatRIS) -> StoredModel:
    state = model.state_dict()
    return StoredModel(model=model, like=state, read=state.__getitem__, provenance={})


def model_of(config: ModelConfig, scale: float = 1.0) -> MatRIS:
    model = tiny_model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and residuals too
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
    model.set_reference_energies({14: -5.1, 8: -4.2})
    model.energy_scale.fill_(scale)
    return model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> MatRIS:
    torch.manual_seed(3)
    return model_of(KINDS[request.param])


def test_weights_come_back_bitwise(model: MatRIS, tmp_path: Path) -> None:
    save_reference(stored(model), tmp_path / "model.pth.tar")
    back = model_from_reference(*read_reference(tmp_path / "model.pth.tar"), origin="test")
    # The number of angular functions means nothing beside the spherical basis; the package wants that of the radial.
    angular = model.hyper.num_angular if model.hyper.angular_basis is AngularBasis.fourier else model.hyper.num_radial
    assert back.hyper == replace(model.hyper, num_angular=angular)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["released_like_f64", "default_like_f32"])
def test_checkpoints_of_the_package_come_back_bitwise(name: str, shared_directory: Path) -> None:
    config, state = read_reference(shared_directory / "reference" / name / "reference.pth.tar")
    found, weights = reference_content(stored(model_from_reference(config, state, origin="test")))
    assert found == config | {"mlp_hidden_dims": list(config["mlp_hidden_dims"])}
    assert set(weights) == set(state)
    assert all(weights[key].dtype == state[key].dtype and torch.equal(weights[key], state[key]) for key in state)


def test_an_energy_scale_goes_into_the_energy_head(tmp_path: Path) -> None:
    model = model_of(PLAIN, scale=1.7)
    save_reference(stored(model), tmp_path / "model.pth.tar")
    back = model_from_reference(*read_reference(tmp_path / "model.pth.tar"), origin="test")
    ours, theirs = (predict(each, rattled(bulk("Si"))) for each in (model, back))
    assert back.energy_scale.item() == 1.0
    torch.testing.assert_close(theirs.forces, ours.forces, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(theirs.energy, ours.energy, rtol=1e-13, atol=0)


def test_the_package_itself_gives_the_same_numbers(model: MatRIS, tmp_path: Path) -> None:
    interpreter = os.environ.get(INTERPRETER)
    if interpreter is None:
        pytest.skip(f"{INTERPRETER} does not name a Python with the reference package")
    model.energy_scale.fill_(0.8)
    structures = {"silicon": rattled(bulk("Si", cubic=True)), "magnesia": rattled(bulk("MgO", "rocksalt", a=4.2))}
    save_reference(stored(model), tmp_path / "model.pth.tar")
    fields = ("numbers", "positions", "cell")
    given = {
        f"{name}/{field}": np.asarray(getattr(atoms, field)) for name, atoms in structures.items() for field in fields
    }
    np.savez(tmp_path / "structures.npz", **given)
    arguments = [str(tmp_path / name) for name in ("model.pth.tar", "structures.npz", "found.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [interpreter, str(SCRIPT), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for name, atoms in structures.items():
        ours = predict(model, atoms)
        count = len(atoms)
        assert found[f"{name}/forces"] == pytest.approx(ours.forces.numpy(), rel=1e-9, abs=1e-11)
        assert found[f"{name}/stress_GPa"] == pytest.approx(ours.stress[0].numpy() / GPA, rel=1e-7, abs=1e-8)
        # Reference energies are single precision there.
        interaction = found[f"{name}/interaction_eV_per_atom"]
        assert interaction == pytest.approx(ours.interaction_energy.numpy() / count, rel=1e-9)
        assert found[f"{name}/energy_eV_per_atom"] == pytest.approx(ours.energy.numpy() / count, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY, "attention is smooth"),
        (EXPERTS, "it has experts .*attention is smooth.*118 elements"),
        (replace(PLAIN, tasks=("pbe", "r2scan")), r"several levels of theory \(pbe, r2scan\)"),
        (replace(PLAIN, num_elements=20), "weights for 20 elements, and the package for 94"),
        (replace(PLAIN, num_radial=5), r"num_angular \(7\) is not model.num_radial \(5\)"),
        (replace(PLAIN, angular_basis=AngularBasis.spherical, spherical_degree=5), "spherical_degree is 5"),
        (replace(PLAIN, readout_hidden_sizes=()), "no hidden layer"),
    ],
)
def test_what_the_package_has_not_is_refused(config: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot represent this model: .*{message}"):
        save_reference(stored(tiny_model(config)), tmp_path / "model.pth.tar")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays(tmp_path: Path) -> None:
    (tmp_path / "model.pth.tar").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        save_reference(stored(tiny_model(PLAIN)), tmp_path / "model.pth.tar")
    assert (tmp_path / "model.pth.tar").read_text() == "mine"
