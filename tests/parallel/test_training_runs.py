"""`janus-matris train` end to end: the exported models of a run do not depend on the layout of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from janus.mesh import Launch
from matris.layouts import Layout, parse_layout
from matris.run import run_training
from matris.train_config import TrainConfig
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks

LAYOUTS = {2: ("dp2", "gp2", "tp2", "fsdp2"), 4: ("dp4", "dp2xfsdp2-keep", "fsdp2xgp2", "gp2xtp2")}


def run_config(folder: Path, layout: Layout) -> TrainConfig:
    """Three updates with different structures, validation after each."""
    config = gate_config(folder, "mixed")
    return replace(
        config,
        data=replace(config.data, global_batch_size=3, valid=[str(folder / "small.xyz")]),
        training=replace(config.training, output=str(folder / layout.name), train_iters=3, eval_interval=1),
        parallel=layout.applied(config.parallel),
    )


def train(launch: Launch, folder: Path, names: tuple[str, ...]) -> list[int]:
    return [run_training(run_config(folder, parse_layout(name))) for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files, and the run of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    write_gate_files(folder)
    assert run_training(run_config(folder, Layout())) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_exported_models_do_not_depend_on_the_layout(alone: Path, world_size: int) -> None:
    names = LAYOUTS[world_size]
    assert run_ranks(world_size, train, alone, names, with_mesh=False, timeout=300.0) == [[0] * len(names)] * world_size
    expected_errors = json.loads((alone / "one" / "metrics.json").read_text())["valid"]
    for name in names:
        found = alone / parse_layout(name).name
        for model in ("best", "last"):
            weights = load_file(found / model / "model.safetensors")
            expected = load_file(alone / "one" / model / "model.safetensors")
            assert weights.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    weights[key], value, rtol=1e-10, atol=1e-10 * float(value.abs().max()), msg=f"{name} {key}"
                )
        errors = json.loads((found / "metrics.json").read_text())["valid"]
        for key in ("energy_mae_meV_per_atom", "forces_mae_meV_per_A"):
            assert errors[key] == pytest.approx(expected_errors[key], rel=1e-10), (name, key)
