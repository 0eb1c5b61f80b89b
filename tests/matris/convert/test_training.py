"""Training checkpoints as models and models as checkpoints: the same weights, and a run that starts from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus.checkpoint import open_checkpoint, read_directory
from janus.mesh import Mesh
from matris.cli import main
from matris.exported import load_model, read_config, save_model
from matris.layouts import parse_layout
from matris.model import MatRIS
from matris.run import run_training
from matris.train_config import TrainConfig
from tests.matris.structures import tiny_model
from tests.parallel.gate import EXPERTS, MODEL, gate_config, write_gate_files
from tests.parallel.ranks import run_ranks


def convert(source: Path, output: Path, *words: str) -> int:
    return main(["convert", "--input", str(source), "--output", str(output), *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data, and a run of two updates on one process."""
    path = tmp_path_factory.mktemp("runs")
    write_gate_files(path)
    assert run_training(config(path, "run", 2)) == 0
    return path


def config(folder: Path, output: str, steps: int, **training: object) -> TrainConfig:
    base = gate_config(folder, "mixed")
    settings = replace(base.training, output=str(folder / output), train_iters=steps, save_interval=1, **training)
    return replace(base, training=settings)


def weights(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Of a checkpoint: raw ones, or the averaged ones where there are such."""
    found = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    if kind == "ema":
        found |= {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/")}
    return found


def assert_weights(model: MatRIS, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_weights_of_a_checkpoint(folder: Path, tmp_path: Path, kind: str) -> None:
    state = read_directory(folder / "run" / "checkpoints" / "step_00000001")[0]
    source = folder / "run" / "checkpoints" / "step_00000001"
    assert convert(source, tmp_path / "model", "--weights", kind) == 0
    assert_weights(load_model(tmp_path / "model"), weights(state, kind))
    other = weights(state, "raw" if kind == "ema" else "ema")
    assert not torch.equal(other["atom_embedding.table"], weights(state, kind)["atom_embedding.table"])
    provenance = read_config(tmp_path / "model")["provenance"]
    assert provenance["step"] == 1
    assert provenance["weights"] == {"ema": "averaged", "raw": "raw"}[kind]


def test_a_run_is_its_newest_checkpoint_as_it_exports_it(folder: Path, tmp_path: Path) -> None:
    assert convert(folder / "run", tmp_path / "model") == 0
    exported = load_model(folder / "run" / "last")
    assert_weights(load_model(tmp_path / "model"), exported.state_dict())
    ours, theirs = (read_config(path) for path in (tmp_path / "model", folder / "run" / "last"))
    for name in ("model", "elements", "predicts_magmoms", "reference_energies", "energy_scale", "parameters"):
        assert ours[name] == theirs[name], name
    card = (tmp_path / "model" / "README.md").read_text()
    assert "mixed.xyz" in card
    assert convert(folder / "run" / "checkpoints", tmp_path / "same") == 0


def test_a_damaged_checkpoint_is_passed_over_and_left_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (damaged := next((tmp_path / "run" / "checkpoints" / "step_00000002").glob("*.safetensors"))).write_bytes(b"")
    before = set(tmp_path.rglob("*"))
    assert convert(tmp_path / "run", tmp_path / "model") == 0
    assert f"passed over: checkpoint file {damaged}" in capsys.readouterr().out
    assert read_config(tmp_path / "model")["provenance"]["step"] == 1
    assert before <= set(tmp_path.rglob("*"))
    assert convert(damaged.parent, tmp_path / "none") == 2
    assert str(damaged) in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def start_from(folder: Path, name: str, base: MatRIS) -> Path:
    """A checkpoint of no updates, made of a model directory."""
    directory = folder / f"{name}_model"
    if not directory.exists():
        save_model(base, directory, provenance={"made_by": "test"})
        assert convert(directory, folder / name, "--to", "checkpoint") == 0
    return folder / name


def resumed(mesh: Mesh, run: TrainConfig) -> int:
    return run_training(run)


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2xfsdp2", marks=pytest.mark.slow)])
def test_a_run_starts_from_a_model(folder: Path, layout: str) -> None:
    base = tiny_model(MODEL, seed=5)
    base.set_reference_energies({8: -3.0})
    start = start_from(folder, "start", base)
    run = config(folder, f"started_{layout}", 1, resume=str(start))
    run = replace(run, optim=replace(run.optim, lr=1e-12, min_lr=0.0))
    if layout == "one":
        assert run_training(run) == 0
    else:
        place = parse_layout(layout)
        run = replace(run, parallel=place.applied(run.parallel))
        assert run_ranks(place.num_ranks, resumed, run, layout={"shard": 2, "tensor": 2}) == [0] * 4
    tensors, state = read_directory(folder / f"started_{layout}" / "checkpoints" / "step_00000001")
    assert state["step"] == 1
    expected = base.state_dict()
    for kind in ("raw", "ema"):
        for name, value in weights(tensors, kind).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert tensors["optimizer/exp_avg_sq/atom_embedding.table"].any()  # of the gradients at these weights
    assert torch.equal(tensors["model/reference_energies"], expected["reference_energies"])


def test_another_model_is_not_started(folder: Path) -> None:
    start = start_from(folder, "experts", tiny_model(EXPERTS, seed=5))
    with pytest.raises(ValueError, match="of another model: .*num_moe_experts"):
        run_training(config(folder, "refused", 1, resume=str(start)))


def test_a_checkpoint_to_start_from_is_a_model_again(folder: Path, tmp_path: Path) -> None:
    base = tiny_model(MODEL, seed=5)
    base.elements = (6, 8)
    base.predicts_magmoms = False
    save_model(base, tmp_path / "model", provenance={"made_by": "test"})
    assert convert(tmp_path / "model", tmp_path / "start", "--to", "checkpoint") == 0
    assert open_checkpoint(tmp_path / "start").state["step"] == 0
    assert convert(tmp_path / "start", tmp_path / "back") == 0
    back = load_model(tmp_path / "back")
    assert_weights(back, base.state_dict())
    assert back.elements == (6, 8)
    assert not back.predicts_magmoms
    assert read_config(tmp_path / "back")["provenance"]["made_by"] == "test"
