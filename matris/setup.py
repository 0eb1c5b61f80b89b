"""From settings to the parts of a training run: data, model, optimizer, batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from janus.comm.collectives import on_main_rank
from janus.data.loader import StepLoader
from janus.data.packing import Budget, check_fits
from janus.data.sampler import GlobalBatchSampler
from janus.mesh import Mesh
from janus.optim import AdamWConfig, DecayStyle, Schedule
from janus.training.learner import Learner
from janus.training.task import EvaluationSource, TrainingSource
from matris.config import ModelConfig, Precision
from matris.data.dataset import MicroBatch, StructureDataset, graph_budget, label_totals, open_dataset
from matris.data.frames import refuse_idle_keys
from matris.data.labels import LabelKeys, StressUnit
from matris.data.records import LABEL_NAMES
from matris.elements import SYMBOLS
from matris.evaluation import Portions, collate_for, evaluation_source
from matris.exported import load_model, read_config
from matris.model import MatRIS
from matris.precision import set_precision
from matris.reference_fit import LabelStatistics, label_statistics, reference_energies
from matris.task import MatRISTask
from matris.train_config import DEFAULT_BATCH_SIZE, DataConfig, OptimConfig, TrainConfig, to_plain


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a run reads; `valid` and `test` are None where there is nothing."""

    train: StructureDataset
    valid: StructureDataset | None
    test: StructureDataset | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run on one rank, built in `build_setup`.

    Attributes:
        datasets: training, validation and test data.
        statistics: of the training labels.
        task: the model with its loss.
        learner: what updates it.
        sampler: global batch of each step.
        num_steps, steps_per_epoch: length of the run and of a pass over the training data.
        portions: how data sets are cut for evaluation; its budget is that of the micro-batches of training too.
        train, valid: batches of this rank.
    """

    datasets: Datasets
    statistics: LabelStatistics
    task: MatRISTask
    learner: Learner
    sampler: GlobalBatchSampler
    num_steps: int
    steps_per_epoch: int
    portions: Portions
    train: TrainingSource
    valid: EvaluationSource | None

    @property
    def model(self) -> MatRIS:
        return self.task.model


def build_setup(config: TrainConfig, mesh: Mesh) -> Setup:
    """Builds everything and writes nothing, except prepared data in the cache. All ranks call it.

    Raises:
        ValueError, OSError: a mistake in the settings or the data.
    """
    set_precision(config.training.precision, mesh.device)
    data = config.data
    hyper = hyper_parameters(config)
    # Rank 0 first: it prepares raw files, and tells all others if something is wrong with them.
    opened: list[Datasets] = []
    on_main_rank(lambda: opened.append(_open_datasets(config, hyper)), mesh)
    datasets = opened[0] if mesh.is_main else _open_datasets(config, hyper)
    statistics = label_statistics(datasets.train, mesh)
    model = _build_model(config, hyper, statistics, mesh).to(mesh.device)
    # Weight decay would wear off a head that nothing trains.
    model.predicts_magmoms = config.loss.magmoms_weight > 0.0
    model.readout.magmom.requires_grad_(model.predicts_magmoms)
    task = MatRISTask(model, config.loss, datasets.train.task_names)
    sampler = GlobalBatchSampler(
        len(datasets.train),
        sizes=datasets.train.sizes,
        global_batch_size=data.structures_per_update,
        global_budget=_global_budget(data, datasets.train),
        seed=config.training.seed,
    )
    steps_per_epoch = sampler.first_step(1)
    num_steps = config.training.train_iters or sampler.first_step(config.training.train_epochs or 0)
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
    portions = Portions(
        # With a global budget: about as many structures as an update has.
        batch_size=data.structures_per_update or max(DEFAULT_BATCH_SIZE, len(datasets.train) // steps_per_epoch),
        budget=graph_budget(max_atoms=data.max_atoms, max_edges=data.max_edges, max_angles=data.max_angles),
        num_workers=data.num_workers,
        partitioner=config.parallel.graph_partitioner,
    )
    for dataset in (datasets.valid, datasets.test):
        if dataset is not None:  # refuses structures that are too large, before the run begins
            evaluation_source(dataset, model, mesh, portions)

    def batches(start_step: int) -> StepLoader[MicroBatch]:
        return StepLoader(
            datasets.train,
            sampler,
            collate_for(model, datasets.train, portions.partitioner),
            start_step=start_step,
            num_steps=num_steps - start_step,
            rank=mesh.batch.rank,
            world_size=mesh.batch.size,
            budget=portions.budget,
            same_count=mesh.in_step,
            num_workers=data.num_workers,
            pin_memory=mesh.device.type == "cuda",
        )

    batches(0)  # likewise
    return Setup(
        datasets=datasets,
        statistics=statistics,
        task=task,
        learner=learner,
        sampler=sampler,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        portions=portions,
        train=TrainingSource(batches=batches, totals=lambda indices: label_totals(datasets.train, indices)),
        valid=None if datasets.valid is None else evaluation_source(datasets.valid, model, mesh, portions),
    )


def hyper_parameters(config: TrainConfig) -> ModelConfig:
    """Those of the settings, or of the base model.

    Raises:
        ValueError: the settings ask for others than the base model has, or the ranks cannot share it.
    """
    hyper = config.model if config.init_from is None else _of_base(config, config.init_from)
    tensor = config.parallel.tensor_model_parallel_size
    if hyper.hidden_size % tensor:
        raise ValueError(
            f"parallel.tensor_model_parallel_size is {tensor}, which does not divide the model's hidden_size "
            f"{hyper.hidden_size}: choose a divisor of it"
        )
    ranks, experts = config.parallel.expert_model_parallel_size, hyper.num_moe_experts
    if ranks > 1 and not experts:
        raise ValueError(
            f"parallel.expert_model_parallel_size is {ranks}, but the model has no experts: leave it out, or choose a "
            "model with experts (--preset moe-tiny, or model.num_moe_experts and its companions)"
        )
    if config.parallel.expert_placement == "fixed" and experts % ranks:
        raise ValueError(
            f"parallel.expert_model_parallel_size is {ranks}, which does not divide model.num_moe_experts ({experts}): "
            "choose a divisor of it, or parallel.expert_placement sharded"
        )
    return hyper


def _of_base(config: TrainConfig, base_model: str) -> ModelConfig:
    base = ModelConfig.from_dict(read_config(Path(base_model))["model"])
    differing = []
    for entry in fields(ModelConfig):
        asked, has = getattr(config.model, entry.name), getattr(base, entry.name)
        if asked != has and (entry.name in config.given_model or asked != entry.default):
            differing.append(f"model.{entry.name} is {to_plain(asked)}, the base has {to_plain(has)}")
    if differing:
        raise ValueError(
            f"model settings differ from those of init_from {base_model}, whose weights fit no others: "
            f"{'; '.join(differing)}. Leave --preset and all --model options out"
        )
    return base


def _open_datasets(config: TrainConfig, hyper: ModelConfig) -> Datasets:
    data, weights = config.data, config.loss
    refuse_idle_keys([*data.train, *data.valid, *data.test], _label_keys(data))

    def open_set(paths: list[str], wanted: list[str], split_key: str | None = None) -> StructureDataset | None:
        if not paths:
            return None
        return open_dataset(
            paths,
            pairwise_cutoff=hyper.pairwise_cutoff,
            three_body_cutoff=hyper.three_body_cutoff,
            keys=_label_keys(data),
            wanted=wanted,
            cache_dir=data.cache_dir,
            num_workers=data.num_workers,
            split_key=split_key,
            option_prefix="--data.",
        )

    # Stress may be missing everywhere (molecules); what has a weight otherwise must be in some structure.
    wanted = [name for name in ("energy", "forces", "magmoms") if getattr(weights, f"{name}_weight") > 0.0]
    train = open_set(data.train, wanted, data.split_key)
    assert train is not None
    # What is learned is validated: a term without labels would be zero, and the untrained model the best.
    weighted = [name for name in LABEL_NAMES if getattr(weights, f"{name}_weight") > 0.0]
    learned = [name for name in weighted if getattr(train.label_presence, name).any()]
    valid, test = open_set(data.valid, learned), open_set(data.test, [])
    for name, dataset in (("train", train), ("valid", valid), ("test", test)):
        if dataset is None:
            continue
        if not any(present.any() for present in vars(dataset.label_presence).values()):
            raise ValueError(
                f"data.{name} has no label at all: {', '.join(getattr(data, name))}. Give the keys that the files have "
                "(--data.energy_key, --data.forces_key, ...), or other files"
            )
        if dataset.task_names != train.task_names[:1]:
            found = sorted({*train.task_names, *dataset.task_names})
            raise ValueError(
                f"data.{name} brings several levels of theory together (task names {', '.join(found)}): one model for "
                "several of them is not supported yet; give training, validation and test data of a single one"
            )
    if valid is None and data.valid_fraction > 0.0:
        if round(data.valid_fraction * len(train)) >= len(train) or len(train) < 2:
            largest = math.floor(1000 * (len(train) - 1) / len(train)) / 1000
            raise ValueError(
                f"data.valid_fraction is {data.valid_fraction:g}, which leaves nothing of the {len(train)} training "
                f"structures to learn from: choose at most {largest:g}, or give data.valid"
            )
        groups = None if data.split_key is None else train.groups()
        train, valid = train.split(data.valid_fraction, config.training.seed, groups)
        if not any(getattr(valid.label_presence, name).any() for name in learned):
            raise ValueError(
                f"the {len(valid)} structures set aside by data.valid_fraction {data.valid_fraction:g} have none of "
                f"the labels that are learned ({', '.join(learned)}): choose a larger fraction, or give data.valid"
            )
    return Datasets(train=train, valid=valid, test=test)


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


def _label_keys(data: DataConfig) -> LabelKeys:
    return LabelKeys(
        energy=data.energy_key,
        forces=data.forces_key,
        stress=data.stress_key,
        virials=data.virials_key,
        magmoms=data.magmoms_key,
        stress_unit=StressUnit(data.stress_unit),
    )


def _build_model(config: TrainConfig, hyper: ModelConfig, statistics: LabelStatistics, mesh: Mesh) -> MatRIS:
    """New, or the base model, with its elements, reference energies and energy scale."""
    precision, placement = Precision(config.training.precision), config.parallel.expert_placement
    elements_of_base: tuple[int, ...] = ()
    if config.init_from is None:
        model = MatRIS(hyper, precision=precision, seed=config.training.seed, mesh=mesh, expert_placement=placement)
        model.elements = tuple(sorted(statistics.elements))
    else:
        model = load_model(config.init_from, precision=precision, mesh=mesh, expert_placement=placement)
        elements_of_base = model.elements
        model.elements = tuple(sorted(statistics.elements.union(model.elements)))
    if model.elements[-1] > hyper.num_elements:
        raise ValueError(
            f"the training data has {SYMBOLS[model.elements[-1]]} (Z = {model.elements[-1]}), but the model has "
            f"weights for Z = 1 to {hyper.num_elements}: leave such structures out, or train a model with a larger "
            "model.num_elements (at most 118)"
        )
    source = config.data.reference_energies or ("fit" if config.init_from is None else "base")
    if source == "base":
        unknown = sorted(statistics.elements.difference(elements_of_base))
        if unknown:
            raise ValueError(
                f"the training data has {', '.join(SYMBOLS[number] for number in unknown)}, for which the base model "
                f"{config.init_from} has no reference energy: give --data.reference_energies fit"
            )
    else:
        energies = reference_energies(source, statistics)
        model.set_reference_energies({number: float(energies[number - 1]) for number in model.elements})
    if config.init_from is None:
        model.energy_scale.fill_(_energy_scale(config.data.energy_scale, model, statistics))
    return model


def _energy_scale(setting: str | float, model: MatRIS, statistics: LabelStatistics) -> float:
    """eV. Without forces, or if all are zero: RMS of the energy per atom above the reference energies."""
    if not isinstance(setting, str):
        return setting
    if statistics.rms_force is not None:
        return statistics.rms_force
    residual = statistics.residual(model.reference_energies.detach().numpy())
    # Structures that are all alike have nothing above their references.
    return residual if residual > 1e-6 else 1.0


def _adamw(optim: OptimConfig) -> AdamWConfig:
    return AdamWConfig(
        weight_decay=optim.weight_decay,
        beta1=optim.adam_beta1,
        beta2=optim.adam_beta2,
        eps=optim.adam_eps,
        decay_1d=optim.decay_1d,
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
