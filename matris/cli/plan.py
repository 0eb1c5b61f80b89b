"""`janus-matris plan`: what a layout of ranks needs and how fast it is, before any machine is asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus.machine import load_machine, machine_names
from matris.cli.label_options import HelpFormatter
from matris.config import ModelConfig, Precision
from matris.layouts import Layout, parse_layout
from matris.presets import PRESETS
from matris.train_config import TrainConfig
from matris.workload import Workload
from matris.writable import writable_file

if TYPE_CHECKING:
    from matris.plan_job import Recompute

DEFAULT_STRUCTURE = Workload(atoms=110.0, edges=7600.0, angles=92000.0)
"""473 million structures with 3.6e12 edges, which arXiv 2604.15821 trains on, have 7 600 each; atoms for 70 edges per
atom within 6 Angstrom, and angles for an even density and 4.5 Angstrom."""
_BEST = 8
_POLICIES = ("auto", "none", "selective", "all", "full")


def build_parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    parser = argparse.ArgumentParser(
        prog="janus-matris plan",
        description="Memory, bytes sent, time per step and efficiency of training on so many ranks, predicted from "
        "formulas and the description of a machine, for one layout or for the best of all. Nothing is run; times are "
        "bands, and the output says what they leave out.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=tuple(PRESETS), help="a published model size")
    what.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="settings of a run: its model, and where not given here its precision, recomputation, global batch and "
        "layout",
    )
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the machine")
    parser.add_argument("--gpus_per_node", type=int, metavar="N", help="ranks of a node (default: all its devices)")
    parser.add_argument(
        "--machine", default="h100", metavar="NAME|FILE.yaml", help=f"one of {', '.join(machine_names())}, or a file"
    )
    parser.add_argument("--layout", metavar="NAME", help="such as fsdp8xgp4xep8, as `verify` writes them")
    parser.add_argument("--search", action="store_true", help="find the best layout")
    parser.add_argument("--best", type=int, metavar="N", help=f"layouts to show of a search (default: {_BEST})")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="data sets whose mean sizes count")
    for name, value in vars(DEFAULT_STRUCTURE).items():
        parser.add_argument(f"--{name}", type=float, help=f"mean number in a structure (default: {value:g})")
    parser.add_argument("--global_batch_size", type=int, help="structures of an update (default: one for each rank)")
    parser.add_argument("--micro_batch", type=int, help="structures of a micro-batch (default: as many as fit)")
    parser.add_argument(
        "--precision", choices=[kind.value for kind in Precision if kind is not Precision.fp64], help="(default: fp32)"
    )
    parser.add_argument(
        "--recompute", choices=_POLICIES, help="auto takes the policy with the least work that fits (default: auto)"
    )
    parser.add_argument("--imbalance", type=float, default=1.0, help="largest load of a rank over the mean load")
    parser.add_argument("--output", type=writable_file, metavar="FILE.json", help="also write JSON")
    return parser


def main(arguments: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name in ("nodes", "gpus_per_node", "best", "global_batch_size", "micro_batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: it must be at least 1")
    if options.search and options.layout is not None:
        parser.error("--search looks at all layouts: leave out --layout")
    if options.best is not None and not options.search:
        parser.error("--best is of a search: leave it out, or add --search")
    if not options.search and options.layout is None and options.config is None:
        parser.error("give a layout (--layout fsdp8xgp4), or --search for the best one")
    if options.data and any(getattr(options, name) is not None for name in vars(DEFAULT_STRUCTURE)):
        parser.error("--data has sizes of its own: leave out --atoms, --edges and --angles")
    machine = load_machine(options.machine)
    config = None if options.config is None else _read(options.config)
    if config is None:
        hyper = PRESETS[options.preset]
    else:
        from matris.setup import hyper_parameters

        hyper = hyper_parameters(config)

    from matris.plan import Planner
    from matris.plan_job import Job
    from matris.plan_report import job_lines, missing_lines, prediction_lines, search_lines, to_json
    from matris.plan_search import search

    devices = options.gpus_per_node or machine.devices_per_node
    if devices > machine.devices_per_node:
        raise ValueError(
            f"--gpus_per_node is {devices}, but a node of {machine.name} has {machine.devices_per_node}: give at most "
            "that many, or describe another machine"
        )
    ranks = options.nodes * devices
    job = Job(
        hyper=hyper,
        machine=machine,
        ranks=ranks,
        devices_per_node=devices,
        workload=_workload(options, hyper),
        global_batch=_global_batch(options, config, ranks),
        micro_batch=options.micro_batch,
        precision=Precision(options.precision or ("fp32" if config is None else config.training.precision)),
        recompute=_recompute(options, config),
        kernels="torch" if config is None else config.training.kernels,
        imbalance=options.imbalance,
    )
    found = search(job, keep=options.best or _BEST) if options.search else None
    predictions = (Planner(job).predict(_layout(options, config, ranks)),) if found is None else found.best
    lines = [*job_lines(job), ""]
    if found is not None:
        lines += [*search_lines(found.best, found.possible, found.dropped), "", "the best of them:"]
    print("\n".join([*lines, *prediction_lines(predictions[0]), "", *missing_lines()]))
    if options.output is not None:
        _write(options.output, to_json(job, predictions, {} if found is None else found.dropped))
    return 0


def _read(path: str) -> TrainConfig:
    from matris.cli.train import parse

    config = parse(["--config", path])
    if config.parallel.expert_fp16_wire or config.training.compile != "none":
        raise ValueError(
            f"{path}: parallel.expert_fp16_wire is {config.parallel.expert_fp16_wire} and training.compile is "
            f"{config.training.compile}: neither is predicted; plan without them, which sends no less"
        )
    return config


def _layout(options: argparse.Namespace, config: TrainConfig | None, ranks: int) -> Layout:
    if options.layout is not None:
        layout = parse_layout(options.layout)
        if any(factor.startswith("dp") for factor in options.layout.split("x")) and layout.num_ranks != ranks:
            raise ValueError(
                f"--layout {options.layout} has {layout.num_ranks} ranks, but there are {ranks}: leave out dp, which "
                "is then as large as it must be, or ask for other nodes"
            )
        return layout
    assert config is not None
    parallel = config.parallel
    return Layout(
        shard=parallel.fully_sharded_size,
        graph=parallel.context_parallel_size,
        tensor=parallel.tensor_model_parallel_size,
        expert=parallel.expert_model_parallel_size,
        policy=parallel.sharding_policy,
        placement=parallel.expert_placement,
    )


def _recompute(options: argparse.Namespace, config: TrainConfig | None) -> Recompute | None:
    chosen = options.recompute or ("auto" if config is None else config.training.recompute)
    return None if chosen == "auto" else chosen


def _global_batch(options: argparse.Namespace, config: TrainConfig | None, ranks: int) -> int:
    if options.global_batch_size is not None:
        return int(options.global_batch_size)
    if config is None:
        return ranks
    if config.data.structures_per_update is None:
        raise ValueError(
            f"{options.config} has a global batch of so many atoms, edges or angles: say how many structures an update "
            "has, --global_batch_size"
        )
    return config.data.structures_per_update


def _workload(options: argparse.Namespace, hyper: ModelConfig) -> Workload:
    if options.data:
        from matris.data.dataset import open_dataset

        sizes = open_dataset(
            options.data, pairwise_cutoff=hyper.pairwise_cutoff, three_body_cutoff=hyper.three_body_cutoff
        ).sizes
        atoms, edges, angles = sizes.mean(axis=0).tolist()
        return Workload(atoms=atoms, edges=edges, angles=angles)
    given = {name: getattr(options, name) for name in vars(DEFAULT_STRUCTURE)}
    return Workload(**vars(DEFAULT_STRUCTURE) | {name: value for name, value in given.items() if value is not None})


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
