"""Micro-batches from the memory of the device."""

from __future__ import annotations

import multiprocessing
import re
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from janus.checkpoint import CheckpointError, read_directory
from janus.mesh import Mesh
from janus.training.memory import allocator_in_use
from matris import budget, model
from matris.cost import Counts
from matris.data.dataset import MicroBatch
from matris.memory import step_memory
from matris.run import run_training
from matris.setup import Setup, build_setup
from matris.train_config import DataConfig, TrainConfig
from tests.matris.live_bytes import LiveBytes
from tests.matris.train.labelled import TINY, settings, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget")
    write_files(path)
    return path


def config(folder: Path, memory_gb: float | None) -> TrainConfig:
    data = {"budget": "auto", "memory_gb": memory_gb, "global_batch_size": 24, "valid": [], "valid_fraction": 0.0}
    return settings(folder, data=data, training={"recompute": "all", "train_iters": 1, "output": str(folder / "run")})


def memory_for(tensors: float) -> float:
    """GB of a process in which a micro-batch, weights and all that belongs to them may take so many bytes."""
    return (budget.LIBRARIES + allocator_in_use().overhead * tensors / budget.USED) / 1e9


def micro_batches(setup: Setup) -> list[MicroBatch]:
    return next(iter(setup.train.batches(0))).micro_batches


def predicted(setup: Setup, batch: MicroBatch) -> float:
    graph = batch.graph
    counts = Counts(
        structures=graph.num_structures,
        atoms=graph.num_atoms,
        edges=graph.num_edges,
        undirected=graph.num_undirected,
        angles=graph.num_angles,
    )
    return step_memory(setup.model.hyper, counts, recompute_bytes=0)


def test_micro_batches_use_the_memory_and_no_more(folder: Path) -> None:
    one = build_setup(config(folder, 10.0), Mesh())
    (whole,) = micro_batches(one)
    weights = 5 * sum(value.nbytes for value in one.model.parameters())
    room = predicted(one, whole) / 2.5
    setup = build_setup(config(folder, memory_for(room + weights)), Mesh())
    parts = micro_batches(setup)
    assert len(parts) == 3
    assert sum(part.graph.num_atoms for part in parts) == whole.graph.num_atoms
    totals = setup.train.totals(setup.sampler.indices(0))
    for part in parts:
        assert predicted(setup, part) <= 1.02 * room
        with LiveBytes() as bytes_:
            setup.task.loss(part, totals, training=True).total.backward(inputs=setup.learner.weights.leaves)
        assert bytes_.peak <= 1.1 * room


def test_a_run_stays_within_its_memory(folder: Path) -> None:
    """The whole process, with the allocator that it happens to have."""
    memory_gb = 1.7
    of_run = config(folder, memory_gb)
    wide = replace(TINY, num_layers=2, hidden_size=64, pairwise_cutoff=6.0, three_body_cutoff=5.0)
    training = replace(of_run.training, train_iters=1, output=str(folder / "within"))
    of_run = replace(of_run, model=wide, training=training)
    setup = build_setup(of_run, Mesh())
    assert len(micro_batches(setup)) > 2
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(_peak_of_run, of_run).result(timeout=300.0)
    assert 0.6 * memory_gb < peak / 1e9 <= memory_gb


def _peak_of_run(of_run: TrainConfig) -> int:
    """Bytes."""
    assert run_training(of_run) == 0
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_run_says_what_it_chose(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(replace(config(folder, memory_for(1.8e9)), dry_run=True)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batch")]
    assert "at most 1.8 GB by prediction (auto), as of " in line
    assert f"{allocator_in_use().name} counted as" in line


def test_too_large_structures_are_named_before_the_first_step(folder: Path) -> None:
    setup = build_setup(config(folder, 10.0), Mesh())
    memory = setup.portions.budget.memory
    needed = memory.of_records(setup.datasets.train.sizes)
    weights = 5 * sum(value.nbytes for value in setup.model.parameters())
    room = float(np.sort(needed)[-3:].mean())  # less than the largest needs
    with pytest.raises(ValueError, match="need more memory on their own") as refused:
        build_setup(config(folder, memory_for(room + weights)), Mesh())
    text = str(refused.value)
    assert setup.datasets.train.identifier(int(needed.argmax())) in text
    assert setup.datasets.train.identifier(int(needed.argmin())) not in text
    assert text.startswith("training data: ")
    assert "let 3 ranks share each structure (parallel.context_parallel_size)" in text
    advised = float(re.search(r"give each rank ([\d.]+) GB", text).group(1))
    build_setup(config(folder, advised), Mesh())
    assert advised == pytest.approx(memory_for(float(needed.max()) + weights), abs=0.02)


def test_what_is_too_large_is_named_in_all_parts_of_the_data(folder: Path) -> None:
    of_run = config(folder, None)
    data = replace(of_run.data, budget="given", memory_gb=None, max_atoms=1, valid=of_run.data.train)
    with pytest.raises(ValueError, match="exceed the budget") as refused:
        build_setup(replace(of_run, data=data), Mesh())
    assert re.findall(r"^(\w+) data: \d+ of", str(refused.value), re.MULTILINE) == ["training", "validation"]


def test_no_more_ranks_are_advised_than_there_are_atoms(folder: Path) -> None:
    setup = build_setup(config(folder, 10.0), Mesh())
    weights = 5 * sum(value.nbytes for value in setup.model.parameters())
    smallest = float(setup.portions.budget.memory.of_records(setup.datasets.train.sizes).min())
    with pytest.raises(ValueError, match="need more memory on their own") as refused:
        build_setup(config(folder, memory_for(smallest / 1e4 + weights)), Mesh())
    assert "ranks share" not in str(refused.value)
    assert "give each rank" in str(refused.value)


def test_refused_settings(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data.budget is auto on CPU.*data.memory_gb"):
        build_setup(config(folder, None), Mesh())
    with pytest.raises(ValueError, match="0.65 GB of libraries taken off, leaves 0 GB for tensors, and nothing"):
        build_setup(config(folder, 1e-6), Mesh())
    with pytest.raises(ValueError, match=r"data.memory_gb is 2.0, but data.budget is given"):
        DataConfig(memory_gb=2.0)
    with pytest.raises(ValueError, match=r"data.memory_gb is 0.0: it must be positive"):
        DataConfig(memory_gb=0.0, budget="auto")


def test_a_resumed_run_keeps_its_limit_though_other_memory_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory that is free on a GPU is another at each start; as if it were on CPU here."""
    setup = build_setup(config(folder, 10.0), Mesh())
    (whole,) = micro_batches(setup)
    weights = 5 * sum(value.nbytes for value in setup.model.parameters())
    free = (predicted(setup, whole) / 2.5 + weights) / 0.9

    def go_on(where: Path, steps: int, free: float, memory_gb: float | None = None, recompute: Any = "all") -> str:
        monkeypatch.setattr(budget, "_free_bytes", lambda device: free)
        base = config(folder, memory_gb)
        training = replace(base.training, output=str(where), train_iters=steps, train_epochs=None, save_interval=1)
        assert run_training(replace(base, training=replace(training, recompute=recompute))) == 0
        return capsys.readouterr().out

    def checkpoint(where: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
        return read_directory(where / "checkpoints" / f"step_{step:08d}")

    first = folder / "first"
    go_on(first, 1, free)
    chosen = checkpoint(first, 1)[1]["batches"]["budget"]
    assert chosen["available"] == pytest.approx(0.9 * free - weights, rel=0.01)
    ends = {}
    for name, factor in (("as before", 1.0), ("a little less", 0.96), ("more", 10.0)):
        shutil.copytree(first, folder / name)
        assert "GB by prediction, as at the start of this run" in go_on(folder / name, 2, factor * free)
        tensors, state = checkpoint(folder / name, 2)
        assert state["batches"]["budget"] == chosen
        ends[name] = tensors
    for name in ("a little less", "more"):
        assert all(torch.equal(value, ends[name][key]) for key, value in ends["as before"].items())

    for name in ("too little", "other bytes", "told"):
        shutil.copytree(first, folder / name)
    with pytest.raises(CheckpointError, match=r"began with micro-batches of up to .*give data.memory_gb to go on"):
        go_on(folder / "too little", 2, 0.9 * free)
    # What is kept decides on the bytes of each atom; then micro-batches are others anyway.
    assert "as at the start" not in go_on(folder / "other bytes", 2, 10.0 * free, recompute="none")
    assert checkpoint(folder / "other bytes", 2)[1]["batches"]["budget"]["available"] > 5.0 * chosen["available"]
    assert "as at the start" not in go_on(
        folder / "told", 2, 0.9 * free, memory_gb=memory_for(budget.USED * 0.9 * free)
    )
    assert checkpoint(folder / "told", 2)[1]["batches"] is None


def test_the_least_recomputation_with_which_the_largest_structure_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "RECOMPUTE_BYTES", 1 << 14)  # of structures as small as these some results reach it

    def built(memory_gb: float, policy: str) -> Setup:
        of_run = config(folder, memory_gb)
        assert of_run.model is not None
        deep = replace(of_run.model, num_layers=6)  # in a shallow model whole blocks are most of what there is
        return build_setup(replace(of_run, model=deep, training=replace(of_run.training, recompute=policy)), Mesh())

    def least(policy: str) -> float:
        """GB with which the largest structure just fits."""
        setup = built(10.0, policy)
        room = setup.portions.budget.memory
        assert room is not None
        spare = room.available - float(room.of_records(setup.datasets.train.sizes).max())
        return 10.0 - memory_for(spare) + memory_for(0.0)

    def chosen(memory_gb: float) -> str:
        setup = built(memory_gb, "auto")
        assert setup.model.recompute_blocks == (setup.model.recompute == "full")
        assert micro_batches(setup)
        return setup.model.recompute

    given = config(folder, 2.0)
    for policy in ("none", "selective", "all", "full"):
        assert chosen(least(policy) + 1e-6) == policy  # 1 kB more
    assert run_training(replace(given, training=replace(given.training, recompute="auto"), dry_run=True)) == 0
    assert "; recompute none" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data.memory_gb is None: what fits is known for data.budget auto with"):
        replace(config(folder, None), training=replace(given.training, recompute="auto"))
