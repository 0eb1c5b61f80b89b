"""One mixture-of-experts model of six levels of theory, against a dense model and against a model for each task.

    python -m tools.bench.universal --data FOLDER --work runs/universal --steps 200 --output universal.json

The tasks, the loss and the optimizer are those of `examples/universal_mini.yaml`; `--data` takes the place of its
folder `data`. Every run is a `janus-matris train`, one after the other:

- shared: the preset moe-tiny on all tasks;
- dense: a model without experts on all tasks, with about as many parameters as moe-tiny has active ones;
- single-TASK: moe-tiny on one task alone, with as many updates of as many structures.

Where the whole data are too much, `--subset` and `--subset_atoms` bound what a task trains on, `--test_subset` the test
structures of each file; structures are taken at even distances from the files, and all models get the same ones.
The trivial floor beside them is a least-squares energy per element, fitted on the same training structures, with
forces and stress zero. A run that is in `--work` already goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import yaml

from tools.bench.report import BenchHelp, add_output, write_report

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "universal_mini.yaml"
DENSE = {"num_layers": 2, "hidden_size": 80, "num_elements": 118}
"""924 809 parameters; moe-tiny has 923 593 active ones (without the embedding of tasks, which both get)."""
GPA = 160.21766208  # GPa in 1 eV/A^3
COLUMNS = (
    ("E meV/atom", "energy_mae_meV_per_atom", "energy_rmse_meV_per_atom"),
    ("F meV/A", "forces_mae_meV_per_A", "forces_rmse_meV_per_A"),
    ("S GPa", "stress_mae_GPa", "stress_rmse_GPa"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: its name, the model's options, the names of its tasks."""

    name: str
    model: list[str]
    tasks: list[str]


def main() -> int:
    options = _options()
    settings = yaml.safe_load(EXAMPLE.read_text())
    tasks = [_subset(task, options) for task in settings["data"]["tasks"]]
    names = [task["name"] for task in tasks]
    experts, dense = ["--preset", "moe-tiny"], [f"--model.{key}={value}" for key, value in DENSE.items()]
    runs = [Run(name="shared", model=experts, tasks=names), Run(name="dense", model=dense, tasks=names)]
    runs += [Run(name=f"single-{name}", model=experts, tasks=[name]) for name in names]
    if unknown := set(options.runs or ()) - {run.name for run in runs}:
        raise SystemExit(f"--runs {', '.join(sorted(unknown))}: there are {', '.join(run.name for run in runs)}")
    report: dict[str, Any] = {
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "options": {key: str(value) for key, value in vars(options).items()},
        "tasks": {task["name"]: _facts(task) for task in tasks},
        "runs": {},
    }
    for run in runs:
        if options.runs and run.name not in options.runs:
            continue
        report["runs"][run.name] = _train(run, settings, tasks, options)
        write_report(options.output, report)
        print(table(report), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--data", type=Path, required=True, help="folder with acac, mlearn_Li, ... in it")
    parser.add_argument("--work", type=Path, required=True, help="folder for subsets and runs")
    add_output(parser, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="updates of each run")
    parser.add_argument("--batch_size", type=int, default=8, help="structures per update")
    parser.add_argument("--subset", type=int, help="training structures of a task, at most; validation: a tenth of it")
    parser.add_argument("--subset_atoms", type=int, help="atoms of a task's training structures together, at most")
    parser.add_argument("--test_subset", type=int, help="structures of each test file, at most")
    parser.add_argument("--cutoffs", type=float, nargs=2, default=[6.0, 4.5], help="of pairs and angles, A")
    parser.add_argument("--runs", nargs="+", help="which of shared, dense, single-acac, ... (default: all)")
    options = parser.parse_args()
    if not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: no directory {options.output.parent}")
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such directory")
    return options


def _subset(task: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The task with files of `--work` that have its structures within its limits and those of the command line."""
    made = dict(task)
    for split in ("train", "valid", "test"):
        files = [options.data / Path(name).relative_to("data") for name in task.get(split, [])]
        made[split] = []
        for file in files:
            data = file.read_bytes()  # all at once: ASE seeks back and forth, which compressed files do slowly
            text = io.StringIO((gzip.decompress(data) if file.suffix == ".gz" else data).decode())
            structures = [atoms for atoms in ase.io.read(text, ":", format="extxyz") if _within(atoms, task)]
            largest = len(structures)
            if split == "test":
                largest = min(largest, options.test_subset or largest)
            else:
                if options.subset:
                    largest = min(largest, options.subset // len(files) // (1 if split == "train" else 10))
                if options.subset_atoms:
                    mean = float(np.mean([len(atoms) for atoms in structures]))
                    budget = options.subset_atoms / len(files) / (1 if split == "train" else 10)
                    largest = min(largest, round(budget / mean))
            taken = np.linspace(0, len(structures) - 1, max(largest, 2)).round().astype(int)
            path = options.work / "data" / f"{file.parent.name}-{split}.xyz"
            path.parent.mkdir(parents=True, exist_ok=True)
            ase.io.write(path, [structures[index] for index in taken], format="extxyz")
            made[split].append(str(path))
    return made


def _within(atoms: ase.Atoms, task: dict[str, Any]) -> bool:
    if "max_force" not in task:
        return True
    largest = np.linalg.norm(atoms.get_forces(), axis=1).max()
    return bool(largest <= task["max_force"] and np.abs(atoms.get_stress()).max() <= task["max_stress"])


def _facts(task: dict[str, Any]) -> dict[str, Any]:
    """Numbers of structures, and the trivial floor."""
    train, test = ([atoms for file in task[split] for atoms in ase.io.read(file, ":")] for split in ("train", "test"))
    counts, found = (
        np.stack([np.bincount(atoms.numbers, minlength=119) for atoms in part]).astype(float) for part in (train, test)
    )
    energies = np.array([atoms.get_potential_energy() for atoms in train])
    weights = 1.0 / counts.sum(axis=1)  # errors per atom, as in the tables
    fitted = np.linalg.lstsq(counts * weights[:, None], energies * weights, rcond=None)[0]
    truth = np.array([atoms.get_potential_energy() for atoms in test])
    error = (truth - found @ fitted) / found.sum(axis=1) * 1e3
    labels = {"E meV/atom": error, "F meV/A": 1e3 * np.concatenate([atoms.get_forces().ravel() for atoms in test])}
    if all("stress" in atoms.calc.results for atoms in test):
        labels["S GPa"] = GPA * np.concatenate([atoms.get_stress() for atoms in test])
    return {
        "train": len(train),
        "test": len(test),
        "train_atoms": int(counts.sum()),
        "floor": {name: [float(np.abs(x).mean()), float(np.sqrt(np.mean(x**2)))] for name, x in labels.items()},
    }


def _train(
    run: Run, settings: dict[str, Any], tasks: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """The run's errors on the test files, by task."""
    data = {key: value for key, value in settings["data"].items() if key not in ("tasks", "global_batch_size")}
    data |= {"tasks": [task for task in tasks if task["name"] in run.tasks], "global_batch_size": options.batch_size}
    data |= {"cache_dir": str(options.work / "cache")}
    if len(run.tasks) == 1:
        data.pop("task_temperature", None)
        data["tasks"] = [{key: value for key, value in task.items() if key != "weight"} for task in data["tasks"]]
    optim = settings["optim"] | {"ema_decay": max(0.0, min(0.995, 1.0 - 10.0 / options.steps))}
    training = {"train_iters": options.steps, "eval_interval": max(1, options.steps // 2), "log_interval": 10}
    output = options.work / run.name
    config = {"data": data, "loss": settings["loss"], "optim": optim, "training": training | {"output": str(output)}}
    path = options.work / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    pair, angle = options.cutoffs
    command = [sys.executable, "-m", "matris", "train", "--config", str(path), *run.model]
    command += [f"--model.pairwise_cutoff={pair}", f"--model.three_body_cutoff={angle}"]
    start = time.monotonic()
    with open(options.work / f"{run.name}.log", "w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    metrics = json.loads((output / "metrics.json").read_text())
    found = {
        name: {
            title: [errors[mae], errors[rmse]] for title, mae, rmse in COLUMNS if not np.isnan(errors.get(mae, np.nan))
        }
        for name, errors in metrics["test"]["tasks"].items()
    }
    parameters = metrics["parameters"]
    return {
        "parameters": parameters,
        "best_step": metrics["step"],
        "seconds": time.monotonic() - start,
        "tasks": found,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each task and model, MAE / RMSE."""
    titles = [title for title, _, _ in COLUMNS]
    lines = [f"| task (train, test) | model | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for task, facts in report["tasks"].items():
        rows = {"floor": facts["floor"]}
        rows |= {name: run["tasks"][task] for name, run in report["runs"].items() if task in run["tasks"]}
        for number, (name, errors) in enumerate(rows.items()):
            cells = [" / ".join(f"{value:.4g}" for value in errors.get(title, ())) for title in titles]
            first = f"{task} ({facts['train']}, {facts['test']})" if number == 0 else ""
            lines.append(f"| {first} | {name.removesuffix('-' + task)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
