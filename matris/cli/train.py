"""`janus-matris train`: train or fine-tune a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from matris.config import TASK_FIELDS, LossConfig, ModelConfig
from matris.presets import PRESETS
from matris.train_config import (
    DataConfig,
    LabelWeights,
    OptimConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
    TrainingConfig,
)

_GROUPS = {
    "data": DataConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "parallel": ParallelConfig,
}
_RENAMED = {"compile_kernels": "write training.kernels, compiled for true and torch for false"}
"""Options of `training` that earlier versions had, and may stand in the config.yaml of a run."""

_LISTS = ("--data.train", "--data.valid", "--data.test")

_DESCRIPTION = """Train or fine-tune a MatRIS model. Start it with python for one process, or with torchrun, srun or
mpirun for several; the result is the same. A run that was stopped or killed goes on when the same
command is given again. Exit status 0 when done, 143 when SIGTERM or SIGUSR1 stopped the run after a checkpoint.
Units: eV, Angstrom, eV/A, stress eV/A^3 (tensile positive), Bohr magneton."""


def main(arguments: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake."""
    try:
        config = parse(arguments)
    except ValueError:
        # All ranks have the same command line.
        if _is_main():
            raise
        return 2

    from janus.comm.collectives import ElsewhereError
    from janus.training.step import NonFiniteError
    from matris.run import run_training

    try:
        return run_training(config)
    except (ElsewhereError, NonFiniteError):
        if _is_main():
            raise
        return 2  # rank 0 says why


def _is_main() -> bool:
    from janus.mesh import read_launch

    return read_launch().rank == 0


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Settings from defaults, then a preset, then YAML files and options in the order given.

    Raises:
        ValueError: unknown names, values of the wrong type or out of range.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(_join_lists(arguments))
        given = tuple(vars(parser.parse_args(_join_lists(arguments), defaults=False).get("model", Namespace())))
        if options.preset is not None:
            given = tuple(entry.name for entry in fields(ModelConfig) if entry.name not in TASK_FIELDS)
            hyper = PRESETS[options.preset]
            parser.set_defaults({f"model.{name}": getattr(hyper, name) for name in given})
            options = parser.parse_args(_join_lists(arguments))
    except ArgumentError as error:
        text = " ".join(str(error).split())
        for name, instead in _RENAMED.items():
            if name in text:
                raise ValueError(f"training.{name} is no option any more: {instead}") from None
        raise ValueError(f"{text} (janus-matris train --help lists all options)") from None
    options.data.tasks = [
        TaskConfig(**{**vars(task), "label_weights": LabelWeights(**vars(task.label_weights))})
        for task in options.data.tasks
    ]
    groups: dict[str, Any] = {name: group(**vars(options[name])) for name, group in _GROUPS.items()}
    return TrainConfig(**groups, init_from=options.init_from, dry_run=options.dry_run, given_model=given)


def build_parser() -> ArgumentParser:
    """Options of the verb: `--config FILE.yaml` and one option per field of each group."""
    parser = ArgumentParser(prog="janus-matris train", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings, such as a run's config.yaml")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a published model size, to start from")
    parser.add_argument(
        "--init_from",
        type=str,
        metavar="DIR",
        help="model directory to fine-tune; its predictions are verified before the first update",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="build everything, print what the run would be, write no run"
    )
    for name, group in _GROUPS.items():
        parser.add_class_arguments(group, name, skip=set(TASK_FIELDS) if group is ModelConfig else None)
    return parser


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """`--data.train a.xyz b.xyz` as the list that the parser reads: `--data.train=["a.xyz", "b.xyz"]`."""
    joined: list[str] = []
    values: list[str] | None = None
    name = ""

    def close() -> None:
        if values is not None:
            # A value that is a list already stays one.
            is_list = len(values) == 1 and values[0].startswith("[")
            joined.append(f"{name}={values[0] if is_list else json.dumps(values)}")

    for word in arguments:
        option, equals, value = word.partition("=")
        if word.startswith("--"):
            close()
            values = None
            if option in _LISTS:
                name, values = option, [value] if equals else []
            else:
                joined.append(word)
        elif values is not None:
            values.append(word)
        else:
            joined.append(word)
    close()
    return joined
