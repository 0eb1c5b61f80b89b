"""What a run reads: data sets of its levels of theory, filtered, split and joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from matris.blocks.embedding import check_charge_and_spin
from matris.config import ModelConfig
from matris.data.dataset import StructureDataset, open_dataset
from matris.data.frames import refuse_idle_keys
from matris.data.labels import LabelKeys, StressUnit
from matris.data.records import LABEL_NAMES
from matris.train_config import DataConfig, TaskConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What a run reads; `valid` and `test` are None where there is nothing.

    Attributes:
        left_out: for each set of files that has any, how many structures exceed the limits of its task.
    """

    train: StructureDataset
    valid: StructureDataset | None
    test: StructureDataset | None
    left_out: dict[str, int] = field(default_factory=dict)


def open_datasets(config: TrainConfig, hyper: ModelConfig) -> Datasets:
    """All of a run, with the tasks of the model in the order of its tables."""
    data = config.data
    if not data.tasks:
        return _open_task(config, hyper, TaskConfig(name="default", train=data.train, valid=data.valid, test=data.test))
    # Keys of all tasks must act on some files, those of one on its own.
    refuse_idle_keys([path for task in data.tasks for path in _files(task)], _label_keys(data))
    found = {task.name: _open_task(config, hyper, task) for task in data.tasks}

    def joined(split: str) -> StructureDataset | None:
        parts = [(name, part) for name, sets in found.items() if (part := getattr(sets, split)) is not None]
        return StructureDataset.joined(parts, hyper.tasks) if parts else None

    train = joined("train")
    assert train is not None
    for name in ("energy", "forces", "magmoms"):
        weight = getattr(config.loss, f"{name}_weight")
        if weight > 0.0 and not getattr(train.label_presence, name).any():
            raise ValueError(
                f"loss.{name}_weight is {weight:g}, but no structure of data.tasks has the label {name}: set it to 0, "
                "or give the key that the files have"
            )
    left_out = {name: count for sets in found.values() for name, count in sets.left_out.items()}
    return Datasets(train=train, valid=joined("valid"), test=joined("test"), left_out=left_out)


def _open_task(config: TrainConfig, hyper: ModelConfig, task: TaskConfig) -> Datasets:
    """The data sets of one level of theory, filtered and split."""
    data, weights = config.data, config.loss
    where = f"data.tasks[{task.name}]" if data.tasks else "data"
    keys = _label_keys(task, data)
    refuse_idle_keys(_files(task), _label_keys(task if data.tasks else data))
    left_out: dict[str, int] = {}

    def open_set(split: str, wanted: list[str], split_key: str | None = None) -> StructureDataset | None:
        paths = getattr(task, split)
        if not paths:
            return None
        dataset = open_dataset(
            paths,
            pairwise_cutoff=hyper.pairwise_cutoff,
            three_body_cutoff=hyper.three_body_cutoff,
            keys=keys,
            wanted=wanted,
            cache_dir=data.cache_dir,
            num_workers=data.num_workers,
            split_key=split_key,
            option_prefix=f"{where}." if data.tasks else "--data.",
        )
        kept = dataset.within(max_force=task.max_force, max_stress=task.max_stress)
        if not len(kept):
            raise ValueError(
                f"{where}.{split}: none of {len(dataset)} structures is within max_force {task.max_force} eV/A and "
                f"max_stress {task.max_stress} eV/A^3: raise the limits"
            )
        if len(kept) < len(dataset):
            left_out[f"{task.name}.{split}"] = len(dataset) - len(kept)
        if not any(present.any() for present in vars(kept.label_presence).values()):
            raise ValueError(
                f"{where}.{split} has no label at all: {', '.join(paths)}. Give the keys that the files have "
                "(--data.energy_key, --data.forces_key, ...), or other files"
            )
        if data.tasks:
            check_stated(kept, hyper.needs(task.name), f"{where}.{split}")
        return kept

    # Stress may be missing everywhere (molecules); what has a weight otherwise must be in some structure.
    names = () if data.tasks else ("energy", "forces", "magmoms")
    wanted = [name for name in names if getattr(weights, f"{name}_weight") > 0.0]
    train = open_set("train", wanted, None if task.valid else data.split_key)
    assert train is not None
    # What is learned is validated: a term without labels would be zero, and the untrained model the best.
    weighted = [name for name in LABEL_NAMES if getattr(weights, f"{name}_weight") > 0.0]
    learned = [name for name in weighted if getattr(train.label_presence, name).any()]
    valid, test = open_set("valid", learned), open_set("test", [])
    for name, dataset in (("train", train), ("valid", valid), ("test", test)):
        if dataset is None:
            continue
        named = {*dataset.task_names} - ({"default", task.name} if data.tasks else {*train.task_names[:1]})
        if data.tasks and len(named) == 1 and len(dataset.task_names) == 1:
            raise ValueError(
                f"{where}.{name} was prepared as the level of theory {dataset.task_names[0]}, not {task.name}: give "
                "the task that name, or prepare the files again without --task"
            )
        if named:
            raise ValueError(
                f"{where}.{name} brings several levels of theory together (task names "
                f"{', '.join(sorted({*dataset.task_names, *train.task_names}))}): give each a task of its own in "
                "data.tasks, with its files"
            )
    if valid is None and data.valid_fraction > 0.0:
        if round(data.valid_fraction * len(train)) >= len(train) or len(train) < 2:
            largest = math.floor(1000 * (len(train) - 1) / len(train)) / 1000
            raise ValueError(
                f"data.valid_fraction is {data.valid_fraction:g}, which leaves nothing of the {len(train)} training "
                f"structures to learn from: choose at most {largest:g}, or give {where}.valid"
            )
        train, valid = train.split(data.valid_fraction, config.training.seed, by_group=data.split_key is not None)
        if not any(getattr(valid.label_presence, name).any() for name in learned):
            raise ValueError(
                f"the {len(valid)} structures set aside by data.valid_fraction {data.valid_fraction:g} have none of "
                f"the labels that are learned ({', '.join(learned)}): choose a larger fraction, or give {where}.valid"
            )
    return Datasets(train=train, valid=valid, test=test, left_out=left_out)


def of_task(dataset: StructureDataset, hyper: ModelConfig, task: str) -> StructureDataset:
    """The data set as one of a level of theory that a model has learned; stores need not name one.

    Raises:
        ValueError: stores that name another; structures that lack a charge or a spin that the task needs, or with such
            that the model does not know.
    """
    if other := sorted(set(dataset.task_names) - {"default", task}):
        raise ValueError(
            f"the data of task {task} were prepared as the level of theory {', '.join(other)}: choose that task, or "
            "prepare the files again without --task"
        )
    check_stated(dataset, hyper.needs(task), f"the data of task {task}")
    return StructureDataset.joined([(task, dataset)], hyper.tasks)


def check_stated(dataset: StructureDataset, needs: Sequence[str], where: str) -> None:
    """Refuses structures whose charge or spin the model does not know, or that are needed and not there.

    Args:
        needs: `charge`, `spin`.
        where: names the data in messages.
    """
    first: dict[str, int] = {}  # that lacks it
    counts = dict.fromkeys(needs, 0)
    stated: set[tuple[float, float]] = set()
    before = 0
    for columns in dataset.columns(["charge", "spin"]):
        lacks = {"charge": np.isnan(columns["charge"]), "spin": columns["spin"] == 0.0}
        for name in needs:
            if lacks[name].any():
                counts[name] += int(lacks[name].sum())
                first.setdefault(name, before + int(lacks[name].argmax()))
        charges = np.where(lacks["charge"], 0.0, columns["charge"])
        stated.update(zip(charges.tolist(), columns["spin"].tolist(), strict=True))
        before += len(charges)
    for name, record in first.items():
        raise ValueError(
            f"{where}: {counts[name]} of {len(dataset)} structures do not state their {name}, such as "
            f"{dataset.identifier(record)}, but the task needs it: add the info entry {name!r}, or leave {name} out of "
            "its needs"
        )
    for charge, spin in sorted(stated):
        try:
            check_charge_and_spin(charge, spin)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _files(task: TaskConfig) -> list[str]:
    return [*task.train, *task.valid, *task.test]


def _label_keys(*sources: TaskConfig | DataConfig) -> LabelKeys:
    """Each from the first source that gives it."""

    def given(name: str) -> Any:
        return next((value for source in sources if (value := getattr(source, name)) is not None), None)

    return LabelKeys(
        energy=given("energy_key"),
        forces=given("forces_key"),
        stress=given("stress_key"),
        virials=given("virials_key"),
        magmoms=given("magmoms_key"),
        stress_unit=StressUnit(given("stress_unit") or DataConfig.stress_unit),
    )
