"""Plans of experts on real data: how even, how many bytes, how long, against whole experts at fixed homes.

    python -m tools.bench.experts --data shared/data --output experts.json

A global batch is drawn from the data sets, cut into the micro-batches of virtual ranks by edges, and counted: tokens of
the message site are directed edges by the element of their target, those of the update site are atoms. Routing is that
of a new model (the top-k of a random row per element). Nothing is exchanged: bytes are counted, of one forward pass in
fp32 and per rank, from 5 d numbers of a token's copy (3 d there, 2 d back) and 8 d h numbers of an expert. Whole
experts at fixed homes means groups of `--group` ranks that hold all experts of the site between them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from janus.data.packing import Budget, plan_micro_batches
from janus.expert_parallel.plan import expert_load, fixed_plan, plan_experts
from matris.config import ModelConfig
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.presets import PRESETS
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report

FILES = (
    *("acac/train_300K", "tio2_pbe/train", "s66x8/train", "water_pbe0ts/train", "mp_crystals/train"),
    *(f"mlearn_{element}/train" for element in ("Li", "Mo", "Si", "Ni", "Cu")),
)
MODELS = [name for name, hyper in PRESETS.items() if hyper.num_moe_experts]
BALANCE = 1.05
SITES = ("message", "update")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["moe-s", "moe-m", "moe-l"], help="presets")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[8, 64, 512], help="numbers of virtual ranks")
    parser.add_argument("--structures", type=at_least(1), nargs="+", default=[4, 32], help="per rank in a global batch")
    parser.add_argument("--steps", type=at_least(1), default=3, help="global batches of each kind")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="timings of a step, of which the best counts")
    parser.add_argument("--group", type=at_least(1), default=8, help="ranks that share whole experts at fixed homes")
    add_output(parser)
    options = parser.parse_args()
    if missing := [str(path) for path in _files(options.data) if not path.is_file()]:
        parser.error(f"--data {options.data} has no {missing[0]}: it must hold all data sets that are counted")
    if wrong := [ranks for ranks in options.ranks if ranks % options.group]:
        parser.error(f"--ranks {' '.join(map(str, wrong))}: not a multiple of --group {options.group}")
    atoms, edges = _counts(options.data)
    print(
        f"{len(atoms)} structures, {atoms.sum()} atoms, {edges.sum()} edges, {(atoms.sum(axis=0) > 0).sum()} elements"
    )
    rows = []
    for model in options.models:
        for num_ranks in options.ranks:
            for structures in options.structures:
                rows.append(_measure(options, model, num_ranks, structures, atoms, edges))
                print(f"measured {model} at {num_ranks} ranks with {structures} structures each", flush=True)
    print(_table(rows))
    settings = {name: str(value) for name, value in vars(options).items()}
    write_report(options.output, {"settings": settings, "rows": rows})
    return 0


def _files(data: Path) -> list[Path]:
    return [data / f"{name}.xyz.gz" for name in FILES]


def _counts(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Atoms, and directed edges by their target, of each structure and element, (n, 118) int64."""
    config, atoms, edges = ModelConfig(), [], []
    for path in _files(data):
        for frame in ase.io.iread(path, index=":"):
            structure = Structure(
                numbers=frame.numbers.astype(np.int64),
                positions=frame.positions,
                cell=np.asarray(frame.cell),
                pbc=np.asarray(frame.pbc),
            )
            graph = build_graph(structure, pairwise_cutoff=config.pairwise_cutoff, three_body_cutoff=1e-3)
            atoms.append(np.bincount(structure.numbers - 1, minlength=118))
            edges.append(np.bincount(structure.numbers[graph.edge_target] - 1, minlength=118))
    return np.array(atoms), np.array(edges)


def _measure(
    options: argparse.Namespace, model: str, num_ranks: int, structures: int, atoms: np.ndarray, edges: np.ndarray
) -> dict[str, Any]:
    hyper = PRESETS[model]
    width, experts, topk = hyper.hidden_size, hyper.num_moe_experts, hyper.moe_router_topk
    token_bytes = 4.0 * 5 * width
    expert_bytes = 4.0 * 8 * width * hyper.moe_ffn_hidden_size
    generator = np.random.default_rng(0)
    routing = np.argsort(-generator.normal(size=(2 * hyper.num_layers, 118, experts)), axis=2)[:, :, :topk]
    found: dict[str, list[tuple[float, ...]]] = {site: [] for site in SITES}
    best = float("inf")
    for _ in range(options.steps):
        batch = generator.integers(len(atoms), size=num_ranks * structures)
        shares = plan_micro_batches(edges[batch].sum(axis=1, keepdims=True), num_ranks=num_ranks, budget=Budget())
        owned = [batch[np.concatenate([*share, np.empty(0, dtype=np.int64)])] for share in shares]
        histogram = {
            "message": np.array([edges[part].sum(axis=0) for part in owned]),
            "update": np.array([atoms[part].sum(axis=0) for part in owned]),
        }
        sites = [(histogram[SITES[i % 2]], routing[i]) for i in range(len(routing))]
        for _ in range(options.repeats):
            start = time.perf_counter()
            for tokens, table in sites:
                load = expert_load(tokens, table, experts)
                plan_experts(load, token_bytes=token_bytes, expert_bytes=expert_bytes, balance=BALANCE)
            best = min(best, time.perf_counter() - start)
        for i, (tokens, table) in enumerate(sites):
            load = expert_load(tokens, table, experts)
            plan = plan_experts(load, token_bytes=token_bytes, expert_bytes=expert_bytes, balance=BALANCE)
            homes = [fixed_plan(part, options.group) for part in np.split(load, num_ranks // options.group)]
            fixed_load = np.concatenate([part.load for part in homes])
            # The mean rounded up is the best there is where the mean is small.
            assert plan.load.max() <= max(BALANCE * load.sum() / num_ranks, -(-load.sum() // num_ranks))
            megabytes = np.array([token_bytes, expert_bytes]) / num_ranks / 1e6
            found[SITES[i % 2]].append(
                (
                    int(load.sum()) / num_ranks,
                    fixed_load.max() / fixed_load.mean(),
                    plan.balance,
                    sum(part.tokens_moved for part in homes) * megabytes[0],
                    plan.tokens_moved * megabytes[0],
                    plan.weights_moved * megabytes[1],
                    int((plan.slots >= 0).sum()) / num_ranks,
                    _bound(load, expert_bytes * (num_ranks - 1) / num_ranks / token_bytes) * megabytes[0],
                )
            )
    names = "copies fixed_balance balance fixed_MB tokens_MB weights_MB slots bound_MB".split()
    row: dict[str, Any] = {"model": model, "ranks": num_ranks, "structures": structures, "step_ms": 1e3 * best}
    for site in SITES:
        values = np.array(found[site])
        row[site] = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
        row[site] |= {name: float(values[:, names.index(name)].max()) for name in ("fixed_balance", "balance")}
    return row


def _bound(load: np.ndarray, worth: float) -> float:
    """Copies that no plan can do with less than: each home slot pays, or its copies move; and one slot per expert."""
    nowhere = load.any(axis=0) & (load <= worth).all(axis=0)
    return float(np.minimum(load, worth).sum() + (worth - load.max(axis=0))[nowhere].sum())


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown; per site the worst balance and the mean bytes of a rank."""
    lines = [
        "| model | ranks | structures per rank | site | copies per rank | largest / mean, fixed | planned "
        "| MB moved, fixed | planned (tokens + weights) | of the bound | slots per rank | ms per step |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        for site in SITES:
            found = row[site]
            moved = found["tokens_MB"] + found["weights_MB"]
            lines.append(
                f"| {row['model']} | {row['ranks']} | {row['structures']} | {site} | {found['copies']:,.0f} "
                f"| {found['fixed_balance']:.2f} | {found['balance']:.3f} | {found['fixed_MB']:,.0f} "
                f"| {moved:,.0f} ({found['tokens_MB']:,.0f} + {found['weights_MB']:,.0f}) "
                f"| {moved / found['bound_MB']:.2f} | {found['slots']:.1f} | {row['step_ms']:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run(main))
