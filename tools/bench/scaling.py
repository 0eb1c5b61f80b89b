"""Scale on paper: ledgers of very many ranks, a two-rank step predicted before it is measured, and projections.

    python -m tools.bench.scaling ledger --output ledger.json
    OMP_NUM_THREADS=1 python -m tools.bench.scaling predict --output predict.json
    python -m tools.bench.scaling project --output project.json --plot docs/figures/projected_scaling.png

`ledger` runs the training step of single ranks of 16 to 16 384 on torch's fake process group and writes the calls and
bytes of every collective beside those of the formulas. `predict` measures the primitives of this machine with two
ranks, prints what a step of two ranks should take, and measures it. `primitives` does the first of that alone, and
prints the description of a machine as `janus-matris plan --machine` reads it. `project` predicts weak and strong
scaling of the published sizes with `janus-matris plan`'s formulas, for a machine that nobody here has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from matris.presets import PRESETS
from matris.writable import writable_file
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report

LEDGER_LAYOUTS = (
    {},
    {"shard": 8},
    {"graph": 4},
    {"tensor": 4},
    {"shard": 4, "graph": 2, "tensor": 2},
    {"shard": 16},
)
LEDGER_RANKS = (16, 64, 256, 1024, 4096, 16_384)
TWO_RANK_LAYOUTS = ("dp2", "fsdp2", "fsdp2-keep", "gp2", "tp2")
MODELS = ("moe-s", "moe-m", "moe-l")
RANKS = (*(8 * 2**power for power in range(13)), 45_056)
PAPER = {"weak": (0.90, 0.94), "strong": (0.51, 0.54)}
"""Of arXiv 2604.15821, on two other machines: 93.8 and 90.3 % weak, 53.9 and 50.6 % strong."""


def main(words: list[str] | None = None) -> int:
    """Prints tables, and writes JSON and a picture where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    verbs = parser.add_subparsers(dest="verb", required=True, help="each has a --help of its own")
    ledger = verbs.add_parser("ledger", help="calls and bytes of one rank of very many, and bytes of its weights")
    ledger.add_argument("--ranks", type=at_least(1), nargs="+", default=list(LEDGER_RANKS), help="of a launch")
    for name in ("primitives", "predict"):
        two = verbs.add_parser(name, help="two pinned ranks on this machine")
        two.add_argument("--largest_mb", type=float, default=16.0, help="of the messages")
        two.add_argument("--repeats", type=at_least(1), default=15, help="of each measurement")
    two = verbs.choices["predict"]
    two.add_argument(
        "--layouts", nargs="+", choices=TWO_RANK_LAYOUTS, default=list(TWO_RANK_LAYOUTS), help="to predict and measure"
    )
    for name, default, text in (
        ("layers", 3, "interaction blocks"),
        ("width", 64, "feature width"),
        ("repeat", 2, "silicon cells along each axis (8 n^3 atoms a structure)"),
        ("structures", 1, "for each process and step"),
        ("steps", 8, "timed steps of each run"),
    ):
        two.add_argument(f"--{name}", type=at_least(1), default=default, help=text)
    two.set_defaults(experts=0)
    project = verbs.add_parser("project", help="weak and strong scaling")
    project.add_argument("--machine", default="h100", help="as for janus-matris plan")
    project.add_argument("--models", nargs="+", choices=tuple(PRESETS), default=list(MODELS), help="presets")
    project.add_argument("--ranks", type=at_least(1), nargs="+", default=list(RANKS), help="GPUs")
    project.add_argument("--per_rank", type=at_least(1), default=4, help="structures of a rank, weak scaling")
    project.add_argument(
        "--strong_batch", type=at_least(1), default=8192, help="structures of all ranks, strong scaling"
    )
    project.add_argument("--precision", choices=("fp32", "tf32", "bf16-mixed"), default="fp32", help="of the training")
    project.add_argument("--plot", type=writable_file, metavar="PATH", help="PNG to write")
    for verb in verbs.choices.values():
        verb.formatter_class = BenchHelp
        add_output(verb)
    options = parser.parse_args(words)
    report = {"ledger": _ledger, "primitives": _primitives, "predict": _predict, "project": _project}[options.verb](
        options
    )
    write_report(options.output, report)
    return 0


# Ledgers --------------------------------------------------------------------------------------------------------------


_OF_WEIGHTS = ("held", "expected_held", "gathered", "expected_gathered")


def _ledger(options: argparse.Namespace) -> dict[str, Any]:
    from matris.config import ModelConfig
    from tools.bench.fake_ranks import step_of_rank

    hyper = ModelConfig(
        num_layers=2, hidden_size=64, pairwise_cutoff=4.0, three_body_cutoff=3.0, readout_hidden_sizes=(32,)
    )
    rows = []
    print(
        "| ranks | layout | collectives | calls | MB sent | by formula, MB | equal "
        "| kB held | by formula, kB | kB gathered | by formula, kB |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    # A process for each: a fake process group, once made, stays.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for ranks in options.ranks:
            for layout in LEDGER_LAYOUTS:
                found = pool.submit(step_of_rank, ranks // 2, ranks, layout, hyper).result()
                same = found.found.calls == found.expected.calls and found.found.bytes == found.expected.bytes
                sent, formula = (sum(part.wire_bytes.values()) for part in (found.found, found.expected))
                same = same and abs(sent - formula) <= 1e-12 * formula
                name = " x ".join(f"{axis} {size}" for axis, size in layout.items()) or "data alone"
                rows.append(
                    {"ranks": ranks, "layout": layout, "equal": same}
                    | {kind: vars(getattr(found, kind)) for kind in ("found", "expected")}
                    | {f"{name}_bytes": getattr(found, name) for name in _OF_WEIGHTS}
                )
                weights = " | ".join(f"{getattr(found, name) / 1e3:.1f}" for name in _OF_WEIGHTS)
                print(
                    f"| {ranks} | {name} | {len(found.found.calls)} | {sum(found.found.calls.values())} "
                    f"| {sent / 1e6:.6f} | {formula / 1e6:.6f} | {'yes' if same else 'NO'} "
                    f"| {weights} |",
                    flush=True,
                )
    return {"model": hyper.to_dict(), "rows": rows}


# Two ranks ------------------------------------------------------------------------------------------------------------


def _primitives(options: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from tools.bench import two_ranks

    found = two_ranks.primitives(largest_mb=options.largest_mb, repeats=options.repeats)
    for name, entry in found["collectives"].items():
        rate = 1e-9 / entry["beta_s_per_byte"] if entry["beta_s_per_byte"] else float("inf")
        print(f"{name:<15} {1e6 * entry['alpha_s']:8.1f} us  {rate:8.3f} GB/s", flush=True)
    reduction = found["collectives"]["all_reduce"]
    link = {
        "GB_per_s": round(1e-9 / max(reduction["beta_s_per_byte"], 1e-15), 3),
        "latency_us": round(5e5 * reduction["alpha_s"], 1),  # up and down a tree of two ranks
    }
    described = {
        "name": "two cores of this machine",
        "sources": ["measured by python -m tools.bench.scaling primitives; links are those of an all-reduce"],
        "devices_per_node": 2,
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9, 1),
        "tflops": {"fp32": round(1e-12 * found["fp32_flops_per_s"], 4)},
        "memory_GB_per_s": round(1e-9 * found["triad_bytes_per_s"], 2),
        "in_node": link,
        "between_nodes": dict(link),
        "shares": {"matrix": [0.7, 1.0], "memory": [0.7, 1.0], "links": [0.7, 1.0], "overlap": [0.0, 0.0]},
    }
    print(yaml.safe_dump(described, sort_keys=False, default_flow_style=None))
    return found | {"description": described}


def _predict(options: argparse.Namespace) -> dict[str, Any]:
    from tools.bench import two_ranks

    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two CPUs are needed, one for each rank")
    machine = _primitives(options)
    return {"primitives": machine} | two_ranks.predict(options, machine)


# Projections ----------------------------------------------------------------------------------------------------------


def _project(options: argparse.Namespace) -> dict[str, Any]:
    from janus.machine import load_machine
    from matris.config import Precision

    machine = load_machine(options.machine)
    common = {"machine": machine, "devices_per_node": machine.devices_per_node}
    common |= {"precision": Precision(options.precision)}
    report: dict[str, Any] = {
        "projected": True,
        "machine": {"name": machine.name, "sources": list(machine.sources)},
        "precision": options.precision,
        "structures_per_rank": options.per_rank,
        "strong_batch": options.strong_batch,
        "paper": PAPER,
        "models": {},
    }
    for name in options.models:
        series = {
            "weak": _weak(PRESETS[name], options, common),
            "strong": _strong(PRESETS[name], options, common),
        }
        report["models"][name] = series
        for kind, points in series.items():
            print(f"\n{name}, {kind} scaling, projected")
            print("| GPUs | layout | micro-batches | recompute | GB | s per step | MFU, % | scaling efficiency, % |")
            print("|---|---|---|---|---|---|---|---|")
            for point in points:
                print(_row(point), flush=True)
    if options.plot is not None:
        _draw(report, options.plot)
    return report


def _weak(hyper: Any, options: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """As many structures for each rank; the best layout of the smallest machine that has one, and replicas of it."""
    from matris.plan import Planner
    from matris.plan_job import Job, NoPlanError
    from matris.plan_search import search

    found, layout = [], None
    for ranks in options.ranks:
        job = Job(hyper=hyper, workload=_workload(), ranks=ranks, global_batch=options.per_rank * ranks, **common)
        if layout is None:
            try:
                layout = search(job, keep=1).best[0].layout
            except NoPlanError:
                continue
        found.append((ranks, job.global_batch, Planner(job).predict(layout)))
    return _points(found)


def _strong(hyper: Any, options: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The same structures on more and more ranks, with the best layout for each number."""
    from matris.plan_job import Job, NoPlanError
    from matris.plan_search import search

    found = []
    for ranks in options.ranks:
        job = Job(hyper=hyper, workload=_workload(), ranks=ranks, global_batch=options.strong_batch, **common)
        try:
            found.append((ranks, job.global_batch, search(job, keep=1).best[0]))
        except NoPlanError:
            continue
    return _points(found)


def _workload() -> Any:
    from matris.cli.plan import DEFAULT_STRUCTURE

    return DEFAULT_STRUCTURE


def _points(found: list[tuple[int, int, Any]]) -> list[dict[str, Any]]:
    """With structures/s of a rank over that on the fewest ranks, at either end of the band."""
    from matris.plan_report import prediction_json

    points = []
    for ranks, batch, prediction in found:
        ratios = []
        for end in ("pessimistic", "optimistic"):
            first_ranks, first_batch, first = found[0]
            rate, first_rate = (
                size / (number * getattr(entry, end).step)
                for number, size, entry in ((ranks, batch, prediction), (first_ranks, first_batch, first))
            )
            ratios.append(rate / first_rate)
        points.append(
            {"ranks": ranks, "global_batch": batch, "scaling": {"low": min(ratios), "high": max(ratios)}}
            | prediction_json(prediction)
        )
    return points


def _row(point: dict[str, Any]) -> str:
    scaling, mfu = point["scaling"], point["mfu"]
    return (
        f"| {point['ranks']} | {point['layout']} | {point['micro_batches']} x {point['micro_batch']} "
        f"| {point['recompute']} | {point['memory_bytes']['total'] / 1e9:.1f} "
        f"| {point['pessimistic']['step_s']:.3g} .. {point['optimistic']['step_s']:.3g} "
        f"| {100 * mfu['low']:.0f} .. {100 * mfu['high']:.0f} "
        f"| {100 * scaling['low']:.1f} .. {100 * scaling['high']:.1f} |"
    )


def _draw(report: dict[str, Any], path: Path) -> None:
    """Bands over the number of GPUs, beside what the paper measured elsewhere."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Projected, not measured: {report['machine']['name']}, {report['precision']}", fontsize=11)
    titles = {
        "weak": f"weak, {report['structures_per_rank']} structures per GPU",
        "strong": f"strong, {report['strong_batch']} structures in all",
    }
    for column, kind in enumerate(("weak", "strong")):
        axes = figure.add_subplot(1, 2, column + 1)
        low, high = report["paper"][kind]
        axes.axhspan(100 * low, 100 * high, color="0.8", label="arXiv 2604.15821, measured, MoE-L")
        for index, (name, series) in enumerate(report["models"].items()):
            points = series[kind]
            ranks = [point["ranks"] for point in points]
            bounds = [[100 * point["scaling"][end] for point in points] for end in ("low", "high")]
            axes.fill_between(ranks, *bounds, color=f"C{index}", alpha=0.3, label=name)
            for bound in bounds:
                axes.plot(ranks, bound, color=f"C{index}", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks[::3], [str(number) for number in ranks[::3]])
        axes.set_ylim(0.0, 110.0)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("structures/s per GPU, % of the fewest GPUs")
        axes.set_title(titles[kind], fontsize=10)
        axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    raise SystemExit(run(main))
