"""Efficiency of each kind of parallelism with two ranks, against two processes that do not communicate.

    python -m tools.bench.parallel --output parallel.json
    python -m tools.bench.parallel --experts 8 --layouts dp2 ep2 ep2-home --output experts.json

Two pinned one-thread processes train alone, each on batches of so many structures; then two pinned ranks train together
on batches of twice as many, under each layout. Both do the same work, so the ratio of their times per step is the
efficiency, with contention for memory on both sides. Each side runs in fresh processes, in the order control, layouts,
layouts in reverse, control. Timed are whole training steps: forces, second backward, gradients' sums, clipping, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus.comm.local import find_port
from matris.config import ModelConfig
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report

LAYOUTS = ("dp2", "fsdp2", "fsdp2-keep", "gp2", "tp2")
EXPERT_LAYOUTS = ("ep2", "ep2-home")
"""For models with experts; the other layouts serve these too."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument(
        "--layouts", nargs="+", choices=[*LAYOUTS, *EXPERT_LAYOUTS], default=list(LAYOUTS), help="what to measure"
    )
    parser.add_argument(
        "--experts",
        type=at_least(0),
        default=0,
        help="of each site, two for a token; atoms are of all elements then",
    )
    parser.add_argument("--layers", type=at_least(1), default=3, help="interaction blocks")
    parser.add_argument("--width", type=at_least(1), default=64, help="feature width")
    parser.add_argument(
        "--repeat", type=at_least(1), default=2, help="silicon cells along each axis (8 n^3 atoms a structure)"
    )
    parser.add_argument("--structures", type=at_least(1), default=2, help="structures per process and step")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each run, after one that is not")
    add_output(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.worker is not None:
        print(json.dumps(_work(json.loads(options.worker))))
        return 0
    if not options.experts and (wrong := [name for name in options.layouts if name in EXPERT_LAYOUTS]):
        parser.error(f"--layouts {' '.join(wrong)}: the model has no experts; give it some with --experts 8")
    _model(options.layers, options.width, options.experts)  # refused before any process starts
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two CPUs are needed, one for each rank")
    with tempfile.TemporaryDirectory() as folder:
        report = _measure(options, Path(folder))
    print(_table(report))
    write_report(options.output, report)
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    _write_data(folder / "train.xyz", options.repeat, 8 * options.structures, all_elements=options.experts > 0)
    order = ["control", *options.layouts, *reversed(options.layouts), "control"]
    times: dict[str, list[float]] = {}
    ledgers: dict[str, Any] = {}
    for name in order:
        print(f"timing {name}", file=sys.stderr)
        results = _two_processes(name, options, folder)
        # A step is over when the slower of the two is.
        times.setdefault(name, []).extend(map(max, zip(*(result["times_s"] for result in results), strict=True)))
        ledgers[name] = results[0]["wire_bytes"]
    control = statistics.median(times["control"])
    return {
        "layers": options.layers,
        "width": options.width,
        "experts": options.experts,
        "atoms_per_structure": 8 * options.repeat**3,
        "structures_per_step": 2 * options.structures,
        "parameters": results[0]["parameters"],
        "control_s": control,
        "layouts": {
            name: {
                "step_s": statistics.median(times[name]),
                "efficiency": control / statistics.median(times[name]),
                "times_s": times[name],
                "wire_bytes_per_step": ledgers[name],
            }
            for name in options.layouts
        },
        "control_times_s": times["control"],
    }


def _write_data(path: Path, repeat: int, count: int, *, all_elements: bool = False) -> None:
    import ase.build
    import ase.io
    import numpy as np
    from ase.calculators.singlepoint import SinglePointCalculator

    frames, rng = [], np.random.default_rng(0)
    for seed in range(count):
        atoms = ase.build.bulk("Si", cubic=True) * (repeat, repeat, repeat)
        atoms.rattle(0.05, seed=seed)
        if all_elements:  # which choose the experts
            atoms.numbers = rng.integers(1, 95, size=len(atoms))
        labels = {"energy": float(rng.normal()), "forces": rng.normal(size=(len(atoms), 3)), "stress": np.zeros(6)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def _two_processes(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    port = find_port()
    processes = []
    for rank in range(2):
        alone = name == "control"
        environment = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if not alone:
            environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        task = {
            "folder": str(folder),
            "cpu": sorted(os.sched_getaffinity(0))[rank],
            "layout": None if alone else name,
            "batch": options.structures * (1 if alone else 2),
            "layers": options.layers,
            "width": options.width,
            "experts": options.experts,
            "steps": options.steps,
            "cache": str(folder / f"cache{rank if alone else ''}"),
        }
        command = [sys.executable, "-m", "tools.bench.parallel", "--worker", json.dumps(task)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name} failed:\n{errors}")
        results.append(json.loads(output.splitlines()[-1]))
    return results


def _work(task: dict[str, Any]) -> dict[str, Any]:
    os.sched_setaffinity(0, {task["cpu"]})
    import torch

    from janus.mesh import open_mesh
    from janus.training.step import train_step
    from matris.layouts import Layout, parse_layout
    from matris.setup import build_setup
    from matris.train_config import DataConfig, ParallelConfig, TrainConfig, TrainingConfig

    torch.set_num_threads(1)
    layout = Layout() if task["layout"] is None else parse_layout(task["layout"])
    config = TrainConfig(
        data=DataConfig(
            train=[f"{task['folder']}/train.xyz"],
            valid_fraction=0.0,
            global_batch_size=task["batch"],
            cache_dir=task["cache"],
        ),
        training=TrainingConfig(train_iters=1 + task["steps"], output=f"{task['folder']}/run", device="cpu"),
        model=_model(task["layers"], task["width"], task["experts"]),
        parallel=layout.applied(ParallelConfig()),
    )
    with open_mesh("cpu", shard=layout.shard, graph=layout.graph, tensor=layout.tensor, expert=layout.expert) as mesh:
        setup = build_setup(config, mesh)
        batches = list(setup.train.batches(0))  # graphs are built before, as worker processes would
        times = []
        for batch in batches:
            totals = setup.train.totals(batch.indices)
            mesh.ledger.clear()
            start = time.perf_counter()
            train_step(setup.task, batch, totals, learner=setup.learner, mesh=mesh)
            times.append(time.perf_counter() - start)
        return {
            "times_s": times[1:],
            "wire_bytes": dict(mesh.ledger.wire_bytes),
            "parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        }


def _model(layers: int, width: int, experts: int) -> ModelConfig:
    """Raises ValueError for sizes that no model has."""
    model = ModelConfig(num_layers=layers, hidden_size=width)
    if not experts:
        return model
    return replace(model, num_elements=118, num_moe_experts=experts, moe_router_topk=2, moe_ffn_hidden_size=width)


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['layers']} layers, width {report['width']}, {report['experts'] or 'no'} experts, "
        f"{report['structures_per_step']} structures of {report['atoms_per_structure']} atoms per step",
        "| layout | s per step | efficiency | MB sent per rank and step |",
        "|---|---|---|---|",
        f"| two processes alone | {report['control_s']:.3f} | | |",
    ]
    for name, entry in report["layouts"].items():
        sent = sum(entry["wire_bytes_per_step"].values()) / 1e6
        lines.append(f"| {name} | {entry['step_s']:.3f} | {entry['efficiency']:.2f} | {sent:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
