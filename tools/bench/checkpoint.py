"""Saving and loading the state of a training run: throughput against a plain file, what a step waits for, memory.

The control is a plain sequential write of as many bytes to the same disk, by each rank to a file of its own, with
fsync; and a plain sequential read. Files leave the page cache when they are written: they are read from the disk, and
on a virtual machine neither finds memory that the other has warmed. Control and ours alternate (A B B A) in one run.
The state is that of a MatRIS model after an update: weights, average, two moments.

    python -m tools.bench.checkpoint --directory /disk/to/measure --output checkpoint.json
    torchrun --nproc_per_node 2 -m tools.bench.checkpoint --directory /disk/to/measure --layout fsdp2
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from janus.checkpoint import CheckpointStore
from janus.comm.collectives import gather_objects, on_main_rank, reduce_max
from janus.mesh import Mesh, open_mesh
from janus.training.memory import keep_freed_memory
from janus.training.step import train_step
from matris.data.demo import make_demo
from matris.layouts import Layout, parse_layout
from matris.presets import PRESETS
from matris.setup import Setup, build_setup
from matris.train_config import DataConfig, TrainConfig, TrainingConfig
from tools.bench.report import BenchHelp, add_output, write_report

BLOCK = 1 << 24


def main() -> None:
    """Prints a markdown table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure; made, and removed again")
    parser.add_argument("--layout", help="as `janus-matris verify` takes it; by default one process")
    parser.add_argument("--preset", default="moe-s", help="of the model that is saved")
    parser.add_argument("--hidden_size", type=int, default=256, help="width instead of the preset's own")
    parser.add_argument("--num_layers", type=int, default=2, help="blocks instead of the preset's own")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--device", default="cpu", help="as in a run")
    add_output(parser)
    options = parser.parse_args()
    keep_freed_memory()
    layout = parse_layout(options.layout) if options.layout else Layout()
    with open_mesh(
        options.device, shard=layout.shard, graph=layout.graph, tensor=layout.tensor, expert=layout.expert
    ) as mesh:
        try:
            report = measured(options, layout, mesh)
        finally:
            if mesh.is_main:
                shutil.rmtree(options.directory, ignore_errors=True)
    if mesh.is_main:
        print("| | |\n|---|---|")
        for name, value in report.items():
            print(f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |")
        write_report(options.output, report)


def measured(options: argparse.Namespace, layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """Figures by name."""
    options.directory.mkdir(parents=True, exist_ok=True)
    data = options.directory / "data"
    on_main_rank(lambda: make_demo(data), mesh)
    setup = build_setup(config_of(options, layout, data), mesh)
    batch = next(iter(setup.train.batches(0)))  # the same each time, for times to be compared
    step(setup, mesh, batch)
    steps = [clocked(lambda: step(setup, mesh, batch), mesh) for _ in range(options.steps)]
    learner = setup.learner
    own = sum(piece.values.nbytes for held in learner.shards().values() for piece in held.pieces)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    store = CheckpointStore(options.directory / "checkpoints", mesh, keep_last=1)
    plain = options.directory / f"plain_{mesh.rank}"
    times: dict[str, list[float]] = {"plain write": [], "save": [], "plain read": [], "load": []}
    number = 0

    def save() -> None:
        nonlocal number
        number += 1
        store.save(number, learner.shards(), {"step": learner.step}, best_step=None)

    def load() -> None:
        learner.restore(store.open(store.path(number)))

    save()  # its copies are made for the first time
    store.wait()
    blocking, during = [], []
    for _ in range(options.steps):
        blocking.append(clocked(save, mesh))
        during.append(clocked(lambda: step(setup, mesh, batch), mesh))
        store.wait()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    store.background = False
    content = torch.randint(0, 255, (own,), dtype=torch.uint8).numpy()
    for _ in range(options.rounds):
        for name in ("plain write", "save", "save", "plain write"):
            times[name].append(clocked((lambda: write(plain, content)) if name == "plain write" else save, mesh))
        for name in ("plain read", "load", "load", "plain read"):
            for path in (plain, *store.path(number).iterdir()):
                drop(path)
            times[name].append(clocked((lambda: read(plain)) if name == "plain read" else load, mesh))

    middle = {name: statistics.median(values) for name, values in times.items()}
    total = sum(gather_objects(own, mesh))
    return {
        "ranks": mesh.world_size,
        "layout": layout.name,
        "parameters": learner.weights.num_parameters,
        "state, GB": total / 1e9,
        "plain write with fsync, GB/s": total / 1e9 / middle["plain write"],
        "save, GB/s": total / 1e9 / middle["save"],
        "save / plain": middle["plain write"] / middle["save"],
        "save after its copy / plain": middle["plain write"] / (middle["save"] - statistics.median(blocking)),
        "plain read, GB/s": total / 1e9 / middle["plain read"],
        "load, GB/s": total / 1e9 / middle["load"],
        "load / plain": middle["plain read"] / middle["load"],
        "step, s": statistics.median(steps),
        "blocked per save, s": statistics.median(blocking),
        "blocked / step": statistics.median(blocking) / statistics.median(steps),
        "step while a save goes on / step": statistics.median(during) / statistics.median(steps),
        "copy on the host per rank, GB": own / 1e9,
        "peak memory of the run before, GB": before * 1024 / 1e9,
        "peak memory added by saves, GB": (after - before) * 1024 / 1e9,
        "times, s": times,
    }


def config_of(options: argparse.Namespace, layout: Layout, data: Path) -> TrainConfig:
    """The model on the demo set."""
    config = TrainConfig(
        data=DataConfig(
            train=[str(data / "train.xyz")],
            cache_dir=str(data / "cache"),
            global_batch_size=2 * layout.num_ranks,
            valid_fraction=0.0,
        ),
        training=TrainingConfig(train_iters=1000, device=options.device),
        model=replace(PRESETS[options.preset], hidden_size=options.hidden_size, num_layers=options.num_layers),
    )
    return replace(config, parallel=layout.applied(config.parallel))


def step(setup: Setup, mesh: Mesh, batch: Any) -> None:
    train_step(setup.task, batch, setup.train.totals(batch.indices), learner=setup.learner, mesh=mesh)


def clocked(function: Callable[[], None], mesh: Mesh) -> float:
    """Seconds of the slowest rank, from a common start."""
    gather_objects(None, mesh)
    start = time.perf_counter()
    function()
    return reduce_max(time.perf_counter() - start, mesh)


def write(path: Path, content: Any) -> None:
    """Sequentially, to the disk."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK):
            file.write(content[start : start + BLOCK])
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """Out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
