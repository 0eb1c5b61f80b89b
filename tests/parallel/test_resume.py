"""A run that moves from layout to layout ends where one that stayed on one process does; in one layout, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus.checkpoint import read_directory
from janus.mesh import Mesh
from janus.sharding import weights
from matris.layouts import parse_layout
from matris.run import run_training
from matris.train_config import TrainConfig
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks

JOURNEYS = {
    "dense": ("tp2xfsdp2", "one", "fsdp2xgp2", "dp2", "fsdp4-keep", "tp2xgp2", "tp2xgp2xfsdp2", "dp3"),
    "experts": ("tp2xfsdp2", "one", "dp4xgp2xep4", "ep2-home", "fsdp2xep2", "ep2-homextp2", "fsdp2"),
}
STAYING = (("dense", "tp2xfsdp2"), ("dense", "dp2xgp2"), ("experts", "ep2xtp2"), ("experts", "ep2-homexfsdp2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_gate_files(path)
    return path


def config(folder: Path, kind: str, layout: str, output: str, steps: int) -> TrainConfig:
    base = gate_config(folder, "mixed", kind=kind)
    training = replace(base.training, output=str(folder / output), train_iters=steps, save_interval=1, keep_last=100)
    parallel = base.parallel if layout == "one" else parse_layout(layout).applied(base.parallel)
    return replace(base, training=training, parallel=parallel)


def train(mesh: Mesh, run: TrainConfig) -> int:
    """With small slices, so that even these weights are shared out among the ranks that hold them."""
    weights._SLICE = 16
    return run_training(run)


def launch(layout: str, run: TrainConfig) -> None:
    if layout == "one":
        assert run_training(run) == 0
        return
    place = parse_layout(layout)
    sizes = {"shard": place.shard, "graph": place.graph, "tensor": place.tensor, "expert": place.expert}
    assert run_ranks(place.num_ranks, train, run, layout=sizes) == [0] * place.num_ranks


def state(folder: Path, output: str, step: int) -> dict[str, Tensor]:
    return read_directory(folder / output / "checkpoints" / f"step_{step:08d}")[0]


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of each kind (weights, averages, moments), relative to the largest value of a tensor and of its kind."""
    assert ours.keys() == theirs.keys()
    largest = 0.0
    for name, value in theirs.items():
        kind = name.rpartition("/")[0]
        scale = max(float(other.abs().max()) for key, other in theirs.items() if key.rpartition("/")[0] == kind)
        size = max(float(value.abs().max()), 1e-3 * scale)
        largest = max(largest, float((ours[name] - value).abs().max()) / size)
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("kind", JOURNEYS)
def test_from_layout_to_layout(folder: Path, kind: str) -> None:
    journey = JOURNEYS[kind]
    launch("one", config(folder, kind, "one", f"{kind}_alone", len(journey)))
    for step, layout in enumerate(journey, start=1):
        launch(layout, config(folder, kind, layout, f"{kind}_moved", step))
        error = largest_error(state(folder, f"{kind}_moved", step), state(folder, f"{kind}_alone", step))
        assert error < 1e-10, (step, layout, error)


def test_journeys_have_enough_pairs() -> None:
    pairs = {pair for journey in JOURNEYS.values() for pair in pairwise(journey)}
    assert len(pairs) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), STAYING)
def test_in_one_layout_bit_for_bit(folder: Path, kind: str, layout: str) -> None:
    for output, stops in (("whole", (2,)), ("stopped", (1, 2))):
        for steps in stops:
            launch(layout, config(folder, kind, layout, f"{kind}_{layout}_{output}", steps))
    ours, theirs = (state(folder, f"{kind}_{layout}_{output}", 2) for output in ("stopped", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def written(mesh: Mesh, run: TrainConfig) -> Any:
    """Elements that this rank writes, and those of all."""
    from matris.setup import build_setup

    weights._SLICE = 16
    setup = build_setup(run, mesh)
    shards = setup.learner.shards().values()
    own = sum(piece.values.numel() for held in shards for piece in held.pieces)
    return own, sum(held.shape.numel() for held in shards)


@pytest.mark.parametrize("layout", ["dp4", "tp2xfsdp2", "dp2xgp2", "fsdp4"])
def test_all_ranks_write_a_fair_part(folder: Path, layout: str) -> None:
    place = parse_layout(layout)
    sizes = {"shard": place.shard, "graph": place.graph, "tensor": place.tensor}
    found = run_ranks(4, written, config(folder, "dense", layout, "unused", 1), layout=sizes)
    total = found[0][1]
    assert sum(own for own, _ in found) == total
    assert max(own for own, _ in found) < 1.3 * total / 4
