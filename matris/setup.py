"""From settings to the parts of a training run: data, model, optimizer, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from janus.comm.collectives import on_main_rank
from janus.data.loader import StepLoader
from janus.data.packing import Budget, check_fits
from janus.data.sampler import GlobalBatchSampler
from janus.mesh import Mesh
from janus.optim import AdamWConfig, DecayStyle, Schedule
from janus.training.learner import Learner
from janus.training.task import EvaluationSource, TrainingSource
from matris.blocks.module import ExpertOptions
from matris.budget import RunBudget, memory_room
from matris.calibration import PackingCost
from matris.config import ModelConfig, Precision
from matris.data.dataset import MicroBatch, StructureDataset, graph_budget, label_totals
from matris.data.records import LABEL_NAMES
from matris.elements import SYMBOLS
from matris.evaluation import Portions, collate_for, evaluation_source
from matris.exported import load_model, read_config
from matris.model import MatRIS
from matris.precision import set_precision
from matris.reference_fit import LabelStatistics, reference_energies, statistics_by_task
from matris.run_data import Datasets, open_datasets
from matris.task import MatRISTask
from matris.train_config import (
    DEFAULT_BATCH_SIZE,
    DataConfig,
    LabelWeights,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    to_plain,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is learned, from what, in which order: all of a run but what updates the weights.

    Attributes:
        datasets: training, validation and test data.
        statistics: of the training labels of each level of theory, by its name.
        task: the model with its loss.
        sampler: global batch of each step.
    """

    datasets: Datasets
    statistics: dict[str, LabelStatistics]
    task: MatRISTask
    sampler: GlobalBatchSampler


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run on one rank, built in `build_setup`.

    Attributes:
        datasets: training, validation and test data.
        statistics: of the training labels of each level of theory, by its name.
        task: the model with its loss.
        learner: what updates it.
        sampler: global batch of each step.
        num_steps, steps_per_epoch: length of the run and of a pass over the training data.
        limits: of the micro-batches of training and evaluation.
        batch_size: structures of a global batch, about, as evaluation cuts data sets.
        config: the settings.
        cost: by which structures are divided over the ranks.
        train, valid: batches of this rank.
    """

    datasets: Datasets
    statistics: dict[str, LabelStatistics]
    task: MatRISTask
    learner: Learner
    sampler: GlobalBatchSampler
    num_steps: int
    steps_per_epoch: int
    limits: RunBudget
    batch_size: int
    config: TrainConfig
    cost: PackingCost
    train: TrainingSource
    valid: EvaluationSource | None

    @property
    def model(self) -> MatRIS:
        return self.task.model

    @property
    def portions(self) -> Portions:
        """How data sets are cut for evaluation, with the limits that hold now."""
        return _portions(self.config, self.limits, self.batch_size)


def build_subject(config: TrainConfig, mesh: Mesh) -> Subject:
    """Opens the data and makes the model; writes nothing, except prepared data in the cache. All ranks call it.

    Raises:
        ValueError, OSError: a mistake in the settings or the data.
    """
    set_precision(config.training.precision, mesh.device)
    data = config.data
    hyper = hyper_parameters(config)
    # Rank 0 first: it prepares raw files, and tells all others if something is wrong with them.
    opened: list[Datasets] = []
    on_main_rank(lambda: opened.append(open_datasets(config, hyper)), mesh)
    datasets = opened[0] if mesh.is_main else open_datasets(config, hyper)
    statistics = statistics_by_task(datasets.train, mesh)
    model = _build_model(config, hyper, statistics, mesh).to(mesh.device)
    # Weight decay would wear off a head that nothing trains.
    model.predicts_magmoms = config.loss.magmoms_weight > 0.0
    model.readout.magmom.requires_grad_(model.predicts_magmoms)
    weights = _task_weights(data, hyper, mesh.device)
    task = MatRISTask(model, config.loss, datasets.train.task_names, weights)
    sampler = _sampler(data, datasets.train, config.training.seed)
    return Subject(datasets=datasets, statistics=statistics, task=task, sampler=sampler)


def build_setup(config: TrainConfig, mesh: Mesh) -> Setup:
    """Builds everything and writes nothing, except prepared data in the cache. All ranks call it.

    Raises:
        ValueError, OSError: a mistake in the settings or the data.
    """
    subject = build_subject(config, mesh)
    data, datasets, task, sampler = config.data, subject.datasets, subject.task, subject.sampler
    model = task.model
    steps_per_epoch = sampler.first_step(1)
    num_steps = config.training.train_iters or sampler.first_step(config.training.train_epochs or 0)
    budget = graph_budget(max_atoms=data.max_atoms, max_edges=data.max_edges, max_angles=data.max_angles)
    room = None
    if data.budget == "auto":
        fixed = config.parallel.expert_placement == "fixed"
        room = memory_room(
            model,
            mesh,
            recompute=config.training.recompute,
            memory_gb=data.memory_gb,
            sizes=datasets.train.sizes,
            fixed=fixed,
        )
    limits = RunBudget(budget, room, mesh, measured=data.memory_gb is None)
    learner = Learner(
        model,
        _adamw(config.optim),
        _schedule(config.optim, num_steps),
        ema_decay=config.optim.ema_decay,
        clip_grad=config.optim.clip_grad,
        mesh=mesh,
        units=model.sharding_units(),
        experts=model.expert_sites(),
        policy=config.parallel.sharding_policy,
    )
    # With a global budget: about as many structures as an update has.
    batch_size = data.structures_per_update or max(DEFAULT_BATCH_SIZE, len(datasets.train) // steps_per_epoch)

    def evaluated(dataset: StructureDataset) -> EvaluationSource:
        return evaluation_source(dataset, model, mesh, _portions(config, limits, batch_size))

    cost = PackingCost(model.hyper, calibrated=data.cost_model == "calibrated")

    def batches(start_step: int) -> StepLoader[MicroBatch]:
        return StepLoader(
            datasets.train,
            sampler,
            collate_for(model, datasets.train, config.parallel.graph_partitioner),
            start_step=start_step,
            num_steps=num_steps - start_step,
            rank=mesh.batch.rank,
            world_size=mesh.batch.size,
            budget=limits.budget,
            cost=cost.model.of_records,
            same_count=mesh.in_step,
            num_workers=data.num_workers,
            pin_memory=mesh.device.type == "cuda",
        )

    # Refuse structures that are too large before the run begins, those of all parts of the data at once.
    checks: dict[str, Callable[[], Any]] = {"training data": partial(batches, 0)}
    for name, dataset in (("validation data", datasets.valid), ("test data", datasets.test)):
        if dataset is not None:
            checks[name] = partial(evaluated, dataset)
    _call_each(checks)

    def facts() -> dict[str, Any] | None:
        found = {"cost": cost.facts(), "budget": limits.facts()}
        return found if any(found.values()) else None

    def restore(facts: dict[str, Any] | None) -> None:
        cost.restore((facts or {}).get("cost"))
        limits.restore((facts or {}).get("budget"))

    valid = datasets.valid
    return Setup(
        datasets=datasets,
        statistics=subject.statistics,
        task=task,
        learner=learner,
        sampler=sampler,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        limits=limits,
        batch_size=batch_size,
        config=config,
        cost=cost,
        train=TrainingSource(
            batches=batches,
            totals=lambda indices: label_totals(datasets.train, indices),
            facts=facts,
            restore=restore,
        ),
        valid=None
        if valid is None
        else EvaluationSource(
            # Anew each time: a checkpoint may bring other limits.
            micro_batches=lambda: evaluated(valid).micro_batches(),
            totals=label_totals(valid),
        ),
    )


def _call_each(checks: Mapping[str, Callable[[], Any]]) -> None:
    """Calls all, and raises the ValueErrors of all of them as one."""
    faults = []
    for name, check in checks.items():
        try:
            check()
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise ValueError("\n".join(faults))


def _portions(config: TrainConfig, limits: RunBudget, batch_size: int) -> Portions:
    return Portions(
        batch_size=batch_size,
        budget=limits.budget,
        num_workers=config.data.num_workers,
        partitioner=config.parallel.graph_partitioner,
    )


def hyper_parameters(config: TrainConfig) -> ModelConfig:
    """Those of the settings, or of the base model.

    Raises:
        ValueError: the settings ask for others than the base model has, or the ranks cannot share it.
    """
    hyper = _with_tasks(config) if config.init_from is None else _of_base(config, config.init_from)
    check_ranks(hyper, config.parallel)
    return hyper


def check_ranks(hyper: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError if the ranks cannot share such a model."""
    tensor = parallel.tensor_model_parallel_size
    if hyper.hidden_size % tensor:
        raise ValueError(
            f"parallel.tensor_model_parallel_size is {tensor}, which does not divide the model's hidden_size "
            f"{hyper.hidden_size}: choose a divisor of it"
        )
    ranks, experts = parallel.expert_model_parallel_size, hyper.num_moe_experts
    if ranks > 1 and not experts:
        raise ValueError(
            f"parallel.expert_model_parallel_size is {ranks}, but the model has no experts: leave it out, or choose a "
            "model with experts (--preset moe-tiny, or model.num_moe_experts and its companions)"
        )
    if parallel.expert_placement == "fixed" and experts % ranks:
        raise ValueError(
            f"parallel.expert_model_parallel_size is {ranks}, which does not divide model.num_moe_experts ({experts}): "
            "choose a divisor of it, or parallel.expert_placement sharded"
        )


def _with_tasks(config: TrainConfig) -> ModelConfig:
    tasks = config.data.tasks
    return replace(
        config.model,
        tasks=tuple(task.name for task in tasks),
        charge_tasks=tuple(task.name for task in tasks if "charge" in task.needs),
        spin_tasks=tuple(task.name for task in tasks if "spin" in task.needs),
    )


def _of_base(config: TrainConfig, base_model: str) -> ModelConfig:
    base = ModelConfig.from_dict(read_config(Path(base_model))["model"])
    asked_tasks = [task.name for task in config.data.tasks]
    if bool(asked_tasks) != bool(base.tasks) or not set(asked_tasks) <= set(base.tasks):
        raise ValueError(
            f"data.tasks has {', '.join(asked_tasks) or 'no task'}, but the base model {base_model} knows "
            f"{', '.join(base.tasks) or 'a single level of theory without a name'}: give its names to the data, or "
            "train a new model"
        )
    for task in config.data.tasks:
        if unknown := sorted(set(task.needs).difference(base.needs(task.name))):
            raise ValueError(
                f"data.tasks[{task.name}].needs has {', '.join(unknown)}, which the base model {base_model} does not "
                "ask for, and it keeps what it asks for: leave it out, or train a new model"
            )
    differing = []
    for entry in fields(ModelConfig):
        if entry.name.endswith("tasks"):
            continue
        asked, has = getattr(config.model, entry.name), getattr(base, entry.name)
        if asked != has and (entry.name in config.given_model or asked != entry.default):
            differing.append(f"model.{entry.name} is {to_plain(asked)}, the base has {to_plain(has)}")
    if differing:
        raise ValueError(
            f"model settings differ from those of init_from {base_model}, whose weights fit no others: "
            f"{'; '.join(differing)}. Leave --preset and all --model options out"
        )
    return base


def _task_weights(data: DataConfig, hyper: ModelConfig, device: torch.device) -> torch.Tensor | None:
    """(tasks, 4) factors in the terms of the loss; None where all are one."""
    given = {task.name: task.label_weights for task in data.tasks}
    rows = [[getattr(given.get(name, LabelWeights()), label) for label in LABEL_NAMES] for name in hyper.tasks]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    return None if bool((table == 1.0).all()) else table


def _sampler(data: DataConfig, train: StructureDataset, seed: int) -> GlobalBatchSampler:
    """Global batches, of each task as much as its weight says."""
    groups = shares = None
    weights = {task.name: task.weight for task in data.tasks}
    if len(set(weights.values())) > 1 or data.task_temperature != 1.0:
        runs = train.task_runs()  # one for each task, as they are joined
        groups = [run.stop - run.start for _, run in runs]
        counts = np.array(groups)
        factors = np.array([weights[train.task_names[number]] for number, _ in runs])
        # Of the largest, for which no power is too large a number.
        shares = factors * (counts / counts.max()) ** (1.0 / data.task_temperature)
    return GlobalBatchSampler(
        len(train),
        sizes=train.sizes,
        global_batch_size=data.structures_per_update,
        global_budget=_global_budget(data, train),
        groups=groups,
        shares=shares,
        seed=seed,
    )


def _global_budget(data: DataConfig, train: StructureDataset) -> Budget | None:
    """Limits of an update; None where it has a number of structures.

    Raises:
        ValueError: structures that exceed it on their own.
    """
    if not data.has_global_budget:
        return None
    budget = Budget(
        limits=(data.global_max_atoms, data.global_max_edges, data.global_max_angles),
        names=("atoms per update", "edges per update", "angles per update"),
    )
    check_fits(train.sizes, budget, train.identifier)
    return budget


def _build_model(config: TrainConfig, hyper: ModelConfig, statistics: dict[str, LabelStatistics], mesh: Mesh) -> MatRIS:
    """New, or the base model, with its elements, reference energies and energy scale, for each task."""
    precision, parallel = Precision(config.training.precision), config.parallel
    experts = ExpertOptions(placement=parallel.expert_placement, fp16_wire=parallel.expert_fp16_wire)
    if config.init_from is None:
        model = MatRIS(hyper, precision=precision, seed=config.training.seed, mesh=mesh, experts=experts)
        model.elements, model.elements_of_task = (), dict.fromkeys(hyper.tasks, ())
    else:
        model = load_model(config.init_from, precision=precision, mesh=mesh, experts=experts)
    if config.training.recompute != "auto":
        model.set_recompute(config.training.recompute)
    if (wanted := config.training.compile) != "none":
        model.compile_blocks(or_plain=wanted == "try")
    of_base = dict(model.elements_of_task) if hyper.tasks else {"": model.elements}
    found = frozenset().union(*(entry.elements for entry in statistics.values()))
    model.elements = tuple(sorted(found.union(model.elements)))
    if model.elements[-1] > hyper.num_elements:
        raise ValueError(
            f"the training data has {SYMBOLS[model.elements[-1]]} (Z = {model.elements[-1]}), but the model has "
            f"weights for Z = 1 to {hyper.num_elements}: leave such structures out, or train a model with a larger "
            "model.num_elements (at most 118)"
        )
    for name, entry in statistics.items():
        task = name if hyper.tasks else None
        known = of_base[task or ""]
        if task is not None:
            model.elements_of_task[task] = tuple(sorted(entry.elements.union(known)))
        _set_references(model, task, reference_source(config, name), entry, known, config.init_from)
        if config.init_from is None:
            scale = model.energy_scale if task is None else model.energy_scale[model.task_number(task)]
            scale.fill_(_energy_scale(config.data.energy_scale, _reference_row(model, task), entry))
    return model


def reference_source(config: TrainConfig, name: str) -> str:
    """Where the reference energies of a level of theory are from: `fit`, `base`, ..."""
    given = {task.name: task.reference_energies for task in config.data.tasks}.get(name)
    return given or config.data.reference_energies or ("fit" if config.init_from is None else "base")


def _set_references(
    model: MatRIS,
    task: str | None,
    source: str,
    statistics: LabelStatistics,
    elements_of_base: tuple[int, ...],
    base_model: str | None,
) -> None:
    """Reference energies of a level of theory, from where `reference_energies` says."""
    if source == "base":
        unknown = sorted(statistics.elements.difference(elements_of_base))
        if unknown:
            raise ValueError(
                f"the training data has {', '.join(SYMBOLS[number] for number in unknown)}, for which the base model "
                f"{base_model} has no reference energy{'' if task is None else f' in task {task}'}: give "
                "--data.reference_energies fit"
            )
        return
    energies = reference_energies(source, statistics)
    numbers = model.elements if task is None else model.elements_of_task[task]
    model.set_reference_energies({number: float(energies[number - 1]) for number in numbers}, task)


def _reference_row(model: MatRIS, task: str | None) -> np.ndarray:
    """(num_elements,) eV."""
    table = model.reference_energies.detach().numpy()
    return table if task is None else table[model.task_number(task)]


def _energy_scale(setting: str | float, references: np.ndarray, statistics: LabelStatistics) -> float:
    """eV. Without forces, or if all are zero: RMS of the energy per atom above the reference energies."""
    if not isinstance(setting, str):
        return setting
    if statistics.rms_force is not None:
        return statistics.rms_force
    residual = statistics.residual(references)
    # Structures that are all alike have nothing above their references.
    return residual if residual > 1e-6 else 1.0


def _adamw(optim: OptimConfig) -> AdamWConfig:
    return AdamWConfig(
        weight_decay=optim.weight_decay,
        beta1=optim.adam_beta1,
        beta2=optim.adam_beta2,
        eps=optim.adam_eps,
        decay_1d=optim.decay_1d,
        backend=optim.backend,
    )


def _schedule(optim: OptimConfig, num_steps: int) -> Schedule:
    return Schedule(
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_steps=num_steps // 20 if optim.lr_warmup_iters is None else optim.lr_warmup_iters,
        decay_steps=optim.lr_wsd_decay_iters,
        num_steps=num_steps,
        style=DecayStyle(optim.lr_decay_style),
    )
