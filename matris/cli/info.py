"""`janus-matris info`: what a model is."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from matris.config import TASK_FIELDS, ModelConfig
from matris.elements import SYMBOLS
from matris.layouts import Layout, parse_layout
from matris.presets import PRESETS

if TYPE_CHECKING:
    from matris.model import MatRIS

PROG = "janus-matris info"


def main(arguments: list[str]) -> int:
    """Exit status 0; a mistake in the options ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--json] [--layout NAME] "
        "(--model DIR [--plot FILE.png] | [--preset NAME] [--model.FIELD VALUE ...])",
        description="Parameters, hyper-parameters, elements and provenance of a saved model, or of one to be made.",
        epilog="hyper-parameters and their defaults, Angstrom (`janus-matris train --help` explains them):\n"
        + "\n".join(
            f"  --model.{field.name} {_option(field.default)}"
            for field in fields(ModelConfig)
            if field.name not in TASK_FIELDS
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory")
    parser.add_argument("--preset", choices=PRESETS, help="a published size, to start from")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw which experts serve which elements; with --model only"
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="also the memory that training needs on each rank of a layout such as fsdp64xtp2 (as `verify` writes "
        "them), without activations, which depend on the batch; with the weights that are gathered at the moment of a "
        "step when most are there, of sharded experts if the plan gives each rank equally many, and of gradients that "
        "wait for their second part, which they do not with recompute full",
    )
    options, rest = parser.parse_known_args(arguments)
    layout = None if options.layout is None else parse_layout(options.layout)
    if options.model is not None:
        if rest or options.preset:
            parser.error(f"--model DIR is complete by itself: {' '.join(rest) or '--preset'} cannot be added")
        facts = _of_directory(options.model, options.plot, layout)
    else:
        if options.plot is not None:
            parser.error("--plot draws the experts of a saved model: give --model DIR")
        facts = _of_config(_hyper_parameters(options.preset, rest), layout)
    print(json.dumps(facts, indent=1) if options.json else _table(facts))
    return 0


def _hyper_parameters(preset: str | None, arguments: list[str]) -> ModelConfig:
    parser = jsonargparse.ArgumentParser(prog=PROG)
    parser.add_class_arguments(ModelConfig, "model", skip=set(TASK_FIELDS))
    base = PRESETS[preset] if preset else ModelConfig()
    names = [field.name for field in fields(base) if field.name not in TASK_FIELDS]
    parser.set_defaults({f"model.{name}": getattr(base, name) for name in names})
    return ModelConfig(**vars(parser.parse_args(arguments).model))


def _of_directory(directory: Path, picture: Path | None, layout: Layout | None) -> dict[str, Any]:
    from matris.exported import load_model, read_config

    config = read_config(directory)
    model = load_model(directory)  # verifies the checksum as well
    if picture is not None:
        _draw_experts(model, picture)
    return config | _counts(model, layout)


def _draw_experts(model: MatRIS, picture: Path) -> None:
    from matris.blocks.moe import RoutedExperts
    from matris.plots import plot_experts

    sites = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            experts, gates = module.router()
            sites[name] = experts.numpy(), gates.detach().numpy()
    if not sites:
        raise ValueError(f"--plot {picture}: the model has no experts to draw")
    plot_experts(sites, model.elements, picture)


def _of_config(hyper: ModelConfig, layout: Layout | None) -> dict[str, Any]:
    import torch

    from matris.model import MatRIS

    with torch.device("meta"):  # shapes alone: the largest have billions of parameters
        model = MatRIS(hyper)
    return {"model": hyper.to_dict()} | _counts(model, layout)


def _counts(model: MatRIS, layout: Layout | None) -> dict[str, Any]:
    from janus.sharding import weight_memory
    from matris.exported import num_parameters
    from matris.setup import check_ranks
    from matris.train_config import ParallelConfig

    total = num_parameters(model)
    counts = {"parameters": total, "total_parameters": total, "active_parameters": model.num_active_parameters()}
    if layout is None:
        return counts
    try:
        check_ranks(model.hyper, layout.applied(ParallelConfig()))
    except ValueError as error:
        raise ValueError(f"--layout {layout.name}: {error}") from None
    memory = weight_memory(
        model,
        model.sharding_units(),
        shards=layout.shard,
        tensor=layout.tensor,
        experts=model.expert_sites(),
        expert_ranks=layout.expert,
        at_home=layout.placement == "fixed",
    )
    return counts | {
        "training_memory_per_rank": {
            "layout": layout.name,
            "ranks": layout.num_ranks,
            "held_bytes": memory.held,
            "gathered_bytes": memory.gathered,
            "gathered_experts_bytes": memory.gathered_experts,
            "waiting_bytes": memory.waiting,
            "total_GiB": round(sum(vars(memory).values()) / 2**30, 2),
        }
    }


def _table(facts: dict[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        show = {"reference_energies": _not_zero, "elements": _elements, "task_elements": _elements}.get(name)
        lines += _lines(name, value if show is None else show(value), indent=0)
    return "\n".join(lines)


def _not_zero(energies: dict[str, Any]) -> dict[str, Any] | str:
    """Of elements, or those for each task."""
    if any(isinstance(value, dict) for value in energies.values()):
        return {task: _not_zero(of_task) for task, of_task in energies.items()}
    return {symbol: energy for symbol, energy in energies.items() if energy != 0.0} or "all zero"


def _elements(symbols: list[str] | dict[str, list[str]]) -> Any:
    """All of them, unless they are all from hydrogen on; or so for each task."""
    if isinstance(symbols, dict):
        return {task: _elements(of_task) for task, of_task in symbols.items()}
    return symbols if tuple(symbols) == SYMBOLS[1 : len(symbols) + 1] else ",".join(symbols)


def _lines(name: str, value: Any, indent: int) -> list[str]:
    """A line for a value, or the name and a line for each entry."""
    blanks = " " * indent
    if isinstance(value, dict) and value:
        inner = [line for key, entry in value.items() for line in _lines(key, entry, indent + 2)]
        return [f"{blanks}{name}:", *inner]
    return [f"{blanks}{name:<{26 - indent}} {_plain(value)}"]


def _option(value: Any) -> str:
    """A default as it can be given on the command line."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, tuple) else _plain(value)


def _plain(value: Any) -> str:
    value = getattr(value, "value", value)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) if len(value) < 10 else f"{value[0]}..{value[-1]} ({len(value)})"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) and not isinstance(value, bool) else str(value)
