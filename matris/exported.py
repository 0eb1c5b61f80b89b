"""Model directories: `model.safetensors` with the weights and `config.json` with everything needed to use them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from janus.mesh import Mesh
from janus.sharding import part_of, split_of
from matris.blocks.module import ExpertOptions
from matris.blocks.moe import state_of_elements
from matris.config import ModelConfig, Precision
from matris.elements import SYMBOLS, number_of
from matris.model import MatRIS

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_UNITS = {"energy": "eV", "length": "Angstrom", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3", "magmoms": "muB"}
_CONFIG_SHA256 = "config_sha256"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "parameter_dtype": str,
    "elements": list,
    "reference_energies": dict,
    "energy_scale": (float, dict),
    "predicts_magmoms": bool,
    "sha256": str,
    "provenance": dict,
}
"""Entries of `config.json` that are relied upon. With tasks `reference_energies` and `energy_scale` hold what they do
without, for each task by name, and `task_elements` the elements."""


def save_model(
    model: MatRIS,
    directory: Path,
    *,
    provenance: dict[str, Any],
    overwrite: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory; it appears whole or not at all.

    Args:
        directory: to create; its parent is created too.
        provenance: JSON-ready facts of where the weights come from.
        overwrite: replace an existing model directory.
        state: the whole state dict, of a model that several ranks share; None for that of `model`.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is False.
        OSError: not writable.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise FileExistsError(f"{directory} exists: choose another output, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        state = model.state_dict() if state is None else state
        save_file({name: value.contiguous() for name, value in state.items()}, staging / WEIGHTS)
        buffers = {name for name, _ in model.named_buffers()}
        config = {
            "format": "janus-matris model",
            "format_version": FORMAT_VERSION,
            "model": model.hyper.to_dict(),
            "parameters": sum(value.numel() for name, value in state.items() if name not in buffers),
            "parameter_dtype": str(model.config.params_dtype).removeprefix("torch."),
            "units": _UNITS,
            "elements": _symbols(model.elements),
            **_energies(model),
            "predicts_magmoms": model.predicts_magmoms,
            "sha256": sha256_of(staging / WEIGHTS),
            "provenance": provenance,
        }
        config[_CONFIG_SHA256] = config_sha256(config)
        (staging / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        staging.chmod(0o755)
        if directory.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
            directory.rename(retired / directory.name)
            staging.rename(directory)
            shutil.rmtree(retired)
        else:
            staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ValueError: not a model directory, of a newer format, edited or damaged.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "janus-matris model":
        raise ValueError(f"{path} does not describe a janus-matris model")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {config.get('format_version')}; this version reads {FORMAT_VERSION}: "
            "update janus-matris"
        )
    if config.get(_CONFIG_SHA256) != config_sha256(config):
        raise ValueError(
            f"{path} is corrupt or was edited: its SHA-256 differs from the one in its entry {_CONFIG_SHA256}; copy "
            "the model again (what a model is cannot be changed by editing this file)"
        )
    for name, kind in _REQUIRED.items():
        if not isinstance(config.get(name), kind):
            found = repr(config[name])[:80] if name in config else "missing"
            raise ValueError(f"{path}: entry {name!r} is {found}: it must be a JSON value of kind {_kind_name(kind)}")
    return config


def config_sha256(config: dict[str, Any]) -> str:
    """SHA-256 of what `config.json` says: of its canonical JSON (sorted, no blanks) without the checksum itself."""
    # Through JSON first: it turns keys into strings and tuples into lists, as a reader will find them.
    content = json.loads(json.dumps(config))
    content.pop(_CONFIG_SHA256, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_model(directory: Path) -> dict[str, Any]:
    """Compares the files of a model directory with their checksums; returns `config.json`.

    Raises:
        ValueError: missing, corrupt (checksums) or foreign files.
    """
    config = read_config(directory)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{directory} has no {WEIGHTS}: the model is incomplete")
    if sha256_of(weights) != config["sha256"]:
        raise ValueError(f"{weights} is corrupt: its SHA-256 differs from the one in {CONFIG}; copy the model again")
    return config


def load_model(
    directory: Path | str,
    *,
    device: str = "cpu",
    precision: Precision | None = None,
    mesh: Mesh | None = None,
    experts: ExpertOptions | None = None,
    elements: Sequence[int] | None = None,
) -> MatRIS:
    """Read a model directory.

    Args:
        precision: number formats; None keeps that of the stored parameters.
        mesh, experts: ranks that share the model, and how, see `MatRIS`; each takes its parts of the weights.
            None for this process alone.
        elements: atomic numbers; of a model with experts, only those experts are read that serve these. The model then
            gives numbers without meaning for others. Not with a mesh.

    Raises:
        ValueError: missing, corrupt (checksums) or foreign files.
    """
    directory = Path(directory)
    config, weights = check_model(directory), directory / WEIGHTS
    if precision is None:
        precision = Precision.fp64 if config["parameter_dtype"] == "float64" else Precision.fp32
    try:
        hyper = ModelConfig.from_dict(config["model"])
        state, hyper = _read_state(weights, hyper, elements)
        known = _numbers(config["elements"])
        of_task = {task: _numbers(symbols) for task, symbols in config.get("task_elements", {}).items()}
        model = MatRIS(hyper, precision=precision, mesh=mesh, experts=experts)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    if set(of_task) != set(model.hyper.tasks):
        raise ValueError(
            f"{directory / CONFIG}: entry 'task_elements' is for the tasks {sorted(of_task)}, and the model has "
            f"{sorted(model.hyper.tasks)}: copy the model again"
        )
    expected = set(model.state_dict())
    if set(state) != expected:
        raise ValueError(
            f"{weights} does not fit {CONFIG}: missing {sorted(expected - set(state))}, "
            f"unknown {sorted(set(state) - expected)}"
        )
    splits = {name: split_of(parameter) for name, parameter in model.named_parameters()}
    try:
        model.load_state_dict({n: part_of(value, splits.get(n), model.mesh) for n, value in state.items()})
    except RuntimeError as error:  # shapes
        raise ValueError(f"{weights} does not fit {CONFIG}: {error}") from error
    model.elements = known
    model.elements_of_task = of_task
    model.predicts_magmoms = config["predicts_magmoms"]
    return model.to(device)


def _read_state(
    weights: Path, hyper: ModelConfig, elements: Sequence[int] | None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights, and the hyper-parameters of a model that has them."""
    if elements is None or not hyper.num_moe_experts:
        return load_file(weights), hyper
    with safe_open(weights, framework="pt") as file:

        def some(name: str, experts: Tensor) -> Tensor:
            rows = file.get_slice(name)
            return torch.cat([rows[expert : expert + 1] for expert in experts.tolist()])

        state, num_experts = state_of_elements(file.keys(), file.get_tensor, some, hyper.moe_router_topk, elements)
    return state, replace(hyper, num_moe_experts=num_experts)


def num_parameters(model: MatRIS) -> int:
    """Number of parameters, the reference energies included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _energies(model: MatRIS) -> dict[str, Any]:
    """Entries that tasks have one each of."""
    tasks = model.hyper.tasks
    if not tasks:
        return {"reference_energies": _by_symbol(model.reference_energies), "energy_scale": model.energy_scale.item()}
    return {
        "reference_energies": {
            task: _by_symbol(row) for task, row in zip(tasks, model.reference_energies, strict=True)
        },
        "energy_scale": dict(zip(tasks, model.energy_scale.tolist(), strict=True)),
        "task_elements": {task: _symbols(numbers) for task, numbers in model.elements_of_task.items()},
    }


def _symbols(numbers: Iterable[int]) -> list[str]:
    return [SYMBOLS[number] for number in numbers]


def _numbers(symbols: Iterable[Any]) -> tuple[int, ...]:
    return tuple(sorted({number_of(str(symbol)) for symbol in symbols}))


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def _by_symbol(energies: Tensor) -> dict[str, float]:
    return dict(zip(SYMBOLS[1 : len(energies) + 1], energies.tolist(), strict=True))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
