"""A training run from its settings to its errors and pictures."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import janus
from janus.checkpoint import CheckpointError, verify_directory
from janus.comm.collectives import on_main_rank, reduce_max
from janus.data.shared_rows import blocks
from janus.file_errors import naming
from janus.mesh import Axis, Mesh, open_mesh
from janus.ops.fused import use_kernels
from janus.telemetry import find_peak, require_wandb
from janus.telemetry.peak import Format
from janus.training.memory import keep_freed_memory
from janus.training.occupancy import occupied
from janus.training.trainer import Outcome, Trainer, TrainerConfig
from matris.calibration import calibrate
from matris.config import TASK_FIELDS, Precision
from matris.evaluation import collate_for, evaluate_dataset, evaluation_source
from matris.exported import check_model, load_model, num_parameters
from matris.metrics import metrics_line
from matris.model import Prediction
from matris.run_table import run_table
from matris.setup import Setup, build_setup, reference_source
from matris.train_config import TrainConfig, to_plain
from matris.writable import check_writable

STOPPED = 143
"""Exit status of a run that a signal ended after its checkpoint was written (128 + SIGTERM, also for SIGUSR1)."""

_ALLOWED = {"fp64": 1e-9, "fp32": 1e-5, "tf32": 1e-3, "bf16-mixed": 1e-2}
"""Differences that rounding and the order of sums may make between two copies of a model, by precision."""
_PRODUCTS: dict[str, Format] = {"fp64": "fp64", "fp32": "fp32", "tf32": "tf32", "bf16-mixed": "bf16"}
"""Formats of the matrix products, by precision."""
_FLOORS = {"energy": 1.0, "forces": 1e-2, "stress": 1e-3, "magmoms": 1e-2}
"""eV/A, eV/A^3, muB: smaller values count as this large, for differences of zeros are rounding."""


def run_training(config: TrainConfig) -> int:
    """Trains as the settings say, or with `dry_run` only shows what that would be. All ranks of a launch call it.

    Returns:
        Exit status: 0, or `STOPPED`.

    Raises:
        ValueError, OSError: a mistake in the settings, the data or the output directory.
    """
    parallel = config.parallel
    parallel.refuse_idle()
    keep_freed_memory()
    with open_mesh(
        config.training.device,
        shard=parallel.fully_sharded_size,
        graph=parallel.context_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        timeout_minutes=parallel.distributed_timeout_minutes,
    ) as mesh:
        use_kernels(config.training.kernels, mesh.device)
        output = Path(config.training.output)
        if not config.dry_run:
            on_main_rank(lambda: _check_output(output, config.training.wandb_project), mesh)
        setup = build_setup(config, mesh)
        if mesh.is_main:
            print(run_table(config, setup, mesh), flush=True)
        if config.dry_run:
            return 0
        start = time.monotonic()
        with naming(output), occupied(output, mesh):
            outcome = _train(config, setup, mesh, output)
            if outcome.stopped:
                return STOPPED
            _finish(setup, mesh, output, outcome, Precision(config.training.precision), time.monotonic() - start)
        return 0


def _train(config: TrainConfig, setup: Setup, mesh: Mesh, output: Path) -> Outcome:
    """The trainer with the settings of this run."""
    training = config.training
    hyper = setup.model.hyper.to_dict()
    settings = {**to_plain(config), "model": {name: hyper[name] for name in hyper if name not in TASK_FIELDS}}
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
            keep_every=training.keep_every,
            async_save=training.async_save,
            resume=training.resume,
            wandb_project=training.wandb_project,
        ),
        mesh=mesh,
        directory=output,
        # How a run continues is no property of the run.
        settings={
            **settings,
            "model": hyper,  # with its tasks: rows of its tables are in their order
            "records": _records(setup),
            "training": {key: settings["training"][key] for key in settings["training"] if key != "resume"},
        },
        provenance={"janus_matris": janus.__version__, "torch": torch.__version__, "settings": settings},
        peak=find_peak(mesh.device, _PRODUCTS[training.precision], given_tflops=training.peak_tflops),
    )
    trainer.resume()
    if setup.limits.is_restored and mesh.is_main:
        assert setup.limits.budget.memory is not None
        gigabytes = setup.limits.budget.memory.available / 1e9
        print(f"micro-batch  at most {gigabytes:.3g} GB by prediction, as at the start of this run", flush=True)
    if setup.cost.wants_times and setup.learner.step < setup.num_steps:
        _calibrate(setup, mesh)
    if config.init_from is not None and setup.learner.step == 0:
        _verify_base(config, setup, mesh)
    # Only now: settings that are refused, or train nothing, must not replace those of a run that is there.
    finished = setup.learner.step >= setup.num_steps and trainer.restored is not None
    text = None if finished else yaml.safe_dump(settings, sort_keys=False)
    on_main_rank(lambda: _open_output(output, text), mesh)
    _restore_best(trainer, mesh, output / "best")
    return trainer.run()


def _calibrate(setup: Setup, mesh: Mesh) -> None:
    train, portions = setup.datasets.train, setup.portions
    assert portions.budget is not None
    text = calibrate(
        setup.cost,
        setup.task,
        setup.learner,
        train,
        setup.sampler.indices(setup.learner.step),
        collate=collate_for(setup.model, train, portions.partitioner),
        budget=portions.budget,
        mesh=mesh,
    )
    if mesh.is_main:
        print(f"{'cost model':<12} {text}", flush=True)


def _restore_best(trainer: Trainer, mesh: Mesh, directory: Path) -> None:
    """Makes the best model of a resumed run again from the checkpoint of its step, where it is lost or damaged. Without
    that checkpoint the trainer looks for the best anew. All ranks call it."""
    step, learner = trainer.best_step, trainer.learner
    if step is None or trainer.restored is None:
        return
    source = trainer.store.path(step)
    if not on_main_rank(lambda: _lacks_best(directory, source, step), mesh):
        return
    found = trainer.store.open(source)
    trainer.store.together(lambda: learner.restore(found))
    with learner.averaged():
        state = learner.state()  # all ranks have a part of it
        on_main_rank(lambda: trainer.task.export(directory, state, {**trainer.provenance, "step": step}), mesh)
    learner.restore(trainer.restored)


def _lacks_best(directory: Path, source: Path, step: int) -> bool:
    """Whether the best model has to be, and can be, made again from `source`; a damaged one is moved out of the way."""
    fault = f"{directory} of step {step} is gone"
    if directory.exists():
        try:
            check_model(directory)
        except ValueError as error:
            aside = directory.with_name(f"{directory.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            fault = f"{error}: moved to {aside}"
        else:
            return False
    try:
        verify_directory(source)
    except CheckpointError as error:
        print(f"{fault}; it cannot be made again: {error}", flush=True)
        return False
    print(f"{fault}; made again from {source}", flush=True)
    return True


def _records(setup: Setup) -> dict[str, str]:
    """What stands for the content of each data set when a run is resumed."""
    labels = sum(int(entry.digest, 16) for entry in setup.statistics.values()) % 2**64
    records = {"train": f"{len(setup.datasets.train)} structures, digest {labels:016x}"}
    for name, dataset in (("valid", setup.datasets.valid), ("test", setup.datasets.test)):
        if dataset is not None:
            digest = hashlib.sha256()
            for values in (dataset.sizes, *vars(dataset.label_presence).values()):
                for block in blocks(len(dataset)):
                    digest.update(np.ascontiguousarray(values[block]).tobytes())
            records[name] = f"{len(dataset)} structures, digest {digest.hexdigest()[:16]}"
    return records


def _verify_base(config: TrainConfig, setup: Setup, mesh: Mesh) -> None:
    """Compares what is about to be trained with the base model, read anew, on the validation set.

    Raises:
        ValueError: a prediction differs by more than rounding.
    """
    precision = Precision(config.training.precision)
    base = load_model(str(config.init_from), precision=precision, mesh=_with_all_experts(mesh)).to(mesh.device)
    same_references = torch.equal(base.reference_energies, setup.model.reference_energies)
    keeps_references = all(reference_source(config, name) == "base" for name in setup.statistics)
    if keeps_references and not same_references:
        raise ValueError(
            f"the reference energies of the model to fine-tune are not those of its base {config.init_from}"
        )
    dataset = setup.datasets.valid or setup.datasets.train
    source = evaluation_source(dataset, base, mesh, setup.portions)
    largest = dict.fromkeys(_FLOORS, 0.0)
    with setup.learner.averaged():
        for micro_batch in source.micro_batches():
            batch = micro_batch.to(mesh.device)
            found = _differences(setup.model(batch.graph), base(batch.graph), batch.graph.atoms_per_structure)
            largest = {name: float(np.maximum(largest[name], found.get(name, 0.0))) for name in largest}
    largest = {name: reduce_max(value, mesh) for name, value in largest.items()}
    allowed = _ALLOWED[config.training.precision]
    if not all(value <= allowed for value in largest.values()):
        differences = ", ".join(f"{name} {value:.3g}" for name, value in largest.items())
        raise ValueError(
            f"the model to fine-tune differs from its base {config.init_from} before the first update: on "
            f"{len(dataset)} structures the largest differences (energy in eV/atom, the others relative) are "
            f"{differences}; allowed is {allowed:g}"
        )
    if mesh.is_main:
        part = "" if keeps_references else ", reference energies aside"
        print(
            f"predictions on {len(dataset)} structures are those of {config.init_from} (largest differences: "
            f"energy {largest['energy']:.1g} eV/atom, forces {largest['forces']:.1g} of their size{part})"
        )


def _differences(ours: Prediction, theirs: Prediction, num_atoms: Tensor) -> dict[str, float]:
    """Largest difference of the interaction energy in eV/atom, and of all else relative to its largest value."""
    energy = (ours.interaction_energy - theirs.interaction_energy) / num_atoms
    found = {"energy": _largest(energy)}
    for name in ("forces", "stress", "magmoms"):
        first, second = getattr(ours, name), getattr(theirs, name)
        if first is None or second is None:
            continue
        known = ~torch.isnan(second) if name == "stress" else torch.ones_like(second, dtype=torch.bool)  # no volume
        found[name] = _largest((first - second)[known]) / max(_largest(second[known]), _FLOORS[name])
    return found


def _largest(values: Tensor) -> float:
    """Largest magnitude; 0 without elements, NaN if any is."""
    return float(values.abs().max()) if values.numel() else 0.0


def _finish(setup: Setup, mesh: Mesh, output: Path, outcome: Outcome, precision: Precision, seconds: float) -> None:
    """Errors of the best model (of the last one without validation), and pictures."""
    if mesh.is_main:  # matplotlib takes as long to load as a short training
        from matris.plots import plot_learning_curves, plot_parity

    name = "last" if outcome.best_step is None else "best"
    model = load_model(output / name, precision=precision, mesh=_with_all_experts(mesh)).to(mesh.device)
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
            if setup.model.hyper.tasks:
                for task, errors in evaluation.report["tasks"].items():
                    print(f"      {task}: {metrics_line(errors)}")
            plot_parity(evaluation.points, evaluation.report, output / f"parity_{part}.png")
    if mesh.is_main:
        plot_learning_curves(output / "log.csv", output / "learning_curves.png")
        _write(output / "metrics.json", json.dumps(report, indent=1) + "\n")
        print(f"written: {output}")


def _with_all_experts(mesh: Mesh) -> Mesh:
    """For a model that is not trained, and so has all of its experts on each rank."""
    return replace(mesh, expert=Axis(name="expert"))


def _check_output(output: Path, wandb_project: str | None) -> None:
    """Fails before the training, not at its first record or checkpoint."""
    if wandb_project is not None:
        require_wandb(wandb_project)
    check_writable(output)


def _open_output(output: Path, settings: str | None) -> None:
    """Makes the run directory, with the settings if any; removes what a kill in the middle of an export left in it."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("best", "last"):
        for stale in output.glob(f".{name}.*"):
            if (stale / name).is_dir() and not (output / name).exists():  # moved aside, and nothing in its place yet
                (stale / name).rename(output / name)
            shutil.rmtree(stale)
    if settings is not None:
        _write(output / "config.yaml", settings)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
