"""One training step of the reference package against ours: time and peak memory, in one run on one machine.

    python -m tools.bench.step --reference_python /path/to/environment/bin/python --output step.json

The reference is PyPI `matris` 0.1.0, whose name ours would shadow, so it lives in an environment of its own. First both
sides must agree, from the same weights, on energy, forces, stress, loss and the norm of its weight gradient; then each
side is timed in fresh processes, in turn and back again (A B B A, or A B C C B A with several variants of ours). A step
is: join the graphs into a batch, predict with recorded derivatives, loss of energy, forces and stress, second backward
pass, AdamW (torch's default one for the reference, which has no training code; ours as in a run). Neighbour lists are
made before.
Peak memory is ru_maxrss of the process: interpreter, libraries and everything.
LD_PRELOAD holds for both sides: an allocator such as tcmalloc changes time and memory of both (docs/benchmarks.md).
With --as_launched ours has the allocator that examples/pretrain_matris.sh chooses; the reference, which has no
launcher, runs as it does by default.

    python -m tools.bench.step --reference_python PYTHON --largest 20 --variants default full

looks instead for the largest batch of 8-atom cells whose step stays within so many GiB, on each side. And

    python -m tools.bench.step --without_reference --variants default native

compares variants of ours with each other, from new weights of the same sizes, and needs no other environment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE = "0.1.0"
"""Version of the reference package."""
GPA = 1.0 / 160.21766208  # eV/A^3
WEIGHTS = {"energy": 5.0, "forces": 5.0, "stress": 16.0}  # per eV/atom, eV/A, eV/A^3
TOLERANCE = {"energy": 1e-5, "forces": 1e-4, "stress": 1e-4, "loss": 1e-4, "gradient_norm": 1e-3}
"""Largest difference allowed, relative to the largest value: both sides compute in fp32."""
VARIANTS = ("default", "none", "all", "full", "compiled", "native", "blocks")
"""Ours: as `training` has it by default, with another `training.recompute`, or with other
`training.kernels`, or compiled blocks."""
SYSTEMS = ("nacl", "cells", "tio2", "molecules")
LAUNCHED = ["bash", "-c", 'source "$0"; exec "$@"', str(ROOT / "examples" / "allocator.sh")]
"""Before a command: as examples/pretrain_matris.sh starts it."""


def main(words: list[str] | None = None) -> int:
    """Prints a markdown table, and writes JSON where asked to."""
    from tools.bench.report import BenchHelp, add_output, at_least, write_report  # not where the reference runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    control = parser.add_mutually_exclusive_group(required=True)
    control.add_argument("--reference_python", help="python of an environment with PyPI matris 0.1.0")
    control.add_argument("--without_reference", action="store_true", help="time ours alone, from new weights")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["nacl:1", "nacl:2"],
        help="rock salt (nacl:N, 8 N^3 atoms; cells:N, N structures of 8), rutile (tio2:N, 6 N^3 atoms), or N "
        "molecules of ethanol (molecules:N)",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], help="of ours")
    parser.add_argument("--layers", type=at_least(1), default=6, help="interaction blocks of the released-like model")
    parser.add_argument("--width", type=int, default=128, help="feature width")
    parser.add_argument("--three_body_cutoff", type=float, default=4.5, help="of angles, Angstrom")
    parser.add_argument(
        "--largest", type=float, metavar="GIB", help="find the largest batch of cells within this memory"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=3, help="timed steps of each process, after one that is not timed"
    )
    parser.add_argument("--rounds", type=at_least(1), default=1, help="rounds of A B B A")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    parser.add_argument(
        "--smooth", action="store_true", help="time ours with smooth attention (its default in training)"
    )
    parser.add_argument(
        "--as_launched", action="store_true", help="ours with the allocator of examples/pretrain_matris.sh"
    )
    add_output(parser)
    options = parser.parse_args(words)
    if options.largest is not None and not 0.0 < options.largest < math.inf:
        parser.error(f"--largest is {options.largest:g}: give a memory in GiB, above 0")
    for name in ("systems", "steps", "rounds") if options.largest is not None else ():
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--largest takes one step of so many cells: leave out --{name}")
    try:  # all is refused before any process starts
        if not options.without_reference:
            _check_reference(options.reference_python)
        _our_config(vars(options))
        for system in options.systems:
            _system(system)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as directory:
        work = _Workers(options, Path(directory))
        report = _compare(options, work) if options.largest is None else _largest(options, work)
    print(_table(report) if options.largest is None else _table_of_largest(report))
    write_report(options.output, report)
    return 0


def _check_reference(python: str) -> None:
    """Raises ValueError where this is no Python with the reference package."""
    ask = [shutil.which(python) or "false", "-c", "from importlib.metadata import version; print(version('matris'))"]
    if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() != REFERENCE:
        raise ValueError(
            f"--reference_python {python}: no Python that has PyPI matris {REFERENCE}; make an environment for it "
            f"(python3 -m venv REFERENCE && REFERENCE/bin/pip install matris=={REFERENCE}) and name its python"
        )


class _Workers:
    """Runs one side's share in a fresh process, which gives back what it found."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options, self.directory = options, directory
        self.allocators: dict[str, dict[str, str]] = {}
        """What the environment of each side's processes said of theirs."""

    def __call__(self, side: str, verb: str, system: str, **settings: Any) -> dict[str, Any]:
        options, directory = self.options, self.directory
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = str(options.threads)
        settings |= {"directory": str(directory), "system": system, "threads": options.threads}
        settings |= {"layers": options.layers, "width": options.width, "three_body_cutoff": options.three_body_cutoff}
        python = options.reference_python if side == "reference" else sys.executable
        command = [python, str(Path(__file__).resolve()), "worker", side, verb, json.dumps(settings)]
        if side == "ours" and options.as_launched:
            command = [*LAUNCHED, *command]
        done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"worker {side} {verb} failed:\n{done.stderr}")
        self.allocators[side], found = json.loads(done.stdout.splitlines()[-1])
        return found

    def time(self, side: str, system: str, **settings: Any) -> dict[str, Any]:
        """The reference, or a variant of ours."""
        if side == "reference":
            return self(side, "time", system, **settings)
        return self("ours", "time", system, smooth=self.options.smooth, variant=side, **settings)

    @property
    def facts(self) -> dict[str, Any]:
        """Of a report."""
        options = self.options
        return {
            "threads": options.threads,
            "layers": options.layers,
            "width": options.width,
            "three_body_cutoff": options.three_body_cutoff,
            "smooth": options.smooth,
            "as_launched": options.as_launched,
            "allocators": self.allocators,
        }


def _sides(options: argparse.Namespace) -> list[str]:
    return [*([] if options.without_reference else ["reference"]), *options.variants]


def _largest(options: argparse.Namespace, work: _Workers) -> dict[str, Any]:
    """For each side the largest number of cells within the memory, the memory there and with one cell more."""
    if not options.without_reference:
        work("reference", "predict", "nacl:1")  # leaves the weights of both sides
    results, limit = {}, 1024.0 * options.largest
    for side in _sides(options):
        peaks: dict[int, float] = {}

        def peak(number: int, side: str = side, peaks: dict[int, float] = peaks) -> float:
            if number not in peaks:
                found = work.time(side, f"cells:{number}", steps=1, labelled=False, most_MiB=1.1 * limit)
                peaks[number] = found.get("peak_MiB", math.inf)
                print(f"{side}: {number} cells take {peaks[number]:.0f} MiB", file=sys.stderr)
            return peaks[number]

        fitting, too_many = 2, 1 << 30
        if peak(fitting) > limit:
            raise SystemExit(f"{side}: two cells take more than --largest {options.largest:g} GiB")
        number = 4
        while too_many - fitting > 1:
            before, slope = fitting, (peak(number) - peak(fitting)) / (number - fitting)
            if peak(number) <= limit:
                fitting = number
            else:
                too_many = number
            # Memory is nearly linear in the number, so that a straight line leads close; never far beyond, though.
            guess = int(before + (limit - peak(before)) / max(slope, 1e-3))
            if math.isinf(slope):
                guess = (fitting + too_many) // 2
            number = min(max(guess, fitting + 1), too_many - 1, 4 * fitting)
        more = peaks[too_many]
        one_more = {} if math.isinf(more) else {"one_more_MiB": more}
        results[side] = {"cells": fitting, "peak_MiB": peaks[fitting], **one_more}
    return {**work.facts, "limit_GiB": options.largest, "sides": results}


def _table_of_largest(report: dict[str, Any]) -> str:
    first = next(iter(report["sides"].values()))["cells"]
    lines = [
        f"within {report['limit_GiB']:g} GiB, cells of 8 atoms and 2448 angles",
        "| side | cells | ratio | peak MiB | with one more |",
        "|---|---|---|---|---|",
    ]
    for side, found in report["sides"].items():
        lines.append(
            f"| {side} | {found['cells']} | {found['cells'] / first:.1f} x | {found['peak_MiB']:.0f} | "
            + (f"{found['one_more_MiB']:.0f} |" if "one_more_MiB" in found else "a tenth over the limit and more |")
        )
    return "\n".join(lines)


def _compare(options: argparse.Namespace, work: _Workers) -> dict[str, Any]:
    sides = _sides(options)
    found, versions = [], {}
    for system in options.systems:
        labelled = not options.without_reference  # by the reference, which leaves the weights of both sides too
        expected = work("reference", "predict", system) if labelled else {}
        ours = work("ours", "predict", system, labelled=labelled)
        versions = {side: facts["versions"] for side, facts in {"reference": expected, "ours": ours}.items() if facts}
        difference = {name: _relative(ours[name], expected[name]) for name in TOLERANCE if labelled}
        for name, value in difference.items():
            if not value <= TOLERANCE[name]:
                raise SystemExit(f"{system}: {name} differs by {value:.1e}, allowed {TOLERANCE[name]:.0e}")
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for side in [*sides, *reversed(sides)] * options.rounds:
            print(f"{system}: timing {side}", file=sys.stderr)
            runs[side].append(work.time(side, system, steps=options.steps, labelled=labelled))
        results = {side: _summary(entries) for side, entries in runs.items()}
        control = results[sides[0]]
        for entry in results.values():
            entry["faster"] = control["median_s"] / entry["median_s"]
            entry["memory"] = entry["peak_MiB"] / control["peak_MiB"]
        found.append(
            {
                "system": system,
                "num_atoms": ours["num_atoms"],
                "num_angles": ours["num_angles"],
                "relative_difference": difference,
                "sides": results,
            }
        )
    return {**work.facts, "parameters": ours["num_parameters"], "versions": versions, "systems": found}


def _relative(value: Any, expected: Any) -> float:
    return float(np.abs(np.subtract(value, expected)).max() / np.abs(expected).max())


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    times = [second for result in results for second in result["times_s"]]
    return {
        "times_s": times,
        "median_s": statistics.median(times),
        "spread_s": max(times) - min(times),
        "peak_MiB": max(result["peak_MiB"] for result in results),
        "before_first_step_MiB": max(result["before_first_step_MiB"] for result in results),
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['layers']} layers, width {report['width']}, {report['parameters']} parameters, fp32, "
        f"{report['threads']} threads"
        + (", ours smooth" if report["smooth"] else "")
        + (", ours as launched" if report["as_launched"] else ""),
        *(
            f"allocator of {side}: {' '.join(value for value in allocator.values() if value) or 'of the C library'}"
            for side, allocator in report["allocators"].items()
        ),
        "| system | atoms | angles | side | s per step (median) | spread | peak MiB | faster | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in report["systems"]:
        for side, facts in entry["sides"].items():
            lines.append(
                f"| {entry['system']} | {entry['num_atoms']} | {entry['num_angles']} | {side} | "
                f"{facts['median_s']:.3f} | {facts['spread_s']:.3f} | {facts['peak_MiB']:.0f} | "
                f"{facts['faster']:.2f} x | {facts['memory']:.2f} |"
            )
    for entry in report["systems"]:
        shown = ", ".join(f"{name} {value:.0e}" for name, value in entry["relative_difference"].items())
        lines.append(f"relative differences, {entry['system']}: {shown or 'not compared'}")
    return "\n".join(lines)


# --- workers: each runs in its own process, and prints one line of JSON ---


def worker(side: str, verb: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One side's share: `predict` for the comparison, or `time`."""
    import torch

    torch.set_num_threads(settings["threads"])
    step, facts = (_reference_side if side == "reference" else _our_side)(settings, predict=verb == "predict")
    if verb == "predict":
        return {**facts, "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    before, most = _peak_mib(), settings.get("most_MiB")
    if most is not None:  # beyond it the process fails; without it the system might end others as well
        resource.setrlimit(resource.RLIMIT_DATA, (int(most * 1024**2),) * 2)
    times = []
    for _ in range(settings["steps"] + 1):
        start = time.perf_counter()
        try:
            step()
        except (MemoryError, RuntimeError) as error:
            if most is None or not (isinstance(error, MemoryError) or "allocate memory" in str(error)):
                raise
            return {}
        times.append(time.perf_counter() - start)
    return {"times_s": times[1:], "peak_MiB": _peak_mib(), "before_first_step_MiB": before}


def _peak_mib() -> float:
    """Largest resident size so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def _system(name: str) -> list[dict[str, np.ndarray]]:
    """Rattled structures, and errors that the labels have against the prediction."""
    kind, _, number = name.partition(":")
    if kind not in SYSTEMS or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"system {name!r}: choose nacl:N, cells:N, tio2:N or molecules:N, N from 1")
    count = int(number)
    rng = np.random.default_rng(1)
    number_of = count if kind in ("molecules", "cells") else 1
    return [_structure(kind, count, rng) for _ in range(number_of)]


def _structure(kind: str, repeat: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    numbers, positions, cell = _ETHANOL if kind == "molecules" else _RUTILE if kind == "tio2" else _NACL
    numbers, positions, cell = np.array(numbers), np.array(positions), np.array(cell)
    if kind in ("nacl", "tio2"):
        shifts = np.stack(np.meshgrid(*[np.arange(repeat)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ cell
        positions = (shifts[:, None] + positions).reshape(-1, 3)
        numbers, cell = np.tile(numbers, len(shifts)), cell * repeat
    return {
        "numbers": numbers,
        "positions": positions + rng.normal(0.0, 0.08 if kind in ("nacl", "cells") else 0.05, positions.shape),
        "cell": cell,
        "energy_error": np.array(0.02),  # eV/atom
        "forces_error": rng.normal(0.0, 0.1, positions.shape),  # eV/A
        "stress_error": rng.normal(0.0, 0.002, (3, 3)),  # eV/A^3
    }


_CORNERS = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
_NACL = (
    [11 if sum(corner) % 2 == 0 else 17 for corner in _CORNERS],
    [[2.82 * value for value in corner] for corner in _CORNERS],
    np.eye(3) * 5.64,
)
"""Numbers, positions and cell, A; so are the others."""
_U = 0.305
_RUTILE = (
    [22, 22, 8, 8, 8, 8],
    np.array(
        [[0, 0, 0], [0.5, 0.5, 0.5], [_U, _U, 0], [-_U, -_U, 0], [0.5 + _U, 0.5 - _U, 0.5], [0.5 - _U, 0.5 + _U, 0.5]]
    )
    * [4.594, 4.594, 2.959],
    np.diag([4.594, 4.594, 2.959]),
)
_ETHANOL = (
    [6, 6, 8, 1, 1, 1, 1, 1, 1],
    [
        [1.168, -0.382, 0.0],
        [0.0, 0.560, 0.0],
        [-1.190, -0.215, 0.0],
        [-1.946, 0.381, 0.0],
        [0.043, 1.207, 0.886],
        [0.043, 1.207, -0.886],
        [2.116, 0.145, 0.0],
        [1.129, -1.019, 0.880],
        [1.129, -1.019, -0.880],
    ],
    np.eye(3) * 20.0,
)
"""In a box whose images do not see each other: the reference knows periodic structures only."""


def _finish(optimizer: Any, parameters: list[Any], loss: Any) -> dict[str, float]:
    optimizer.zero_grad()
    loss.backward()
    norm = sum(float(value.grad.double().square().sum()) for value in parameters if value.grad is not None) ** 0.5
    return {"loss": float(loss), "gradient_norm": norm}


def _reference_side(settings: dict[str, Any], *, predict: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    import torch
    from matris.model.model import MatRIS
    from pymatgen.core import Lattice, Structure

    width = settings["width"]
    config = {
        "num_layers": settings["layers"],
        "node_feat_dim": width,
        "edge_feat_dim": width,
        "three_body_feat_dim": width,
        "mlp_hidden_dims": [2 * width, width, width],
        "three_body_expansion": "fourier",
        "norm_type": "layer",
        "three_body_cutoff": settings["three_body_cutoff"],
        "reference_energy": "MPtrj",
    }
    torch.manual_seed(0)
    model = MatRIS(**config)
    checkpoint = Path(settings["directory"]) / "reference.pth.tar"
    if predict:
        torch.save({"config": model.config, "state_dict": model.state_dict()}, checkpoint)
    systems = _system(settings["system"])
    graphs = [
        model.graph_converter(
            Structure(
                Lattice(system["cell"]),
                system["numbers"],
                system["positions"],
                coords_are_cartesian=True,
                to_unit_cell=False,
            )
        )
        for system in systems
    ]
    labels = Path(settings["directory"]) / f"labels_{settings['system']}.npz"
    facts: dict[str, Any] = {}
    if predict:
        result = model(graphs, task="efs")
        energy = result["e"].detach().double().numpy().reshape(-1)
        forces = [value.detach().double().numpy() for value in result["f"]]
        stress = np.stack([value.detach().double().numpy() for value in result["s"]]) * GPA
        np.savez(
            labels,
            energy=energy + np.array([system["energy_error"] for system in systems]),
            forces=np.concatenate([value + system["forces_error"] for value, system in zip(forces, systems)]),  # noqa: B905
            stress=stress + np.stack([system["stress_error"] for system in systems]),
        )
        facts = {"energy": energy.tolist(), "forces": np.concatenate(forces).tolist(), "stress": stress.tolist()}
    if settings.get("labelled", True):
        target = {name: torch.from_numpy(value).float() for name, value in np.load(labels).items()}
    else:
        atoms = sum(len(system["numbers"]) for system in systems)
        shapes = {"energy": (len(systems),), "forces": (atoms, 3), "stress": (len(systems), 3, 3)}
        target = {name: torch.zeros(shape) for name, shape in shapes.items()}
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)

    def loss() -> torch.Tensor:
        result = model(graphs, task="efs", is_training=True)
        return (
            WEIGHTS["energy"] * (result["e"].reshape(-1) - target["energy"]).abs().mean()
            + WEIGHTS["forces"] * (torch.cat(list(result["f"])) - target["forces"]).norm(dim=1).mean()
            + WEIGHTS["stress"] * (torch.stack(list(result["s"])) * GPA - target["stress"]).abs().mean()
        )

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, {**facts, **_finish(optimizer, parameters, loss())} if predict else facts


def _our_side(settings: dict[str, Any], *, predict: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    sys.path.insert(0, str(ROOT))
    import dataclasses
    import warnings

    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import torch

    from janus.ops.fused import use_kernels
    from janus.optim.adamw import AdamWConfig, build_adamw
    from janus.training.memory import keep_freed_memory
    from matris.config import LossConfig
    from matris.exported import num_parameters
    from matris.graph.batch import LabelTotals, collate_graphs, collate_labels
    from matris.graph.build import build_graph
    from matris.graph.structure import Labels, Structure
    from matris.loss import force_matching_loss
    from matris.model import MatRIS

    keep_freed_memory()
    variant = settings.get("variant", "default")
    use_kernels(variant if variant in ("compiled", "native") else "torch", torch.device("cpu"))
    model = _our_model(settings)
    if settings.get("smooth"):
        smooth = MatRIS(dataclasses.replace(model.hyper, smooth_attention=True))
        smooth.load_state_dict(model.state_dict())
        model = smooth
    if variant == "blocks":
        model.compile_blocks(or_plain=False)
    elif variant in ("none", "all", "full"):
        model.set_recompute(variant)
    hyper = model.hyper
    structures = [
        Structure(
            numbers=system["numbers"], positions=system["positions"], cell=system["cell"], pbc=np.ones(3, dtype=bool)
        )
        for system in _system(settings["system"])
    ]
    cutoffs = {"pairwise_cutoff": hyper.pairwise_cutoff, "three_body_cutoff": hyper.three_body_cutoff}
    graphs = [build_graph(structure, **cutoffs) for structure in structures]
    counts = [structure.num_atoms for structure in structures]
    facts: dict[str, Any] = {
        "num_atoms": sum(counts),
        "num_angles": sum(graph.num_angles for graph in graphs),
        "num_parameters": num_parameters(model),
    }
    result = model(collate_graphs(graphs)) if predict else None
    if result is not None:
        facts["energy"] = (result.energy / torch.tensor(counts)).tolist()
        facts["forces"] = result.forces.tolist()
        facts["stress"] = result.stress.tolist()
    if settings.get("labelled", True):
        target = dict(np.load(Path(settings["directory"]) / f"labels_{settings['system']}.npz"))
    else:
        target = {"energy": np.zeros(len(counts)), "forces": np.zeros((sum(counts), 3))}
        target["stress"] = np.zeros((len(counts), 3, 3))
    of_each = np.split(target["forces"], np.cumsum(counts)[:-1])
    labels = collate_labels(
        [
            Labels(energy=float(energy) * count, forces=forces, stress=stress)
            for energy, forces, stress, count in zip(target["energy"], of_each, target["stress"], counts, strict=True)
        ],
        counts,
    )
    number = float(len(counts))
    totals = LabelTotals(
        energy_structures=number,
        forces_structures=number,
        forces_atoms=sum(counts),
        stress_structures=number,
        magmoms_atoms=0.0,
    )
    config = LossConfig(**{f"{name}_weight": weight for name, weight in WEIGHTS.items()})
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = build_adamw(dict(model.named_parameters()), AdamWConfig(weight_decay=1e-2))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def loss() -> torch.Tensor:
        batch = collate_graphs(graphs)
        return force_matching_loss(model(batch, create_graph=True), labels, batch, totals, config).total

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, {**facts, **_finish(optimizer, parameters, loss())} if predict else facts


def _our_model(settings: dict[str, Any]) -> Any:
    """With the weights that the reference left, or where it takes no part with new ones of the same sizes."""
    from matris.exported import load_model
    from matris.model import MatRIS
    from matris.reference import convert_reference

    checkpoint, converted = (Path(settings["directory"]) / name for name in ("reference.pth.tar", "model"))
    if not checkpoint.exists():
        return MatRIS(_our_config(settings), seed=0)
    if not converted.exists():
        convert_reference(checkpoint, converted)
    return load_model(converted)


def _our_config(settings: dict[str, Any]) -> Any:
    """Sizes of the released models. Raises ValueError for sizes that no model has."""
    from matris.config import ModelConfig

    width = settings["width"]
    return ModelConfig(
        num_layers=settings["layers"],
        hidden_size=width,
        three_body_cutoff=settings["three_body_cutoff"],
        readout_hidden_sizes=(2 * width, width, width),
        smooth_attention=False,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        allocator = {name: os.environ.get(name, "") for name in ("LD_PRELOAD", "GLIBC_TUNABLES")}
        print(json.dumps([allocator, worker(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))]))
        sys.exit(0)
    from tools.bench.report import run

    sys.exit(run(main))
