"""`data.tasks` in YAML files and on the command line, and what is refused of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from matris.cli.train import parse
from matris.train_config import DataConfig, LabelWeights, TaskConfig, to_plain

TASKS: list[dict[str, Any]] = [
    {
        "name": "pbe",
        "train": ["a.xyz", "b.h5"],
        "valid": ["c.xyz"],
        "weight": 2,
        "label_weights": {"stress": 0.0, "energy": 3.5},
        "max_force": 30,
        "stress_unit": "GPa",
        "reference_energies": "energies.json",
    },
    {"name": "wb97m", "train": ["d.xyz"], "test": ["e.xyz"], "needs": ["charge", "spin"], "energy_key": "e_tot"},
]
PARSED = [
    TaskConfig(
        name="pbe",
        train=["a.xyz", "b.h5"],
        valid=["c.xyz"],
        weight=2.0,
        label_weights=LabelWeights(stress=0.0, energy=3.5),
        max_force=30.0,
        stress_unit="GPa",
        reference_energies="energies.json",
    ),
    TaskConfig(name="wb97m", train=["d.xyz"], test=["e.xyz"], needs=["charge", "spin"], energy_key="e_tot"),
]
LENGTH = ["--training.train_iters", "5"]


def with_tasks(*tasks: dict[str, Any]) -> list[str]:
    return [f"--data.tasks={json.dumps(tasks)}", *LENGTH]


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"data": {"tasks": TASKS, "task_temperature": 2}}))
    of_file = parse(["--config", str(path), *LENGTH])
    assert of_file.data.tasks == PARSED
    assert of_file.data.task_temperature == 2.0
    assert parse([*with_tasks(*TASKS), "--data.task_temperature", "2"]) == of_file
    assert parse(["--data.tasks", json.dumps(TASKS), *LENGTH]).data.tasks == PARSED
    # An option after the file replaces its tasks.
    others = [{"name": name, "train": [f"{name}.xyz"]} for name in ("scan", "b3lyp")]
    only = parse(["--config", str(path), *with_tasks(*others)])
    assert [task.name for task in only.data.tasks] == ["scan", "b3lyp"]


def test_what_a_run_saves_is_read_again(tmp_path: Path) -> None:
    config = parse([*with_tasks(*TASKS), "--preset", "s", "--data.task_temperature", "3"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(config)))
    assert parse(["--config", str(path)]) == config


def test_plain_values_name_no_tasks_of_a_model_without() -> None:
    assert not any("task" in name for name in to_plain(parse(["--data.train", "a.xyz", *LENGTH]))["model"])


SECOND = {"name": "b", "train": ["b.xyz"]}


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([{"name": "a", "train": ["x"]}, {"name": "a", "train": ["y"]}], "", "names a, a: each task needs one of its"),
        ([{"name": "", "train": ["x"]}], "", "entry without a name"),
        ([{"train": ["x"]}], "", "name"),
        ([{"name": "a"}], "", "train"),
        ([{"name": "a", "train": []}], "", "data.tasks[a].train is empty"),
        ([{"name": "a", "train": ["x"], "weight": 0}], "", "data.tasks[a].weight is 0.0: it must be positive"),
        ([{"name": "a", "train": ["x"], "weight": -1}], "", "data.tasks[a].weight is -1.0"),
        ([{"name": "a", "train": ["x"], "max_force": 0}], "", "data.tasks[a].max_force is 0.0: it must be positive"),
        ([{"name": "a", "train": ["x"], "max_stress": -2}], "", "data.tasks[a].max_stress is -2.0"),
        ([{"name": "a", "train": ["x"], "label_weights": {"forces": -1}}], "", "label_weights.forces is -1.0"),
        ([{"name": "a", "train": ["x"], "label_weights": {"virial": 1}}], "", "virial"),
        (
            [{"name": "a", "train": ["x"], "label_weights": dict.fromkeys(LabelWeights.__dataclass_fields__, 0)}],
            "",
            "label_weights are all 0",
        ),
        ([{"name": "a", "train": ["x"], "needs": ["dipole"]}], "", "dipole"),
        ([{"name": "a", "train": ["x"], "files": ["y"]}], "", "files"),
        ([{"name": "a", "train": ["x"], "stress_unit": "bar"}], "", "stress_unit"),
        ([{"name": "a", "train": ["x"], "reference_energies": "mp"}], "", "data.tasks[a].reference_energies is 'mp'"),
        ([{"name": "a", "train": ["x"], "reference_energies": "base"}], "", "there is no base model"),
        ([{"name": "a", "train": ["x", "x"]}], "", "a file has one level of theory, once"),
        ([{"name": "a", "train": ["x"], "weight": 2.0}], "", "there is no other task"),
        ([{"name": "a", "train": ["x"], "test": ["./x"]}], "", "a].train and in data.tasks[a].test"),
        ([{"name": "a", "train": ["b.xyz"]}, SECOND], "", "b.xyz is in data.tasks[a].train and in data.tasks[b].train"),
        ([SECOND], "--data.train c.xyz", "data.tasks is given beside data.train"),
        ([SECOND], "--data.valid c.xyz", "data.tasks is given beside data.train"),
        ([SECOND], "--data.test c.xyz", "data.tasks is given beside data.train"),
        ([SECOND], "--data.task_temperature 0", "data.task_temperature is 0.0: it must be positive"),
        ([SECOND | {"valid": ["v"]}], "--data.valid_fraction 0.2", "every task names files for valid"),
        ([SECOND | {"valid": ["v"]}], "--data.split_key run", "nothing is split"),
        ([SECOND], "--model.tasks [b]", "model.tasks"),
    ],
)
def test_wrong_tasks_are_refused_in_one_line(tasks: list[dict[str, Any]], options: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        parse([*with_tasks(*tasks), *options.split()])
    assert "\n" not in str(raised.value)


def test_validation_data_of_some_tasks() -> None:
    """The others set a part aside, of which the fraction speaks."""
    config = parse([*with_tasks({"name": "a", "train": ["a"], "valid": ["v"]}, SECOND), "--data.valid_fraction", "0.3"])
    assert config.data.valid_fraction == 0.3


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        TaskConfig(name="a", train=["x"], weight=value)
    with pytest.raises(ValueError, match="must be a finite number"):
        LabelWeights(forces=value)


def test_a_temperature_needs_tasks() -> None:
    with pytest.raises(ValueError, match=r"task_temperature is 2.0, but there are no data.tasks"):
        DataConfig(train=["a.xyz"], task_temperature=2.0)


def test_tasks_of_the_model_follow_from_the_data(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"data": {"tasks": TASKS}, "model": {"tasks": ["pbe", "wb97m"]}}))
    with pytest.raises(ValueError, match="tasks"):
        parse(["--config", str(path), *LENGTH])
