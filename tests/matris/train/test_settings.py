"""The command line and YAML files of `train` become one frozen value, or one clear message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from janus.mesh import Mesh
from matris.cli import normalise_option_names
from matris.cli.train import main as train_main
from matris.cli.train import parse
from matris.config import AngularBasis, LossKind, ModelConfig
from matris.setup import build_setup
from matris.train_config import TrainConfig, to_plain

LEAST = ["--data.train", "a.xyz", "--training.train_iters", "5"]
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "configs"


def test_defaults_and_lists() -> None:
    config = parse([*LEAST, "--data.valid", "b.xyz", "c.h5", "--data.test=d.xyz", "--data.max_atoms", "100"])
    assert config.data.train == ["a.xyz"]
    assert config.data.valid == ["b.xyz", "c.h5"]
    assert config.data.test == ["d.xyz"]
    assert config.data.max_atoms == 100
    assert config.model == ModelConfig()
    assert not config.dry_run
    assert parse(["--data.train", "[x, y]", "--training.train_iters", "1"]).data.train == ["x", "y"]


def test_renamed_option_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  compile_kernels: true\n")
    for words in (["--training.compile_kernels", "true"], ["--config", str(path)]):
        with pytest.raises(ValueError, match="training.compile_kernels is no option any more: write training.kernels"):
            parse([*LEAST, *words])


def test_types() -> None:
    words = "--model.angular-basis spherical --model.readout-hidden-sizes [4,2] --loss.forces huber --optim.lr 2e-3"
    words += " --training.precision bf16-mixed --optim.decay-1d true --data.energy-scale 0.5 --dry-run"
    config = parse([*LEAST, *normalise_option_names(words.split())])
    assert config.model.angular_basis is AngularBasis.spherical
    assert config.model.readout_hidden_sizes == (4, 2)
    assert config.loss.forces is LossKind.huber
    assert (config.optim.lr, config.optim.decay_1d) == (2e-3, True)
    assert config.training.precision == "bf16-mixed"
    assert config.data.energy_scale == 0.5
    assert config.dry_run


def test_yaml_then_options_and_back(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("data:\n  train: [a.xyz, b.xyz]\ntraining:\n  train_epochs: 3\nmodel:\n  hidden_size: 16\n")
    config = parse(["--config", str(path), "--model.num_layers", "2"])
    assert config.data.train == ["a.xyz", "b.xyz"]
    assert (config.model.hidden_size, config.model.num_layers, config.training.train_epochs) == (16, 2, 3)
    # What a run saves is read again as the same settings.
    path.write_text(yaml.safe_dump(to_plain(config)))
    assert parse(["--config", str(path)]) == config


def test_presets_are_a_start() -> None:
    config = parse([*LEAST, "--preset", "m", "--model.hidden_size", "32"])
    assert (config.model.num_layers, config.model.hidden_size) == (6, 32)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    parse(["--config", str(path), "--data.train", "a.xyz"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.train a.xyz", "train_iters is None and training.train_epochs is None: give exactly one"),
        ("--training.train_iters 5", "data.train is empty"),
        ("--data.train a --training.train_iters x", "training.train_iters"),
        ("--data.train a --training.train_iters 5 --training.train_epochs 5", "give exactly one"),
        ("--data.train a --training.train_iters 5 --data.batch 5", "data.batch"),
        ("--data.train a --training.train_iters 5 --optim.lr 0", "optim.lr is 0.0: it must be positive"),
        ("--data.train a --training.train_iters 5 --optim.min_lr 1", "must not exceed"),
        ("--data.train a --training.train_iters 5 --optim.ema_decay 1", "below 1"),
        ("--data.train a --training.train_iters 5 --optim.lr_decay_style WSD", "WSD needs a positive decay length"),
        ("--data.train a --training.train_iters 5 --optim.lr_wsd_decay_iters 3", "the other styles take none"),
        ("--data.train a --training.train_iters 5 --data.max_edges 0", "data.max_edges is 0"),
        ("--data.train a --training.train_iters 5 --data.valid_fraction 1", "data.valid_fraction is 1.0"),
        ("--data.train a --training.train_iters 5 --data.reference_energies mp", "fit, none, isolated, base"),
        ("--data.train a --training.train_iters 5 --data.reference_energies base", "there is no base model"),
        ("--data.train a --training.train_iters 5 --data.energy_scale std", "rms_forces"),
        ("--data.train a --training.train_iters 5 --data.energy_scale -1", "it must be positive"),
        ("--data.train a --training.train_iters 5 --data.energy_scale 2 --init_from x", "keeps the scale of the base"),
        ("--data.train a --training.train_iters 5 --training.precision fp16", "training.precision"),
        (
            "--data.train a --training.train_iters 5 --parallel.tensor_model_parallel_size 0",
            "tensor_model_parallel_size is 0",
        ),
        ("--data.train a --training.train_iters 5 --parallel.pipeline_model_parallel_size 4", "supports only 1"),
        ("--data.train a --training.train_iters 5 --parallel.expert_model_parallel_size 0", "must be at least 1"),
        (
            "--data.train a --training.train_iters 5 --training.precision fp64 --parallel.expert_fp16_wire true",
            "keeps 11 bits",
        ),
        ("--data.train a --training.train_iters 5 --model.num_layers 0", "model.num_layers is 0"),
        ("--data.train a --training.train_iters 5 --data.valid b --data.valid_fraction 0.5", "give one of them"),
        (
            "--data.train a --training.train_iters 5 --data.global_batch_size 4 --data.global_max_atoms 9",
            "leave one of",
        ),
        ("--data.train a --training.train_iters 5 --data.global_max_edges 0", "data.global_max_edges is 0"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse(words.split())
    assert "\n" not in str(raised.value)


def test_size_of_an_update() -> None:
    assert parse(LEAST).data.structures_per_update == 16
    assert parse([*LEAST, "--data.global_batch_size", "3"]).data.structures_per_update == 3
    assert parse([*LEAST, "--data.global_max_atoms", "300"]).data.structures_per_update is None


def test_model_options_that_were_given() -> None:
    assert parse(LEAST).given_model == ()
    assert parse([*LEAST, "--model.num_layers", "4"]).given_model == ("num_layers",)
    assert "hidden_size" in parse([*LEAST, "--preset", "s"]).given_model


def test_other_ranks_leave_the_message_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_main(["--optim.lr", "0"]) == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"optim.lr"):
        train_main(["--optim.lr", "0"])


def test_a_width_that_the_ranks_cannot_share_is_refused_before_data_is_read() -> None:
    config = parse([*LEAST, "--model.hidden_size", "9", "--parallel.tensor_model_parallel_size", "2"])
    with pytest.raises(ValueError, match="does not divide the model's hidden_size 9"):
        build_setup(config, Mesh())


def test_frozen() -> None:
    config = parse(LEAST)
    with pytest.raises(AttributeError):
        config.dry_run = True  # type: ignore[misc]
    assert isinstance(replace(config, dry_run=True), TrainConfig)
