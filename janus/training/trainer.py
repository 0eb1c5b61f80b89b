"""The loop: step, evaluate, save, stop, resume."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from janus.checkpoint import Checkpoint, CheckpointError, CheckpointStore, capture_rng, restore_rng
from janus.comm.collectives import gather_numbers, gather_objects, on_main_rank
from janus.comm.watch import is_of_a_collective
from janus.mesh import ElsewhereError, Mesh
from janus.telemetry import Peak, Progress, RunLog
from janus.training.evaluation import evaluate
from janus.training.learner import Learner
from janus.training.signals import stop_on_signals
from janus.training.step import StepReport, train_step
from janus.training.task import Batch, EvaluationSource, Task, TrainingSource

SPEEDS = (
    "structures_per_s",
    "edges_per_s",
    "flops_per_s",
    "mfu",
    "straggler_ratio",
    "data_wait",
)
"""Columns of the log that clocks have measured, beside `seconds` since the start: records, edges and FLOPs of matrix
products (by formula) of all ranks, and the share of their peak; the largest time of forward and backward passes of any
rank over the mean of all; the largest share of the time that any rank has waited for its next batch."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The rhythm of a run.

    Attributes:
        num_steps: updates in all.
        eval_interval: updates between two evaluations.
        save_interval: updates between two checkpoints.
        log_interval: updates between two records; a record covers all updates since the last one.
        keep_last: checkpoints kept, beside that of the best evaluation.
        keep_every: updates between two checkpoints that are kept for good; 0 keeps none.
        async_save: whether the training goes on while a checkpoint is written.
        resume: `auto` continues from the newest valid checkpoint if there is one, `never` refuses an output directory
            that has checkpoints, anything else is the path of a checkpoint to begin with.
        wandb_project: project for wandb, None for no wandb.
    """

    num_steps: int
    eval_interval: int
    save_interval: int
    log_interval: int = 10
    keep_last: int = 2
    keep_every: int = 0
    async_save: bool = True
    resume: str = "auto"
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: updates done.
        stopped: whether a signal ended it early; the same command then continues it.
        best_step: update with the smallest validation loss, None without a validation set.
    """

    step: int
    stopped: bool
    best_step: int | None


class Trainer:
    """Trains a task's model in a run directory: `log.csv`, `tensorboard/`, `checkpoints/`, and exports the best model
    to `best/` and, at the end, the last one to `last/`, always with the averaged weights,
    which evaluations use as well.

    Args:
        directory: run directory, writable on rank 0 and readable on all ranks.
        settings: resolved settings of the run, JSON-ready, by group; kept in the checkpoints. The group `model` and the
            entry `records.train`, which stands for the content of the training data, must not change when a run is
            resumed; other changes are announced.
        provenance: goes into exported models.
        peak: of a rank, which the speed is compared with; None compares it with nothing.
    """

    def __init__(
        self,
        *,
        task: Task,
        learner: Learner,
        train: TrainingSource,
        valid: EvaluationSource | None,
        config: TrainerConfig,
        mesh: Mesh,
        directory: Path,
        settings: Mapping[str, Any],
        provenance: Mapping[str, Any],
        peak: Peak | None = None,
    ) -> None:
        self.task, self.learner, self.mesh, self.config = task, learner, mesh, config
        self.train, self.valid = train, valid
        self.directory, self.settings, self.provenance, self.peak = directory, settings, provenance, peak
        self.store = CheckpointStore(
            directory / "checkpoints",
            mesh,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            background=config.async_save,
        )
        self.best_step: int | None = None
        self.best_loss = float("inf")
        self.validation: dict[str, float] | None = None
        self.restored: Checkpoint | None = None

    def run(self) -> Outcome:
        """Trains to the last step or to a stop signal. All ranks call it, after `resume`.

        Raises:
            NonFiniteError: a loss, of training or validation, is not finite; the checkpoints stay as they are.
            CheckpointError: a checkpoint could not be written; those before it stay as they are.
        """
        on_main_rank(lambda: self.directory.mkdir(parents=True, exist_ok=True), self.mesh)
        self.learner.broadcast()
        num_steps, learner = self.config.num_steps, self.learner
        stopped = False
        with stop_on_signals() as flag, self._logs(), self._saves():
            lost = self._forget_lost_best()
            if learner.step == 0 or lost:
                self._evaluate()
            pending: list[StepReport] = []
            batches = self.train.batches(learner.step) if learner.step < num_steps else ()
            for batch in self._timed(batches):
                self.mesh.watch.step = learner.step + 1
                rate = learner.learning_rate
                totals = self.train.totals(batch.indices)
                stop = flag.is_set or self.store.failed
                report = train_step(self.task, batch, totals, learner=learner, mesh=self.mesh, stop=stop)
                pending.append(report)
                if report.stop:
                    self.store.wait()  # if it failed, this raises on all ranks
                stopped = report.stop and learner.step < num_steps
                last = stopped or learner.step == num_steps
                self._show(report, len(batch.indices), rate, pending, last)
                if learner.step % self.config.eval_interval == 0 or learner.step == num_steps:
                    self._evaluate()
                if learner.step % self.config.save_interval == 0 or last:
                    self._save()
                if last:
                    break
            with learner.averaged():
                self._export("last")
            if stopped:
                self._progress.say(f"stopped after step {learner.step} as asked; the same command continues from there")
        return Outcome(step=learner.step, stopped=stopped, best_step=self.best_step)

    # What is written -------------------------------------------------------------------------------------------------

    @contextmanager
    def _saves(self) -> Iterator[None]:
        """Waits at the end of the block for the save that is under way, unless ranks that must write it are lost."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, ElsewhereError) and not is_of_a_collective(error):
                with suppress(CheckpointError):  # the first error says why the run ended
                    self.store.wait()
            raise
        self.store.wait()

    @contextmanager
    def _logs(self) -> Iterator[None]:
        """Progress and log, open inside of the block."""
        columns = ("lr", "grad_norm", *SPEEDS, "seconds", *self.task.columns)
        self._start = time.monotonic()
        self._waited = self._worked = 0.0
        self._first: StepReport | None = None
        self._limits = ""
        self._progress = Progress(
            self.config.num_steps,
            self.learner.step,
            line_interval=self.config.log_interval,
            active=self.mesh.is_main,
        )
        self._log = None
        if self.mesh.is_main:
            self._log = RunLog(
                self.directory,
                [*columns, *(f"valid_{name}" for name in self.task.columns)],
                start_step=self.learner.step,
                wandb_project=self.config.wandb_project,
                config=self.settings,
            )
        if self.peak is not None:
            self._progress.say(f"{'peak':<12} {self.peak.origin}")
        if self.restored is not None:
            self._progress.say(f"resuming after step {self.learner.step} from {self.restored.path}")
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error says why the run ended
                self._close_logs()
            raise
        self._close_logs()

    def _close_logs(self) -> None:
        self._progress.close()
        if self._log is not None:
            self._log.close()

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; counts the seconds until each is there, and those until the next is asked for."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            begin = time.perf_counter()
            self._waited += begin - start
            if batch is None:
                return
            self._begin = begin
            yield batch

    def _show(self, report: StepReport, num_records: int, rate: float, pending: list[StepReport], last: bool) -> None:
        """Progress of this step; a record over all pending steps when it is time, which empties `pending`."""
        step = self.learner.step
        self._worked += time.perf_counter() - self._begin
        is_record = step % self.config.log_interval == 0 or last
        if self._first is None:
            self._first = report
            if not is_record:  # it makes kernels and fills caches: no part of the speed, if others are
                self._waited = self._worked = 0.0
        speeds = self._speeds(pending) if is_record else {}
        values = self.task.report(report.sums, 1)
        text = self.task.summary(values) + self._limits
        rates = self._progress.step(step, num_records, report.num_edges, text)
        if self._log is not None and is_record:
            values = self.task.report(np.sum([step.sums for step in pending], axis=0), len(pending))
            speeds |= {"structures_per_s": rates[0], "edges_per_s": rates[1], "seconds": time.monotonic() - self._start}
            self._log.write(step, {"lr": rate, "grad_norm": report.grad_norm, **speeds, **values})
        if step % self.config.log_interval == 0:
            pending.clear()

    def _speeds(self, pending: list[StepReport]) -> dict[str, float]:
        """Of the pending steps, whatever came between them left out; all ranks call it."""
        pending = [report for report in pending if report is not self._first] or pending
        computing = sum(report.computing.seconds() for report in pending)
        waited, seconds = self._waited, self._waited + self._worked
        self._waited = self._worked = 0.0
        ranks = gather_numbers([computing, waited], self.mesh)
        mean, largest = ranks[:, 0].mean(), ranks[:, 0].max()
        speeds = {
            "straggler_ratio": largest / mean if mean > 0.0 else 1.0,
            "data_wait": ranks[:, 1].max() / seconds,
        }
        num_flops = sum(report.num_flops for report in pending)
        if num_flops > 0.0:
            speeds["flops_per_s"] = num_flops / seconds
            self._limits = f"  {speeds['flops_per_s'] / 1e9:.3g} GFLOP/s"
            if self.peak is not None:
                speeds["mfu"] = speeds["flops_per_s"] / (self.peak.flops_per_s * self.mesh.world_size)
                self._limits += f" ({100.0 * speeds['mfu']:.3g} % of peak)"
        return speeds

    def _evaluate(self) -> None:
        """Validation errors of the averaged weights; exports them to `best/` if they are the best so far."""
        if self.valid is None:
            return
        with self.learner.averaged():
            around = partial(self.learner.weights.run, training=False)
            sums = evaluate(self.task, self.valid, self.mesh, step=self.learner.step, around=around)
            report = self.validation = self.task.report(sums, 1)
            if report["loss"] < self.best_loss:  # the same bits on all ranks
                self.best_loss, self.best_step = report["loss"], self.learner.step
                self._export("best")
        if self._log is not None:
            self._log.write(self.learner.step, {f"valid_{name}": value for name, value in report.items()})
        self._progress.say(f"step {self.learner.step}  validation: {self.task.summary(report)}")
        self._progress.pause()

    def _forget_lost_best(self) -> bool:
        """Whether the best model should be in `best/` and is not; then the best is looked for anew."""
        if self.best_step is None or on_main_rank((self.directory / "best").exists, self.mesh):
            return False
        self._progress.say(
            f"{self.directory / 'best'} of step {self.best_step} is gone: the best model is looked for anew, "
            f"from step {self.learner.step} on"
        )
        self.best_step, self.best_loss = None, float("inf")
        return True

    def _export(self, name: str) -> None:
        """The model with the weights it has now."""
        provenance = {**self.provenance, "step": self.learner.step}
        state = self.learner.state()  # all ranks have a part of it
        on_main_rank(lambda: self.task.export(self.directory / name, state, provenance), self.mesh)

    def _save(self) -> None:
        """Starts a checkpoint, with the random states of all ranks."""
        state = {
            "step": self.learner.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step is not None else None,
            "validation": self.validation,
            "settings": self.settings,
            "provenance": self.provenance,
            "export": self.task.export_facts(),
            "batches": self.train.facts(),
            "rng": gather_objects(capture_rng(), self.mesh),
        }
        self.store.save(self.learner.step, self.learner.shards(), state, best_step=self.best_step)
        self._progress.pause()

    # Resuming --------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restores the state after the last update of the checkpoint that the settings mean, if there is one. The data
        position is the step itself. All ranks call it.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model, or there must be none.
        """
        wanted, steps = self.config.resume, on_main_rank(self.store.steps, self.mesh)
        path = Path(wanted)
        if wanted == "never":
            if steps:
                raise CheckpointError(
                    f"{self.directory} holds checkpoints of a run already, and resume is `never`: "
                    "choose another output directory, or resume with `auto`"
                )
            return
        elsewhere = wanted != "auto" and not self._is_own(path)
        if elsewhere and steps:
            self._say(f"{self.directory} has checkpoints of its own: going on from them, and not from {path} again")
        if wanted == "auto" or (elsewhere and steps):
            self.restored = self.store.latest(self._say, self._take)
            return
        checkpoint = self.store.open(path)
        if newer := [step for step in steps if step > int(checkpoint.state["step"])]:
            raise CheckpointError(
                f"resume is {path}, and there are newer checkpoints of the same run, up to {self.store.path(newer[-1])}"
                ": move those away to go back, or resume with `auto` to go on from them"
            )
        self.store.together(lambda: self._take(checkpoint))
        self.restored = checkpoint

    def _take(self, checkpoint: Checkpoint) -> None:
        """Restores the state in a checkpoint; sends nothing.

        Raises:
            CheckpointError: the checkpoint is of another model, or of other data.
            DamageError: it is not as it was written; the state is then undefined.
        """
        path, state = checkpoint.path, checkpoint.state
        changed = _changes(state["settings"], self.settings)
        if of_model := [change for name, change in changed.items() if name.startswith("model.")]:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {'; '.join(of_model)}. "
                "Use that run's model settings, or another output directory"
            )
        if state["settings"].keys() == {"model"}:
            changed = {}  # a converted model, which no run has made
        if "records.train" in changed:
            raise CheckpointError(
                f"checkpoint {path} was made with other training data: {changed['records.train']}. Give the same "
                "structures and labels in the same order (a validation split also depends on training.seed and "
                "data.valid_fraction), or another output directory"
            )
        self.learner.restore(checkpoint)
        for change in changed.values():
            self._say(f"resuming with a changed setting: {change}")
        # A checkpoint of another run says nothing about what lies in this directory.
        if state["best_step"] is not None and self._is_own(path):
            self.best_step, self.best_loss = int(state["best_step"]), float(state["best_loss"])
        self.validation = state.get("validation")
        self.train.restore(state.get("batches"))
        if len(state["rng"]) == self.mesh.world_size:
            restore_rng(state["rng"][self.mesh.rank])
        elif state["rng"]:
            self._say(f"random states are of {len(state['rng'])} ranks, not {self.mesh.world_size}: not restored")

    def _is_own(self, path: Path) -> bool:
        """Whether a checkpoint lies among those of this run."""
        return path.resolve().parent == self.store.directory.resolve()

    def _say(self, line: str) -> None:
        if self.mesh.is_main:
            print(line, flush=True)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ, by `group.name`, with a text for each."""
    missing = object()
    changed: dict[str, str] = {}
    for group in sorted({*before, *after}):
        old, new = before.get(group, missing), after.get(group, missing)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= {f"{group}.{name}": f"{group}.{text}" for name, text in _changes(old, new).items()}
        elif old != new:
            changed[group] = f"{group} was {old}, is {new}" if old is not missing else f"{group} is {new}, was not set"
    return changed
