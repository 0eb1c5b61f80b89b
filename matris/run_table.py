"""What a run is going to be, on one page."""

from __future__ import annotations

import numpy as np

from janus.data.packing import plan_micro_batches
from janus.mesh import Mesh
from matris.data.dataset import StructureDataset
from matris.reference_fit import reference_table
from matris.setup import Setup
from matris.train_config import TrainConfig

_PLANNED_STEPS = 50


def run_table(config: TrainConfig, setup: Setup, mesh: Mesh) -> str:
    """Data, model, batches, steps and reference energies; reads no structure."""
    training, optim, hyper = config.training, config.optim, setup.model.hyper
    rows = []
    for name in ("train", "valid", "test"):
        dataset = getattr(setup.datasets, name)
        rows.append((name, "none" if dataset is None else _dataset(dataset)))
    missing = [
        label
        for label in ("energy", "forces", "stress", "magmoms")
        if getattr(config.loss, f"{label}_weight") > 0.0
        and not getattr(setup.datasets.train.label_presence, label).any()
    ]
    if missing:
        rows.append(("no labels", f"{', '.join(missing)}: the weight in the loss has nothing to act on"))
    compiled = ", compiled kernels" if training.compile_kernels else ""
    ignored = [name for name in ("charge", "spin") if _differs(setup, name)]
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
        ("micro-batch", _budget(config)),
        (
            "steps",
            f"{_count(setup.num_steps)} updates = {setup.num_steps / setup.steps_per_epoch:.3g} epochs of "
            f"{_count(setup.steps_per_epoch)}; {optim.lr_decay_style} from {optim.lr:g} after "
            f"{setup.learner.schedule.warmup_steps} warm-up steps",
        ),
        ("output", training.output),
        ("references", _references(config, setup)),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    energies = setup.model.reference_energies.detach().cpu().numpy()
    return "\n".join([*lines, reference_table(energies, setup.statistics)])


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


def _differs(setup: Setup, name: str) -> bool:
    """Whether a total charge or spin is not the same in all data sets."""
    datasets = (setup.datasets.train, setup.datasets.valid, setup.datasets.test)
    stores = [store for dataset in datasets if dataset is not None for store in dataset.stores]
    return len(np.unique(np.concatenate([store.column(name) for store in stores]))) > 1


def _batch(config: TrainConfig, setup: Setup, mesh: Mesh) -> str:
    """What the global batch means for a rank, from the plans of the first steps."""
    sizes = setup.datasets.train.sizes
    pieces, imbalance, counts = [], [], []
    for step in range(min(_PLANNED_STEPS, setup.num_steps)):
        own = sizes[setup.sampler.indices(step)]
        assert setup.portions.budget is not None
        plan = plan_micro_batches(own, num_ranks=mesh.batch.size, budget=setup.portions.budget)
        counts.append(len(own))
        pieces += [len(share) for share in plan]
        loads = [sum(int(own[part].sum()) for part in share) for share in plan]
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


def _budget(config: TrainConfig) -> str:
    data = config.data
    limits = {"atoms": data.max_atoms, "edges": data.max_edges, "angles": data.max_angles}
    given = [f"at most {_count(limit)} {name}" for name, limit in limits.items() if limit is not None]
    return ", ".join(given) or "a rank's whole share at once (no budget: data.max_atoms, max_edges, max_angles)"


def _references(config: TrainConfig, setup: Setup) -> str:
    source = config.data.reference_energies or ("fit" if config.init_from is None else "base")
    residual = setup.statistics.residual(setup.model.reference_energies.detach().cpu().numpy())
    scale = float(setup.model.energy_scale)
    text = f"{source}; they leave {1000.0 * residual:.4g} meV/atom (RMS) to the network; energy scale {scale:.4g} eV"
    rank, count = setup.statistics.rank, len(setup.statistics.present)
    if source == "fit" and rank < count:
        text += f"; the compositions determine {rank} of {count} only, so single energies mean nothing"
    return text


def _count(number: int) -> str:
    """With thin groups of three digits."""
    return f"{number:,}".replace(",", " ")
