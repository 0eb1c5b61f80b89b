"""Model directories: round trip, damage, refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ase.build import bulk
from safetensors.torch import load_file

from matris.config import ModelConfig, Precision
from matris.exported import check_model, config_sha256, load_model, open_model, read_config, save_model
from tests.matris.structures import EXPERTS, all_kinds, predict, tiny_model

STORED = Path(__file__).parent / "stored"


@pytest.fixture
def directory(tmp_path):
    model = tiny_model()
    model.set_reference_energies({29: -3.25})
    model.energy_scale.fill_(1.7)
    save_model(model, tmp_path / "model", provenance={"made_by": "test"})
    return tmp_path / "model"


def test_round_trip_is_exact(directory):
    model, loaded = tiny_model(), load_model(directory)
    atoms = all_kinds()["fcc supercell"]
    assert loaded.precision is Precision.fp64
    assert loaded.energy_scale.item() == 1.7
    assert loaded.reference_energies[28].item() == -3.25
    # 1.7 times the energies of the model before its scale was set.
    torch.testing.assert_close(
        predict(loaded, atoms).interaction_energy, 1.7 * predict(model, atoms).interaction_energy, rtol=1e-14, atol=0
    )


def test_precision_of_choice(directory):
    assert load_model(directory, precision=Precision.fp32).readout.norm.weight.dtype == torch.float32
    assert load_model(directory, precision=Precision.fp32).reference_energies.dtype == torch.float64


def test_existing_directory_is_kept_unless_told(directory):
    before = (directory / "config.json").read_text()
    with pytest.raises(FileExistsError, match="exists"):
        save_model(tiny_model(), directory, provenance={})
    assert (directory / "config.json").read_text() == before
    save_model(tiny_model(), directory, provenance={}, overwrite=True)
    assert (directory / "config.json").read_text() != before
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_corrupt_weights_are_refused(directory):
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt"):
        load_model(directory)


def write_config(directory, change, *, seal):
    """Edit config.json, with or without a checksum that fits."""
    path = directory / "config.json"
    config = {name: value for name, value in {**json.loads(path.read_text()), **change}.items() if value is not None}
    if seal:
        config["config_sha256"] = config_sha256(config)
    path.write_text(json.dumps(config))


def hyper(directory, **change):
    return {"model": {**read_config(directory)["model"], **change}}


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(
    ("change", "message"), [({"format_version": 99}, "format version 99"), ({"format": "other"}, "does not describe")]
)
def test_foreign_configs_are_refused(directory, change, message, seal):
    write_config(directory, change, seal=seal)
    with pytest.raises(ValueError, match=message):
        load_model(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"energy_scale": 2.0},
        {"reference_energies": {"Cu": 0.0}},
        {"predicts_magmoms": False},
        {"elements": ["H"]},
        {"provenance": {}},
        {"config_sha256": None},
        {"extra": 1},
    ],
)
def test_every_edit_of_the_config_is_refused(directory, change):
    write_config(directory, change, seal=False)
    with pytest.raises(ValueError, match=r"config\.json is corrupt or was edited"):
        read_config(directory)


def test_edited_cutoff_is_refused(directory):
    write_config(directory, hyper(directory, pairwise_cutoff=5.5), seal=False)
    with pytest.raises(ValueError, match="edited"):
        load_model(directory)


def test_rewritten_config_is_the_same(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 2}}, "missing"),
        ({"model": None}, "'model' is missing"),
        ({"model": [1]}, r"'model' is \[1\].*dict"),
        ({"predicts_magmoms": "yes"}, "predicts_magmoms"),
        ({"elements": [["H"]]}, "unknown element"),
        ({"files": None}, "'files' is missing"),
        ({"files": {}}, "no checksum"),
    ],
)
def test_configs_of_another_writer_are_checked(directory, change, message):
    write_config(directory, change, seal=True)
    with pytest.raises(ValueError, match=message):
        load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 24}, r"the weights of .*model do not fit its config\.json"),
        ({"hidden_size": "16"}, r"model\.hidden_size is '16'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"pairwise_cutoff": "5"}, "pairwise_cutoff is '5'"),
        ({"pairwise_cutoff": float("inf")}, "pairwise_cutoff is inf"),
        ({"readout_hidden_sizes": 16}, "readout_hidden_sizes is 16"),
        ({"norm_type": "none"}, "none"),
        ({"smooth_attention": 1}, "smooth_attention is 1"),
    ],
)
def test_hyper_parameters_of_another_writer_are_checked(directory, change, message):
    write_config(directory, hyper(directory, **change), seal=True)
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_elements_are_kept(tmp_path):
    model = tiny_model()
    assert model.elements == tuple(range(1, 95))
    model.elements = (1, 8, 29)
    save_model(model, tmp_path / "model", provenance={3: (1, 2)})
    assert read_config(tmp_path / "model")["elements"] == ["H", "O", "Cu"]
    loaded = load_model(tmp_path / "model")
    assert loaded.elements == (1, 8, 29)
    loaded.check_elements([29, 1, 29])
    with pytest.raises(ValueError, match=r"not trained on Si, Au: it knows H, O, Cu; .*fine-tune"):
        loaded.check_elements([79, 14, 1])


def test_incomplete_directories_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="not a model directory"):
        load_model(tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load_model(directory)


def test_unwritable_place_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        save_model(tiny_model(), tmp_path / "file" / "model", provenance={})


def test_config_round_trip_and_limits():
    config = ModelConfig(num_layers=3, readout_hidden_sizes=(7, 5))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for change, message in (
        ({"num_layers": 0}, "num_layers"),
        ({"three_body_cutoff": 7.0}, "three_body_cutoff"),
        ({"num_angular": 6}, "odd"),
        ({"readout_hidden_sizes": (0,)}, "readout_hidden_sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**change)


def test_models_of_format_1_are_read():
    model, expected = load_model(STORED / "model_v1"), json.loads((STORED / "model_v1_expected.json").read_text())
    assert json.loads((STORED / "model_v1" / "config.json").read_text())["format_version"] == 1
    assert read_config(STORED / "model_v1")["format_version"] == 2
    prediction = predict(model, bulk("Si"))
    assert prediction.energy.item() == pytest.approx(expected["energy"], rel=1e-12)
    torch.testing.assert_close(
        prediction.stress[0], torch.tensor(expected["stress"], dtype=torch.float64), rtol=1e-9, atol=1e-14
    )
    assert model.elements == (1, 14)


def test_damaged_models_of_format_1_are_refused(tmp_path):
    shutil.copytree(STORED / "model_v1", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="corrupt"):
        load_model(tmp_path / "model")


@pytest.fixture
def pieces(tmp_path):
    model = tiny_model(EXPERTS)
    save_model(model, tmp_path / "model", provenance={}, max_file_bytes=60_000)
    return model, tmp_path / "model"


def test_large_weights_lie_in_several_files_as_hugging_face_has_them(pieces):
    model, directory = pieces
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert set(index["weight_map"].values()) == set(files)
    found = {}
    for file in files:  # read by the library itself
        tensors = load_file(directory / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 60_000
        found |= tensors
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert set(read_config(directory)["files"]) == {*files, "model.safetensors.index.json"}


def test_several_files_load_whole_and_in_part(pieces):
    model, directory = pieces
    loaded, opened = load_model(directory), open_model(directory)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(opened.read(name), value)
    silicon = load_model(directory, elements=[14])
    assert silicon.hyper.num_moe_experts == EXPERTS.moe_router_topk
    ours, whole = (predict(each, bulk("Si")) for each in (silicon, model))
    torch.testing.assert_close(ours.stress, whole.stress, rtol=0, atol=1e-13)


def test_damage_to_any_of_several_files_is_found(pieces, tmp_path):
    _, directory = pieces
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(ValueError, match=path.name):
            check_model(directory)
        path.unlink()
        with pytest.raises(ValueError, match="incomplete|index|no checksum"):
            load_model(directory)
        path.write_bytes(content)
    load_model(directory)


def test_model_card_says_what_the_model_is(tmp_path):
    model = tiny_model()
    model.elements = (14, 8)
    report = {"energy_mae_meV_per_atom": 12.3456, "forces_mae_meV_per_A": float("nan"), "num_structures": 3}
    provenance = {"validation": report, "step": 7, "settings": {"data": {"train": ["silica.xyz"]}}}
    save_model(model, tmp_path / "model", provenance=provenance)
    card = (tmp_path / "model" / "README.md").read_text()
    parts = ("Si, O", "silica.xyz", "energy mae meV per atom: 12.35", '"step": 7', "eV/Angstrom^3", "MatRISCalculator")
    assert [part for part in parts if part not in card] == []
    assert "forces mae" not in card
    (tmp_path / "model" / "README.md").write_text("a card of one's own")
    load_model(tmp_path / "model")
