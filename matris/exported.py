"""Model directories: safetensors files with the weights, `config.json` with everything needed to use them, and a model
card."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus.file_errors import naming
from janus.mesh import Mesh
from janus.sharding import part_of, split_of
from matris.blocks.module import ExpertOptions
from matris.blocks.moe import reader_of_elements
from matris.config import ModelConfig, Precision
from matris.elements import SYMBOLS, number_of
from matris.model import MatRIS
from matris.model_card import model_card
from matris.tensor_files import (
    INDEX,
    MAX_FILE_BYTES,
    WEIGHTS,
    TensorFiles,
    read_index,
    sha256_of,
    write_weights,
)

FORMAT_VERSION = 2
CONFIG, CARD = "config.json", "README.md"
_UNITS = {"energy": "eV", "length": "Angstrom", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3", "magmoms": "muB"}
_CONFIG_SHA256 = "config_sha256"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "parameter_dtype": str,
    "elements": list,
    "reference_energies": dict,
    "energy_scale": (float, dict),
    "predicts_magmoms": bool,
    "files": dict,
    "provenance": dict,
}
"""Entries of `config.json` that are relied upon. With tasks `reference_energies` and `energy_scale` hold what they do
without, for each task by name, and `task_elements` the elements. `files` are those with weights, with their SHA-256."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model whose weights lie elsewhere, to be read one by one.

    Attributes:
        model: hyper-parameters, elements and the like; its weights are not used and may be on the meta device.
        like: names, shapes and formats of the weights.
        read: gives a weight by name.
        provenance: JSON-ready facts of where the weights come from.
    """

    model: MatRIS
    like: Mapping[str, Tensor] = field(repr=False)
    read: Callable[[str], Tensor] = field(repr=False)
    provenance: Mapping[str, Any]

    def build(self) -> MatRIS:
        """The model with its weights, all in memory."""
        shell = self.model
        model = MatRIS(shell.hyper, precision=precision_of(shell.config.params_dtype))
        model.load_state_dict({name: self.read(name) for name in self.like})
        model.elements, model.elements_of_task = shell.elements, dict(shell.elements_of_task)
        model.predicts_magmoms = shell.predicts_magmoms
        return model


def without_weights(
    hyper: ModelConfig,
    precision: Precision,
    *,
    elements: Iterable[int],
    elements_of_task: Mapping[str, Iterable[int]] | None = None,
    predicts_magmoms: bool,
) -> MatRIS:
    """A model on the meta device: what it is, at no cost in memory."""
    with torch.device("meta"):
        model = MatRIS(hyper, precision=precision)
    model.elements, model.predicts_magmoms = tuple(elements), predicts_magmoms
    model.elements_of_task = {task: tuple(numbers) for task, numbers in (elements_of_task or {}).items()}
    return model


def precision_of(dtype: torch.dtype) -> Precision:
    """Of a model whose parameters have this format."""
    return Precision.fp64 if dtype == torch.float64 else Precision.fp32


def save_model(
    model: MatRIS,
    directory: Path,
    *,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    state: Mapping[str, Tensor] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model directory; it appears whole or not at all.

    Args:
        directory: to create; its parent is created too.
        provenance: JSON-ready facts of where the weights come from.
        overwrite: replace an existing model directory.
        state: the whole state dict, of a model that several ranks share; None for that of `model`.
        max_file_bytes: larger weights are cut into several files.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is False.
        OSError: not writable.
    """
    state = model.state_dict() if state is None else state
    stored = StoredModel(model=model, like=state, read=state.__getitem__, provenance=provenance)
    write_model(stored, directory, overwrite=overwrite, max_file_bytes=max_file_bytes)


def write_model(
    stored: StoredModel, directory: Path, *, overwrite: bool = False, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """As `save_model`, of weights that are read one by one."""
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise FileExistsError(f"{directory} exists: choose another output, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with naming(directory):
            files = write_weights(staging, stored.like, stored.read, max_file_bytes=max_file_bytes)
            write_config(stored, staging, files)
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


def write_config(stored: StoredModel, directory: Path, files: Mapping[str, str]) -> None:
    """Writes `config.json` and the model card.

    Args:
        files: those with weights, with their SHA-256.
    """
    model = stored.model
    buffers = {name for name, _ in model.named_buffers()}
    config = {
        "format": "janus-matris model",
        "format_version": FORMAT_VERSION,
        "model": model.hyper.to_dict(),
        "parameters": sum(value.numel() for name, value in stored.like.items() if name not in buffers),
        "parameter_dtype": str(model.config.params_dtype).removeprefix("torch."),
        "units": _UNITS,
        "elements": _symbols(model.elements),
        **_energies(stored),
        "predicts_magmoms": model.predicts_magmoms,
        "files": dict(files),
        "provenance": dict(stored.provenance),
    }
    config[_CONFIG_SHA256] = config_sha256(config)
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (directory / CARD).write_text(model_card(config))


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model directory; an older format is brought up to date.

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
    version = config.get("format_version")
    if version not in (*_UPGRADES, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {version}; this version reads 1 to {FORMAT_VERSION}: update janus-matris"
        )
    if config.get(_CONFIG_SHA256) != config_sha256(config):
        raise ValueError(
            f"{path} is corrupt or was edited: its SHA-256 differs from the one in its entry {_CONFIG_SHA256}; copy "
            "the model again (what a model is cannot be changed by editing this file)"
        )
    if version in _UPGRADES:
        config = _UPGRADES[version](config)
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


def _from_1(config: dict[str, Any]) -> dict[str, Any]:
    """Format 1 (until November 2026): a single file of weights, and no model card."""
    if not isinstance(config.get("sha256"), str):
        return config  # refused for what it lacks
    kept = {name: value for name, value in config.items() if name != "sha256"}
    return {**kept, "format_version": FORMAT_VERSION, "files": {WEIGHTS: config["sha256"]}}


_UPGRADES = {1: _from_1}
"""By version: makes the newest format out of it."""


def check_model(directory: Path) -> dict[str, Any]:
    """Compares the files of a model directory with their checksums; returns `config.json`.

    Raises:
        ValueError: missing, corrupt (checksums) or foreign files.
    """
    config = read_config(directory)
    for name, digest in config["files"].items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{directory} has no {name}: the model is incomplete")
        if sha256_of(path) != digest:
            raise ValueError(f"{path} is corrupt: its SHA-256 differs from the one in {CONFIG}; copy the model again")
    files = set(read_index(directory).values()) | {INDEX} if (directory / INDEX).is_file() else {WEIGHTS}
    if unlisted := sorted(files - set(config["files"])):
        raise ValueError(f"{directory}: {CONFIG} has no checksum of {', '.join(unlisted)}; copy the model again")
    return config


def open_model(directory: Path) -> StoredModel:
    """A model directory, its checksums compared, to read weights from.

    Raises:
        ValueError: as `load_model`.
    """
    config = check_model(directory)
    shell, files = _shell(directory, config), TensorFiles.open(directory)
    like = shell.state_dict()
    _check_names(directory, set(like), files.names)
    return StoredModel(model=shell, like=like, read=files.read, provenance=config["provenance"])


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
    config = check_model(directory)
    shell, files = _shell(directory, config), TensorFiles.open(directory)
    _check_names(directory, set(shell.state_dict()), files.names)
    if precision is None:
        precision = shell.precision
    state, hyper = _read_state(files, shell.hyper, elements)
    model = MatRIS(hyper, precision=precision, mesh=mesh, experts=experts)
    splits = {name: split_of(parameter) for name, parameter in model.named_parameters()}
    try:
        model.load_state_dict({n: part_of(value, splits.get(n), model.mesh) for n, value in state.items()})
    except RuntimeError as error:  # shapes
        raise ValueError(f"the weights of {directory} do not fit its {CONFIG}: {error}") from error
    model.elements, model.elements_of_task = shell.elements, shell.elements_of_task
    model.predicts_magmoms = shell.predicts_magmoms
    return model.to(device)


def _shell(directory: Path, config: Mapping[str, Any]) -> MatRIS:
    """What a `config.json` describes, on the meta device."""
    dtype = torch.float64 if config["parameter_dtype"] == "float64" else torch.float32
    try:
        shell = without_weights(
            ModelConfig.from_dict(config["model"]),
            precision_of(dtype),
            elements=_numbers(config["elements"]),
            elements_of_task={task: _numbers(names) for task, names in config.get("task_elements", {}).items()},
            predicts_magmoms=config["predicts_magmoms"],
        )
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    if set(shell.elements_of_task) != set(shell.hyper.tasks):
        raise ValueError(
            f"{directory / CONFIG}: entry 'task_elements' is for the tasks {sorted(shell.elements_of_task)}, and the "
            f"model has {sorted(shell.hyper.tasks)}: copy the model again"
        )
    return shell


def _check_names(directory: Path, expected: set[str], found: set[str]) -> None:
    if found != expected:
        raise ValueError(
            f"the weights of {directory} do not fit its {CONFIG}: missing {sorted(expected - found)}, "
            f"unknown {sorted(found - expected)}"
        )


def _read_state(
    files: TensorFiles, hyper: ModelConfig, elements: Sequence[int] | None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights, and the hyper-parameters of a model that has them."""
    if elements is None or not hyper.num_moe_experts:
        return {name: files.read(name) for name in sorted(files.names)}, hyper
    read, num_experts = reader_of_elements(files.names, files.read, files.rows, hyper.moe_router_topk, elements)
    return {name: read(name) for name in sorted(files.names)}, replace(hyper, num_moe_experts=num_experts)


def num_parameters(model: MatRIS) -> int:
    """Number of parameters, the reference energies included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _energies(stored: StoredModel) -> dict[str, Any]:
    """Entries that tasks have one each of."""
    tasks = stored.model.hyper.tasks
    references, scale = stored.read("reference_energies"), stored.read("energy_scale")
    if not tasks:
        return {"reference_energies": _by_symbol(references), "energy_scale": scale.item()}
    return {
        "reference_energies": {task: _by_symbol(row) for task, row in zip(tasks, references, strict=True)},
        "energy_scale": dict(zip(tasks, scale.tolist(), strict=True)),
        "task_elements": {task: _symbols(numbers) for task, numbers in stored.model.elements_of_task.items()},
    }


def _symbols(numbers: Iterable[int]) -> list[str]:
    return [SYMBOLS[number] for number in numbers]


def _numbers(symbols: Iterable[Any]) -> tuple[int, ...]:
    return tuple(sorted({number_of(str(symbol)) for symbol in symbols}))


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def _by_symbol(energies: Tensor) -> dict[str, float]:
    return dict(zip(SYMBOLS[1 : len(energies) + 1], energies.tolist(), strict=True))
