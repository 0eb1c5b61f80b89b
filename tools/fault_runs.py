"""Launches of `janus-matris train` in which something goes wrong, and what must be true of the run after each."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from safetensors.torch import load_file

from janus.checkpoint import read_directory
from janus.comm.local import find_port
from janus.telemetry.csv_log import read_csv
from janus.training.trainer import SPEEDS
from tools.fault_hooks import Hooks, Moment, Plan, valid_steps

STEPS, SAVE_INTERVAL, EVAL_INTERVAL, KEEP_LAST, KEEP_EVERY = 10, 2, 2, 2, 6
PATIENCE = 240.0
"""Seconds until a launch must have ended, also on a machine that is busy with other things."""
TIMEOUT_MINUTES = 0.4
"""How long a rank waits for others. Those that are killed are noticed much sooner."""
TOLERANCE = 1e-10
"""Largest difference of fp64 weights of other layouts, relative to the largest of a tensor."""
_VALID = (1, 2, 5, 16)
"""Structures of the validation set: with these the dense model is best at the end, that with experts in the middle."""
_TIMES = (*SPEEDS, "seconds")
"""Columns of the log that differ from run to run; those of experts differ from layout to layout."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks, and how they share a model.

    Attributes:
        ranks: how many.
        model: `dense` or `experts`; runs of the same model have the same weights.
        options: of the command line.
    """

    ranks: int
    model: str
    options: str = ""


LAYOUTS = {
    "one": Layout(ranks=1, model="dense"),
    "dp2": Layout(ranks=2, model="dense"),
    "fsdp2": Layout(ranks=2, model="dense", options="--parallel.fully_sharded_size 2"),
    "tp2": Layout(ranks=2, model="dense", options="--parallel.tensor_model_parallel_size 2"),
    "moe": Layout(ranks=1, model="experts"),
    "moe-ep2": Layout(ranks=2, model="experts", options="--parallel.expert_model_parallel_size 2"),
}
_MODELS = {
    "dense": "",
    "experts": "--model.num_moe_experts 4 --model.moe_router_topk 2 --model.moe_ffn_hidden_size 6 "
    "--model.kv_channels 4",
}


def write_data(base: Path) -> None:
    """Small molecules and crystals with labels of noise."""
    rng = np.random.default_rng(0)
    crystals = [ase.build.bulk("Si"), ase.build.bulk("NaCl", "rocksalt", a=5.6)]
    kinds = [*(ase.build.molecule(formula) for formula in ("H2O", "CH4", "NH3", "CO")), *crystals]
    frames = []
    for index in range(18):
        atoms = kinds[index % len(kinds)].copy()
        atoms.rattle(0.1, seed=index)
        results = {"energy": float(rng.normal()), "forces": 0.3 * rng.normal(size=(len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    ase.io.write(base / "train.xyz", frames, format="extxyz")
    ase.io.write(base / "valid.xyz", [frames[index] for index in _VALID], format="extxyz")


def command(base: Path, output: Path, layout: Layout, *, timeout_minutes: float = TIMEOUT_MINUTES) -> list[str]:
    """The words of a run."""
    words = f"train --data.train {base}/train.xyz --data.valid {base}/valid.xyz --data.cache_dir {base}/cache "
    words += f"--data.global_batch_size 4 --data.num_workers 0 --training.output {output} --training.resume auto "
    words += f"--training.train_iters {STEPS} --training.save_interval {SAVE_INTERVAL} --training.log_interval 1 "
    words += f"--training.eval_interval {EVAL_INTERVAL} --training.keep_last {KEEP_LAST} "
    words += f"--training.keep_every {KEEP_EVERY} --training.precision fp64 --training.device cpu --optim.lr 1e-2 "
    words += "--optim.ema_decay 0.8 --model.num_layers 1 --model.hidden_size 8 --model.pairwise_cutoff 4.0 "
    words += "--model.three_body_cutoff 3.0 --model.num_radial 3 --model.num_angular 3 "
    words += f"--model.readout_hidden_sizes [8] {_MODELS[layout.model]} {layout.options} "
    if layout.ranks > 1:
        words += f"--parallel.distributed_timeout_minutes {timeout_minutes}"
    return words.split()


# Launches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Launched:
    """How a launch went.

    Attributes:
        statuses: exit status by rank; minus the signal that ended it.
        texts: what each rank printed.
        fired: whether the moment of its plan has come.
        violations: what the ranks have seen of the checkpoints that must not be.
        seconds: until all had ended.
    """

    statuses: list[int]
    texts: list[str]
    fired: bool
    violations: list[str]
    seconds: float

    @property
    def text(self) -> str:
        """Of all ranks."""
        return "".join(self.texts)


def launch(
    words: Sequence[str],
    plans: Sequence[Plan],
    *,
    delayed: Mapping[int, signal.Signals] | None = None,
    delay: float = 0.0,
) -> Launched:
    """Runs the command on so many ranks, forked from this process, which has to have one thread and no process group.

    Args:
        plans: one for each rank.
        delayed: signals by rank, sent after `delay` seconds.
    """
    folder = plans[0].folder
    folder.mkdir(parents=True)
    port = find_port()
    begin = time.monotonic()
    pids: list[int] = []
    for plan in plans:
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(words, plan, len(plans), port))
        pids.append(pid)
    (folder / "pids.tmp").write_text(" ".join(map(str, pids)))
    (folder / "pids.tmp").rename(folder / "pids")
    statuses: dict[int, int] = {}
    waiting = dict(delayed or {})
    while len(statuses) < len(pids):
        time.sleep(0.01)
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        running = [rank for rank in range(len(pids)) if rank not in statuses]
        elapsed = time.monotonic() - begin
        if elapsed > delay:
            for rank, number in waiting.items():
                if rank in running:
                    os.kill(pids[rank], number)
                    (folder / f"fired.{rank}").touch()
            waiting.clear()
        if all(_is_stopped(pids[rank]) for rank in running) or elapsed > PATIENCE:
            for rank in running:
                os.kill(pids[rank], signal.SIGKILL)
    return Launched(
        statuses=[statuses[rank] for rank in range(len(pids))],
        texts=[(folder / f"{rank}.log").read_text() for rank in range(len(pids))],
        fired=any(folder.glob("fired.*")),
        violations=[line for path in sorted(folder.glob("violations.*")) for line in path.read_text().splitlines()],
        seconds=time.monotonic() - begin,
    )


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # no Linux, or ended just now
        return False


def _rank(words: Sequence[str], plan: Plan, world_size: int, port: int) -> int:
    """As if a launcher had started this rank. Returns its exit status."""
    status = 1
    try:
        log = os.open(plan.folder / f"{plan.rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if world_size > 1:
            os.environ.update(RANK=str(plan.rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(plan.rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = run_hooked(words, plan)
        threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    return status


def run_hooked(words: Sequence[str], plan: Plan) -> int:
    """The command line in this process, with what is planned."""
    from matris.cli import main

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    hooks = Hooks(plan)
    status = main(words)
    hooks.write_calls()
    return status


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Args:
        base: with the data, and folders of references.
        name: of the layout.
    """

    base: Path
    name: str

    @property
    def output(self) -> Path:
        """Its directory."""
        return self.base / "references" / self.name / "run"

    @property
    def _folder(self) -> Path:
        return self.output.parent / "launch"

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float((self._folder / "seconds").read_text())

    def calls(self, place: str, rank: int) -> int:
        """How often a rank came to a place."""
        return int(json.loads((self._folder / f"calls.{rank}.json").read_text())[place])

    @property
    def checkpoint_bytes(self) -> int:
        """Size of its last checkpoint."""
        return sum(file.stat().st_size for file in self._last.iterdir())

    @property
    def largest_file_bytes(self) -> int:
        """Size of the largest file of that."""
        return max(file.stat().st_size for file in self._last.iterdir())

    @property
    def _last(self) -> Path:
        return self.output / "checkpoints" / f"step_{STEPS:08d}"

    def run(self) -> list[str]:
        """Makes it. Returns what is wrong, with it or with the checkpoints at any moment of it."""
        layout = LAYOUTS[self.name]
        plans = [
            Plan(rank=rank, folder=self._folder, output=self.output, keep_last=KEEP_LAST)
            for rank in range(layout.ranks)
        ]
        self.output.mkdir(parents=True)
        done = launch(command(self.base, self.output, layout), plans)
        (self._folder / "seconds").write_text(str(done.seconds))
        problems = [*done.violations, *History(output=self.output).problems()]
        if any(done.statuses):
            return [f"the statuses are {done.statuses}: {done.text}", *problems]
        return [*problems, *differences(self.output, self.output, exact=True)]


def write_plan(plan: Plan) -> None:
    """For ranks that a launcher starts as `python -m tools.fault_runs FOLDER WORDS`."""
    plan.folder.mkdir(parents=True)
    content = {**asdict(plan), "folder": str(plan.folder), "output": str(plan.output)}
    (plan.folder / "plan.json").write_text(json.dumps(content))


def read_plan(folder: Path, rank: int) -> Plan:
    """Inverse of `write_plan`."""
    content = json.loads((folder / "plan.json").read_text())
    moment = content.pop("moment")
    content |= {"rank": rank, "folder": folder, "output": Path(content["output"])}
    return Plan(**content, moment=Moment(**moment) if moment else None)


# What must be true ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class History:
    """Checkpoints that a run has had, to know which it must have.

    Attributes:
        saved: steps, also of those that were removed since.
        present: steps that were valid after the last launch.
        damaged: directories that the harness has damaged.
    """

    output: Path
    saved: set[int] = field(default_factory=set)
    present: set[int] = field(default_factory=set)
    damaged: set[Path] = field(default_factory=set)

    def path(self, step: int) -> Path:
        """Of a checkpoint."""
        return self.output / "checkpoints" / f"step_{step:08d}"

    def problems(self) -> Iterable[str]:
        """Looks at the disk after a launch: every checkpoint is valid, and all that have to be there are."""
        valid = valid_steps(self.output)
        whole = {self.path(step) for step in valid}
        for path in sorted((self.output / "checkpoints").glob("step_*")):
            if path not in whole and path not in self.damaged:
                yield f"{path.name} is not valid: it was not made by one rename"
        self.damaged -= whole  # written again
        newest = max(valid, default=0)
        if newest < max(self.present, default=0):
            yield f"the newest valid checkpoint was of step {max(self.present)}, and is of {newest}"
        self.present = set(valid)
        if not valid:
            return
        self.saved |= {*valid, *range(SAVE_INTERVAL, newest + 1, SAVE_INTERVAL)}
        best = json.loads((self.path(newest) / "state.json").read_text())["best_step"]
        kept = {*sorted(self.saved)[-KEEP_LAST:], *(step for step in self.saved if step % KEEP_EVERY == 0)}
        if best in self.saved:
            kept.add(best)
        lost = {step for step in kept if step not in valid and self.path(step) not in self.damaged}
        if lost:
            yield f"the valid checkpoints are {valid}, and those of {sorted(lost)} are to be kept (best: {best})"

    def forget(self, path: Path) -> None:
        """The harness has damaged or removed a checkpoint."""
        self.damaged.add(path)
        for steps in (self.saved, self.present):
            steps.discard(int(path.name.removeprefix("step_")))


def differences(output: Path, reference: Path, *, exact: bool) -> Iterable[str]:
    """What a finished run has that an undisturbed one has not."""
    name = f"checkpoints/step_{STEPS:08d}"
    found, state = read_directory(output / name)
    wanted, wanted_state = read_directory(reference / name)
    yield from _tensor_differences("final checkpoint", found, wanted, exact)
    for key in ("best_step", "best_loss"):
        if not _close(state[key], wanted_state[key], exact):
            yield f"final checkpoint: {key} is {state[key]}, not {wanted_state[key]}"
    for model in ("best", "last"):
        weights = load_file(output / model / "model.safetensors")
        yield from _tensor_differences(model, weights, load_file(reference / model / "model.safetensors"), exact)
    rows, wanted_rows = read_csv(output / "log.csv"), read_csv(reference / "log.csv")
    if [row["step"] for row in rows] != [row["step"] for row in wanted_rows]:
        yield f"log.csv has the steps {[int(row['step']) for row in rows]}"
    else:
        for row, other in zip(rows, wanted_rows, strict=True):
            compared = [key for key in other if key not in _TIMES and (exact or "expert" not in key)]
            differing = [key for key in compared if not _close(row.get(key), other[key], exact)]
            if differing:
                yield f"log.csv, step {int(row['step'])}: {differing} differ"
    errors, wanted_errors = (json.loads((run / "metrics.json").read_text()) for run in (output, reference))
    if errors["step"] != wanted_errors["step"]:
        yield f"metrics.json is of step {errors['step']}, not {wanted_errors['step']}"
    for key, value in wanted_errors["valid"].items():
        if isinstance(value, float) and not _close(errors["valid"][key], value, exact):
            yield f"metrics.json: {key} is {errors['valid'][key]}, not {value}"
    rest = [path.name for folder in (output, output / "checkpoints") for path in folder.glob(".*")]
    if rest:
        yield f"left behind: {rest}"


def _tensor_differences(
    what: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], exact: bool
) -> Iterable[str]:
    if found.keys() != wanted.keys():
        yield f"{what}: has {len(found)} tensors, not {len(wanted)}"
        return
    differing = [
        name
        for name, value in wanted.items()
        if not (
            torch.equal(found[name], value)
            if exact
            else torch.allclose(found[name], value, rtol=0.0, atol=TOLERANCE * max(float(value.abs().max()), 1e-30))
        )
    ]
    if differing:
        yield f"{what}: {len(differing)} of {len(wanted)} tensors differ, such as {differing[0]}"


def _close(found: Any, wanted: Any, exact: bool) -> bool:
    if found is None or wanted is None or exact or isinstance(wanted, str):
        return bool(found == wanted)
    return math.isclose(found, wanted, rel_tol=1e-8, abs_tol=TOLERANCE)


if __name__ == "__main__":
    sys.exit(run_hooked(sys.argv[2:], read_plan(Path(sys.argv[1]), int(os.environ["RANK"]))))
