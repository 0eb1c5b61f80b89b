"""What a run is going to be, on one page."""

from __future__ import annotations

import numpy as np

from janus.data.packing import plan_micro_batches
from janus.mesh import Mesh
from janus.training.memory import allocator_in_use
from matris.data.dataset import StructureDataset
from matris.reference_fit import LabelStatistics, reference_table
from matris.setup import Setup, reference_source
from matris.train_config import TrainConfig

_PLANNED_STEPS = 50


def run_table(config: TrainConfig, setup: Setup, mesh: Mesh) -> str:
    """Data, model, batches, steps and reference energies; reads no structure."""
    training, optim, hyper = config.training, config.optim, setup.model.hyper
    rows = []
    for name in ("train", "valid", "test"):
        dataset = getattr(setup.datasets, name)
        rows.append((name, "none" if dataset is None else _dataset(dataset)))
        rows += [] if dataset is None or len(dataset.task_names) == 1 else _tasks(dataset)
    if setup.datasets.left_out:
        counts = ", ".join(f"{count} of {name}" for name, count in setup.datasets.left_out.items())
        rows.append(("left out", f"structures beyond max_force or max_stress: {counts}"))
    missing = [
        label
        for label in ("energy", "forces", "stress", "magmoms")
        if getattr(config.loss, f"{label}_weight") > 0.0
        and not getattr(setup.datasets.train.label_presence, label).any()
    ]
    if missing:
        rows.append(("no labels", f"{', '.join(missing)}: the weight in the loss has nothing to act on"))
    compiled = "" if training.kernels == "torch" else f", {training.kernels} kernels"
    compiled += {"none": "", "blocks": ", compiled blocks", "try": ", compiled blocks if that works"}[training.compile]
    if training.compile != "none":
        rows.append(
            (
                "compilation",
                "in the first step: minutes for programs that are not on disk, which a signal to stop waits for",
            )
        )
    ignored = [name for name in ("charge", "spin") if not hyper.tasks and _differs(setup, name)]
    if ignored:
        rows.append(("not used", f"{' and '.join(ignored)} of the structures differ, and this model does not see them"))
    rows += [
        (
            "model",
            f"{hyper.num_layers} layers of width {hyper.hidden_size}, cutoffs {hyper.pairwise_cutoff:g} and "
            f"{hyper.three_body_cutoff:g} A, {_count(setup.learner.weights.num_parameters)} parameters"
            + (f", from {config.init_from}" if config.init_from else ""),
        ),
        ("ranks", f"{_ranks(config, mesh)}; precision {training.precision}{compiled}"),
        ("batch", _batch(config, setup, mesh)),
        ("micro-batch", _budget(config, setup, mesh)),
        (
            "steps",
            f"{_count(setup.num_steps)} updates = {setup.num_steps / setup.steps_per_epoch:.3g} epochs of "
            f"{_count(setup.steps_per_epoch)}; {optim.lr_decay_style} from {optim.lr:g} after "
            f"{setup.learner.schedule.warmup_steps} warm-up steps; AdamW of {setup.learner.optimizer_library}",
        ),
        ("output", training.output),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    for name, statistics in setup.statistics.items():
        lines += _references(config, setup, name, statistics)
    return "\n".join(lines)


def _ranks(config: TrainConfig, mesh: Mesh) -> str:
    sizes = {axis.name: axis.size for axis in (mesh.data, mesh.shard, mesh.graph, mesh.tensor) if axis.size > 1}
    experts = f", experts over {mesh.expert.size} ({config.parallel.expert_placement})" if mesh.expert.size > 1 else ""
    text = f"{mesh.world_size} x {mesh.device.type}"
    if set(sizes) <= {"data"}:
        return f"{text}, data-parallel{experts}"
    axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
    policy = f" ({config.parallel.sharding_policy})" if mesh.shard.size > 1 else ""
    return f"{text}: {axes}{policy}{experts}"


def _dataset(dataset: StructureDataset) -> str:
    atoms, edges, angles = (_count(round(mean)) for mean in dataset.sizes.mean(axis=0))
    labels = [
        f"{name} {100.0 * present.mean():.3g} %"
        for name, present in vars(dataset.label_presence).items()
        if present.any()
    ]
    return (
        f"{_count(len(dataset))} structures; on average {atoms} atoms, {edges} edges, {angles} angles; "
        f"labels: {', '.join(labels) or 'none'}"
    )


def _tasks(dataset: StructureDataset) -> list[tuple[str, str]]:
    """A row for each level of theory."""
    return [("", f"{name}: {_dataset(part)}") for name, part in dataset.by_task().items()]


def _differs(setup: Setup, name: str) -> bool:
    """Whether a total charge or spin is not the same in all data sets."""
    datasets = (setup.datasets.train, setup.datasets.valid, setup.datasets.test)
    stated = {
        value
        for dataset in datasets
        if dataset is not None
        for columns in dataset.columns([name])
        for value in np.unique(np.nan_to_num(columns[name])).tolist()  # not stated: as neutral
    }
    return len(stated) > 1


def _batch(config: TrainConfig, setup: Setup, mesh: Mesh) -> str:
    """What the global batch means for a rank, from the plans of the first steps."""
    sizes = setup.datasets.train.sizes
    pieces, imbalance, counts = [], [], []
    for step in range(min(_PLANNED_STEPS, setup.num_steps)):
        own = sizes[setup.sampler.indices(step)]
        assert setup.portions.budget is not None
        cost = setup.cost.model.of_records(own)
        plan = plan_micro_batches(own, num_ranks=mesh.batch.size, budget=setup.portions.budget, cost=cost)
        counts.append(len(own))
        pieces += [len(share) for share in plan]
        loads = [sum(float(cost[part].sum()) for part in share) for share in plan]
        imbalance.append(max(loads) / (sum(loads) / len(loads)))
    data = config.data
    size = data.structures_per_update or float(np.mean(counts))
    limits = {"atoms": data.global_max_atoms, "edges": data.global_max_edges, "angles": data.global_max_angles}
    budget = ", ".join(f"{_count(limit)} {name}" for name, limit in limits.items() if limit is not None)
    given = (
        f"at most {budget} per update, on average {size:.3g} structures" if budget else f"{size} structures per update"
    )
    return (
        f"{given} over all ranks = {size / mesh.batch.size:.3g} per rank, in {np.mean(pieces):.3g} "
        f"micro-batches (at most {max(pieces)}); the busiest rank has {np.mean(imbalance):.3f} times the mean work"
    )


def _budget(config: TrainConfig, setup: Setup, mesh: Mesh) -> str:
    data = config.data
    limits = {"atoms": data.max_atoms, "edges": data.max_edges, "angles": data.max_angles}
    given = [f"at most {_count(limit)} {name}" for name, limit in limits.items() if limit is not None]
    assert setup.portions.budget is not None
    if (memory := setup.portions.budget.memory) is not None:
        mean = setup.datasets.train.sizes.mean(axis=0)
        atoms, edges, angles = (_count(int(n)) for n in mean * memory.available / memory.of_records(mean))
        given.append(
            f"at most {memory.available / 1e9:.3g} GB by prediction (auto), as of {atoms} atoms with {edges} edges and "
            f"{angles} angles, the average of the training data; recompute {setup.model.recompute}"
        )
        if mesh.device.type == "cpu":
            allocator = allocator_in_use()
            given.append(f"{allocator.name} counted as {allocator.overhead:g} bytes for each of tensors")
    return ", ".join(given) or "a rank's whole share at once (no budget: data.max_atoms, max_edges, max_angles)"


def _references(config: TrainConfig, setup: Setup, name: str, statistics: LabelStatistics) -> list[str]:
    """Of one level of theory: where its reference energies are from, and what they are."""
    model = setup.model
    task = name if model.hyper.tasks else None
    energies, scale = model.reference_energies.detach().cpu().numpy(), model.energy_scale
    if task is not None:
        energies, scale = energies[model.task_number(task)], scale[model.task_number(task)]
    source = reference_source(config, name)
    text = f"{source}; they leave {1000.0 * statistics.residual(energies):.4g} meV/atom (RMS) to the network; "
    text += f"energy scale {float(scale):.4g} eV"
    rank, count = statistics.rank, len(statistics.present)
    if source == "fit" and rank < count:
        text += f"; the compositions determine {rank} of {count} only, so single energies mean nothing"
    of_task = "" if task is None else f"{task}: "
    return [f"{'references':<12} {of_task}{text}", reference_table(energies, statistics)]


def _count(number: int) -> str:
    """With thin groups of three digits."""
    return f"{number:,}".replace(",", " ")
