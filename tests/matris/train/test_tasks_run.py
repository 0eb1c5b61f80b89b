"""A run of several levels of theory, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import pytest
import yaml

from matris.cli.train import main
from matris.config import ModelConfig
from matris.exported import load_model, save_model
from matris.model import MatRIS
from tests.parallel.gate import structures, write_gate_files

SIZES = ["--model.num_layers", "1", "--model.hidden_size", "8", "--model.readout_hidden_sizes", "[8]"]
CUTOFFS = ["--model.pairwise_cutoff", "4", "--model.three_body_cutoff", "3"]


def test_a_run_repeats_from_its_settings(tmp_path: Path) -> None:
    write_gate_files(tmp_path)
    frames = ase.io.read(tmp_path / "mixed.xyz", ":")
    assert len(frames) == len(structures()["mixed"])
    for name, periodic in (("crystals", True), ("molecules", False)):
        ase.io.write(tmp_path / f"{name}.xyz", [atoms for atoms in frames if atoms.pbc.all() == periodic])
    tasks = [{"name": name, "train": [str(tmp_path / f"{name}.xyz")]} for name in ("molecules", "crystals")]
    words = [f"--data.tasks={json.dumps(tasks)}", "--data.valid_fraction", "0", *SIZES, *CUTOFFS]
    words += ["--data.cache_dir", str(tmp_path / "cache"), "--training.train_iters", "2", "--training.device", "cpu"]
    assert main([*words, "--training.output", str(tmp_path / "first")]) == 0
    settings = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert [task["name"] for task in settings["data"]["tasks"]] == ["molecules", "crystals"]
    again = ["--config", str(tmp_path / "first" / "config.yaml"), "--training.output", str(tmp_path / "second")]
    assert main(again) == 0
    first, second = (
        load_model(next((tmp_path / name).glob("*/model.safetensors")).parent) for name in ("first", "second")
    )
    assert first.hyper == second.hyper
    assert first.hyper.tasks == ("molecules", "crystals")
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "words"), [("ions", "do not state their charge"), ("surfaces", "knows ions, crystals"), (None, "no task")]
)
def test_fine_tuning_keeps_the_tasks_and_needs_of_its_base(tmp_path: Path, name: str | None, words: str) -> None:
    """The files state no charge, and the settings do not repeat that the task needs it."""
    write_gate_files(tmp_path)
    hyper = ModelConfig(num_layers=1, hidden_size=8, tasks=("ions", "crystals"), charge_tasks=("ions",))
    save_model(MatRIS(hyper, seed=0), tmp_path / "base", provenance={})
    path = str(tmp_path / "molecules.xyz")
    data = ["--data.train", path] if name is None else [f"--data.tasks={json.dumps([{'name': name, 'train': [path]}])}"]
    words_of_run = ["--init_from", str(tmp_path / "base"), *data, "--data.cache_dir", str(tmp_path / "cache")]
    words_of_run += ["--training.train_iters", "1", "--training.device", "cpu", "--data.valid_fraction", "0"]
    with pytest.raises(ValueError, match=words):
        main([*words_of_run, "--training.output", str(tmp_path / "run")])
