"""What the gate of layouts leaves out: micro-batches of one process, and replicas that stay equal to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from janus.mesh import Mesh
from matris.train_config import TrainConfig
from matris.verify import Measurement, compare, measure
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate")
    write_gate_files(path)
    return path


def with_data(config: TrainConfig, **settings: int | None) -> TrainConfig:
    return replace(config, data=replace(config.data, **settings))  # type: ignore[arg-type]


def test_micro_batches_change_nothing(folder: Path) -> None:
    config = gate_config(folder, "mixed")
    whole = measure(with_data(config, max_atoms=None), Mesh())
    cut = measure(with_data(config, max_atoms=24), Mesh())
    assert max(compare(cut, whole, 1e-4).values()) < 1e-10
    assert max(compare(whole, whole).values()) == 0.0


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_full_recomputation_changes_nothing(folder: Path, kind: str) -> None:
    kept = measure(gate_config(folder, "mixed", kind=kind), Mesh())
    again = measure(gate_config(folder, "mixed", kind=f"{kind}-full"), Mesh())
    assert max(compare(again, kept, 1e-4).values()) < 1e-10


def measured(mesh: Mesh, config: TrainConfig) -> Measurement:
    return measure(config, mesh)


@pytest.mark.slow
def test_replicas_stay_equal_and_one_may_have_nothing_to_do(folder: Path) -> None:
    """Three structures for four ranks."""
    config = with_data(gate_config(folder, "mixed"), global_batch_size=3)
    alone = measure(config, Mesh())
    results = run_ranks(4, measured, config)
    for found in results:
        assert max(compare(found, alone, 1e-4).values()) < 1e-10
        for name, value in results[0].weights.items():
            assert torch.equal(found.weights[name], value), name
