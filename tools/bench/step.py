"""One training step of the reference package against ours: time and peak memory, in one run on one machine.

    python tools/bench/step.py --reference_python /path/to/environment/bin/python --output step.json

The reference is PyPI `matris` 0.1.0, whose name ours would shadow, so it lives in an environment of its own. First both
sides must agree, from the same weights, on energy, forces, stress, loss and the norm of its weight gradient; then each
side is timed in fresh processes in the order A B B A. A step is: join the graphs into a batch, predict with recorded
derivatives, loss of energy, forces and stress, second backward pass, AdamW (torch's default one for the reference,
which has no training code; ours as in a run). Neighbour lists are made before.
Peak memory is ru_maxrss of the process: interpreter, libraries and everything.
LD_PRELOAD holds for both sides: an allocator such as tcmalloc changes time and memory of both (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
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
GPA = 1.0 / 160.21766208  # eV/A^3
WEIGHTS = {"energy": 5.0, "forces": 5.0, "stress": 16.0}  # per eV/atom, eV/A, eV/A^3
TOLERANCE = {"energy": 1e-5, "forces": 1e-4, "stress": 1e-4, "loss": 1e-4, "gradient_norm": 1e-3}
"""Largest difference allowed, relative to the largest value: both sides compute in fp32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_python", required=True, help="python of an environment with PyPI matris 0.1.0")
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=[1, 2], help="NaCl cells along each axis (8 n^3 atoms)"
    )
    parser.add_argument("--layers", type=int, default=6, help="interaction blocks of the released-like model")
    parser.add_argument("--width", type=int, default=128, help="feature width")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process, after one that is not timed")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of A B B A")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--smooth", action="store_true", help="time ours with smooth attention (its default in training)"
    )
    parser.add_argument("--compile", action="store_true", help="ours with training.kernels compiled")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: no directory {options.output.parent}")
    with tempfile.TemporaryDirectory() as directory:
        report = _compare(options, Path(directory))
    print(_table(report))
    if options.output is not None:
        partial = options.output.with_name(options.output.name + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, options.output)
    return 0


def _compare(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    pythons = {"reference": options.reference_python, "ours": sys.executable}

    def work(side: str, verb: str, repeat: int, **settings: Any) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["OMP_NUM_THREADS"] = str(options.threads)
        settings |= {"directory": str(directory), "repeat": repeat, "threads": options.threads}
        settings |= {"layers": options.layers, "width": options.width}
        command = [pythons[side], str(Path(__file__).resolve()), "worker", side, verb, json.dumps(settings)]
        done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"worker {side} {verb} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    sizes = []
    for repeat in options.repeats:
        expected, ours = work("reference", "predict", repeat), work("ours", "predict", repeat)
        difference = {name: _relative(ours[name], expected[name]) for name in TOLERANCE}
        for name, value in difference.items():
            if not value <= TOLERANCE[name]:
                raise SystemExit(f"{8 * repeat**3} atoms: {name} differs by {value:.1e}, allowed {TOLERANCE[name]:.0e}")
        runs: dict[str, list[dict[str, Any]]] = {"reference": [], "ours": []}
        for side in ("reference", "ours", "ours", "reference") * options.rounds:
            print(f"{8 * repeat**3} atoms: timing {side}", file=sys.stderr)
            smooth = options.smooth and side == "ours"
            compiled = options.compile and side == "ours"
            runs[side].append(work(side, "time", repeat, steps=options.steps, smooth=smooth, compile=compiled))
        sides = {side: _summary(results) for side, results in runs.items()}
        sizes.append(
            {
                "num_atoms": 8 * repeat**3,
                "num_angles": ours["num_angles"],
                "relative_difference": difference,
                **sides,
                "speedup": sides["reference"]["median_s"] / sides["ours"]["median_s"],
                "memory_ratio": sides["ours"]["peak_MiB"] / sides["reference"]["peak_MiB"],
            }
        )
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "threads": options.threads,
        "layers": options.layers,
        "width": options.width,
        "parameters": ours["num_parameters"],
        "smooth": options.smooth,
        "compiled": options.compile,
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "versions": {"reference": expected["versions"], "ours": ours["versions"]},
        "sizes": sizes,
    }


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
        + (", ours compiled" if report["compiled"] else "")
        + (f", both with {report['preloaded']}" if report["preloaded"] else ""),
        "| atoms | angles | side | s per step (median) | spread | peak MiB | faster | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        for side in ("reference", "ours"):
            facts = size[side]
            last = f"{size['speedup']:.2f} x | {size['memory_ratio']:.2f}" if side == "ours" else " | "
            lines.append(
                f"| {size['num_atoms']} | {size['num_angles']} | {side} | {facts['median_s']:.3f} | "
                f"{facts['spread_s']:.3f} | {facts['peak_MiB']:.0f} | {last} |"
            )
    for size in report["sizes"]:
        shown = ", ".join(f"{name} {value:.0e}" for name, value in size["relative_difference"].items())
        lines.append(f"relative differences, {size['num_atoms']} atoms: {shown}")
    return "\n".join(lines)


# --- workers: each runs in its own process, and prints one line of JSON ---


def worker(side: str, verb: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One side's share: `predict` for the comparison, or `time`."""
    import torch

    torch.set_num_threads(settings["threads"])
    step, facts = (_reference_side if side == "reference" else _our_side)(settings, predict=verb == "predict")
    if verb == "predict":
        return {**facts, "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    before = _peak_mib()
    times = []
    for _ in range(settings["steps"] + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"times_s": times[1:], "peak_MiB": _peak_mib(), "before_first_step_MiB": before}


def _peak_mib() -> float:
    """Largest resident size so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def _system(repeat: int) -> dict[str, np.ndarray]:
    """Rattled rocksalt NaCl, (2 repeat)^3 atoms, and errors that the labels have against the prediction."""
    length = 5.64
    corners = np.stack(np.meshgrid(*[np.arange(2 * repeat)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    rng = np.random.default_rng(1)
    count = len(corners)
    return {
        "numbers": np.where(corners.sum(axis=1) % 2 == 0, 11, 17),
        "positions": corners * length / 2 + rng.normal(0.0, 0.08, (count, 3)),
        "cell": np.eye(3) * length * repeat,
        "energy_error": np.array(0.02),  # eV/atom
        "forces_error": rng.normal(0.0, 0.1, (count, 3)),  # eV/A
        "stress_error": rng.normal(0.0, 0.002, (3, 3)),  # eV/A^3
    }


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
        "three_body_cutoff": 4.5,
        "reference_energy": "MPtrj",
    }
    torch.manual_seed(0)
    model = MatRIS(**config)
    checkpoint = Path(settings["directory"]) / "reference.pth.tar"
    if predict:
        torch.save({"config": model.config, "state_dict": model.state_dict()}, checkpoint)
    system = _system(settings["repeat"])
    structure = Structure(
        Lattice(system["cell"]), system["numbers"], system["positions"], coords_are_cartesian=True, to_unit_cell=False
    )
    graph = model.graph_converter(structure)
    labels = Path(settings["directory"]) / f"labels{settings['repeat']}.npz"
    facts: dict[str, Any] = {}
    if predict:
        result = model([graph], task="efs")
        values = {
            "energy": result["e"].detach().double().numpy(),
            "forces": result["f"][0].detach().double().numpy(),
            "stress": result["s"][0].detach().double().numpy() * GPA,
        }
        np.savez(labels, **{name: value + system[f"{name}_error"] for name, value in values.items()})
        facts = {name: value.tolist() for name, value in values.items()}
    target = {name: torch.from_numpy(value).float() for name, value in np.load(labels).items()}
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)

    def loss() -> torch.Tensor:
        result = model([graph], task="efs", is_training=True)
        return (
            WEIGHTS["energy"] * (result["e"] - target["energy"]).abs().mean()
            + WEIGHTS["forces"] * (result["f"][0] - target["forces"]).norm(dim=1).mean()
            + WEIGHTS["stress"] * (result["s"][0] * GPA - target["stress"]).abs().mean()
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
    from matris.exported import load_model, num_parameters
    from matris.graph.batch import LabelTotals, collate_graphs, collate_labels
    from matris.graph.build import build_graph
    from matris.graph.structure import Labels, Structure
    from matris.loss import force_matching_loss
    from matris.model import MatRIS
    from matris.reference import convert_reference

    keep_freed_memory()
    use_kernels("compiled" if settings.get("compile", False) else "torch", torch.device("cpu"))
    directory = Path(settings["directory"])
    if not (directory / "model").exists():
        convert_reference(directory / "reference.pth.tar", directory / "model")
    model = load_model(directory / "model")
    if settings.get("smooth"):
        smooth = MatRIS(dataclasses.replace(model.hyper, smooth_attention=True))
        smooth.load_state_dict(model.state_dict())
        model = smooth
    system = _system(settings["repeat"])
    structure = Structure(
        numbers=system["numbers"], positions=system["positions"], cell=system["cell"], pbc=np.ones(3, dtype=bool)
    )
    hyper = model.hyper
    graph = build_graph(structure, pairwise_cutoff=hyper.pairwise_cutoff, three_body_cutoff=hyper.three_body_cutoff)
    count = structure.num_atoms
    facts: dict[str, Any] = {"num_angles": graph.num_angles, "num_parameters": num_parameters(model)}
    if predict:
        result = model(collate_graphs([graph]))
        facts["energy"] = (result.energy / count).tolist()
        facts["forces"] = result.forces.tolist()
        facts["stress"] = result.stress[0].tolist()
    target = np.load(directory / f"labels{settings['repeat']}.npz")
    labels = collate_labels(
        [Labels(energy=float(target["energy"][0]) * count, forces=target["forces"], stress=target["stress"])], [count]
    )
    totals = LabelTotals(
        energy_structures=1.0, forces_structures=1.0, forces_atoms=count, stress_structures=1.0, magmoms_atoms=0.0
    )
    config = LossConfig(**{f"{name}_weight": weight for name, weight in WEIGHTS.items()})
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = build_adamw(dict(model.named_parameters()), AdamWConfig(weight_decay=1e-2))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def loss() -> torch.Tensor:
        batch = collate_graphs([graph])
        return force_matching_loss(model(batch, create_graph=True), labels, batch, totals, config).total

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, {**facts, **_finish(optimizer, parameters, loss())} if predict else facts


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(worker(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))))
        sys.exit(0)
    sys.exit(main())
