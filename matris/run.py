"""A training run from its settings to its errors and pictures."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import janus
from janus.comm.collectives import on_main_rank, reduce_max
from janus.mesh import Mesh, open_mesh
from janus.telemetry import require_wandb
from janus.training.trainer import Outcome, Trainer, TrainerConfig
from matris.config import Precision
from matris.evaluation import evaluate_dataset, evaluation_source
from matris.exported import load_model, num_parameters
from matris.metrics import metrics_line
from matris.model import Prediction
from matris.plots import plot_learning_curves, plot_parity
from matris.run_table import run_table
from matris.setup import Setup, build_setup
from matris.train_config import TrainConfig, to_plain

STOPPED = 143
"""Exit status of a run that a signal ended after its checkpoint was written (128 + SIGTERM, also for SIGUSR1)."""


def run_training(config: TrainConfig) -> int:
    """Trains as the settings say, or with `dry_run` only shows what that would be. All ranks of a launch call it.

    Returns:
        Exit status: 0, or `STOPPED`.

    Raises:
        ValueError, OSError: a mistake in the settings, the data or the output directory.
    """
    parallel = config.parallel
    with open_mesh(
        config.training.device,
        tensor=parallel.tensor_model_parallel_size,
        graph=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
    ) as mesh:
        output = Path(config.training.output)
        if not config.dry_run:
            on_main_rank(lambda: _check_output(output, config.training.wandb_project), mesh)
        setup = build_setup(config, mesh)
        if mesh.is_main:
            print(run_table(config, setup, mesh), flush=True)
        if config.dry_run:
            return 0
        start = time.monotonic()
        outcome = _train(config, setup, mesh, output)
        if outcome.stopped:
            return STOPPED
        _finish(setup, mesh, output, outcome, Precision(config.training.precision), time.monotonic() - start)
        return 0


def _train(config: TrainConfig, setup: Setup, mesh: Mesh, output: Path) -> Outcome:
    """The trainer with the settings of this run."""
    training = config.training
    settings = {**to_plain(config), "model": setup.model.hyper.to_dict()}
    eval_interval = training.eval_interval or min(setup.steps_per_epoch, setup.num_steps)
    trainer = Trainer(
        task=setup.task,
        learner=setup.learner,
        train=setup.train,
        valid=setup.valid,
        config=TrainerConfig(
            num_steps=setup.num_steps,
            eval_interval=eval_interval,
            save_interval=training.save_interval or eval_interval,
            log_interval=training.log_interval,
            keep_last=training.keep_last,
            resume=training.resume,
            wandb_project=training.wandb_project,
        ),
        mesh=mesh,
        directory=output,
        # How a run continues is no property of the run.
        settings={
            **settings,
            "training": {key: settings["training"][key] for key in settings["training"] if key != "resume"},
        },
        provenance={"janus_matris": janus.__version__, "torch": torch.__version__, "settings": settings},
    )
    trainer.resume()
    if config.init_from is not None and setup.learner.step == 0:
        _verify_base(config, setup, mesh)
    # Only now: settings that are refused must not replace those of a run that is there.
    on_main_rank(lambda: _write(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False)), mesh)
    return trainer.run()


def _verify_base(config: TrainConfig, setup: Setup, mesh: Mesh) -> None:
    """Compares what is about to be trained with the base model, read anew, on the validation set.

    Raises:
        ValueError: a prediction differs by more than rounding.
    """
    base = load_model(str(config.init_from), precision=Precision(config.training.precision)).to(mesh.device)
    dataset = setup.datasets.valid or setup.datasets.train
    source = evaluation_source(dataset, base, mesh, setup.portions)
    # New reference energies were asked for where they differ: then the network's own part must be the same.
    same_references = torch.equal(base.reference_energies, setup.model.reference_energies)
    largest = 0.0
    with setup.learner.ema.applied():
        for micro_batch in source.micro_batches():
            batch = micro_batch.to(mesh.device)
            ours = setup.task.predict(batch, source.totals, training=False)
            theirs = base(batch.graph, forces=ours.forces is not None, stress=ours.stress is not None)
            largest = max(largest, _difference(ours, theirs, same_references))
    largest = reduce_max(largest, mesh)
    tolerance = 1e-9 if base.config.params_dtype is torch.float64 else 1e-4
    if not largest <= tolerance:
        raise ValueError(
            f"the model to fine-tune differs from its base {config.init_from} before the first update: predictions on "
            f"{len(dataset)} structures differ by up to {largest:.3g} of their size, allowed is {tolerance:g}"
        )
    if mesh.is_main:
        part = "" if same_references else ", reference energies aside"
        print(
            f"predictions on {len(dataset)} structures are those of {config.init_from} "
            f"(largest relative difference {largest:.1g}{part})"
        )


def _difference(ours: Prediction, theirs: Prediction, same_references: bool) -> float:
    """Largest difference of energies, forces and stress, each relative to the largest of its kind."""
    name = "energy" if same_references else "interaction_energy"
    pairs = [(getattr(ours, kind), getattr(theirs, kind)) for kind in (name, "forces", "stress")]
    largest = 0.0
    for first, second in pairs:
        if first is not None:
            first, second = first.nan_to_num(), second.nan_to_num()  # no volume, no stress
            size = max(float(second.abs().max()), 1e-12)
            largest = max(largest, float((first - second).abs().max()) / size)
    return largest


def _finish(setup: Setup, mesh: Mesh, output: Path, outcome: Outcome, precision: Precision, seconds: float) -> None:
    """Errors of the best model (of the last one without validation), and pictures."""
    name = "last" if outcome.best_step is None else "best"
    model = load_model(output / name, precision=precision).to(mesh.device)
    report: dict[str, Any] = {
        "model": name,
        "step": outcome.step if outcome.best_step is None else outcome.best_step,
        "parameters": num_parameters(model),
        "ranks": mesh.world_size,
        "seconds": seconds,
    }
    for part in ("valid", "test"):
        dataset = getattr(setup.datasets, part)
        if dataset is None:
            continue
        evaluation = evaluate_dataset(model, dataset, mesh, setup.portions)
        report[part] = evaluation.report
        if mesh.is_main:
            print(f"{part:<5} ({name} model, {len(dataset)} structures)  {metrics_line(evaluation.report)}")
            plot_parity(evaluation.points, evaluation.report, output / f"parity_{part}.png")
    if mesh.is_main:
        plot_learning_curves(output / "log.csv", output / "learning_curves.png")
        _write(output / "metrics.json", json.dumps(report, indent=1) + "\n")
        print(f"written: {output}")


def _check_output(output: Path, wandb_project: str | None) -> None:
    """Fails before the training, not at its first record or checkpoint."""
    if wandb_project is not None:
        require_wandb(wandb_project)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=output):
        pass


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
