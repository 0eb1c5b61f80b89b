"""How far each part of a training step is from what this machine can do: time, FLOPs, bytes, and the bound they give.

    OMP_NUM_THREADS=1 python -m tools.bench.roofline --preset m --cells 2 --output roofline.json
    OMP_NUM_THREADS=1 python -m tools.bench.roofline --preset m --cells 2 --ranks 2 --output roofline2.json
    python -m tools.bench.roofline --preset l --data train.h5 --structures 32 --device cuda --precision tf32

First the machine is measured: FLOP/s of large matrix products, bytes/s of a triad (a = b + s c on arrays that no cache
holds), and with several ranks bytes/s of an all-reduce, an all-gather and an all-to-all of a large message. Then steps
are taken, a rank with a batch of its own: rock salt of so many cells along each axis, or structures of a data set.

FLOPs are those of matrix products, bytes those that these products and the update move if each operand is read once and
each result written once (`matris.cost`); a graph's bytes are those of the batch. A part's bound is the larger of FLOPs
over the rate and bytes over the bandwidth; a pass has the sum over its parts. Parts of the forward pass are timed from
the begin to the end of their modules, `geometry` is the rest; what is element-wise takes time and has no bound, so a
share says what products leave to be gained. The force pass includes its sums per structure, the second backward pass
the loss. Ranks meet before they communicate, so none waits for another there. Medians over steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase.build import bulk

from janus.comm.adjoint import reduce
from janus.comm.collectives import reduce_max, start_all_gather, start_all_to_all
from janus.comm.local import find_port
from janus.mesh import Mesh, open_mesh
from janus.ops.fused import use_kernels
from janus.telemetry import Stopwatch
from janus.telemetry.peak import Format, measured_rate
from janus.training.learner import Learner
from janus.training.memory import keep_freed_memory
from matris.config import LossConfig, Precision
from matris.cost import Counts, Derivatives, Part, bytes_by_part, flops_by_part, update_bytes
from matris.data.dataset import Collate, MicroBatch, open_dataset
from matris.data.records import Sample
from matris.graph.batch import GraphBatch, LabelTotals
from matris.graph.structure import Labels, Structure
from matris.loss import force_matching_loss
from matris.model import RECOMPUTE_BYTES, MatRIS
from matris.precision import set_precision
from matris.presets import PRESETS
from tools.bench.learner import learner_of
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report
from tools.bench.report import machine as this_machine

FORMATS: dict[str, tuple[Format, int]] = {
    "fp64": ("fp64", 8),
    "fp32": ("fp32", 4),
    "tf32": ("tf32", 4),
    "bf16-mixed": ("bf16", 2),
}
"""Format of most products and bytes of an element, by precision."""
LOSS = LossConfig(magmoms_weight=0.0)
GRAPH, FORCE, SECOND, OPTIMIZER, COMMUNICATION = (
    "graph",
    "force pass",
    "second backward",
    "optimizer",
    "communication",
)


def main(words: list[str] | None = None) -> int:
    """Prints a table, and writes JSON where asked to."""
    words = sys.argv[1:] if words is None else words
    options = parsed(words)
    if options.worker:
        with open_mesh(options.device) as mesh:
            report = measure(options, mesh)
        if mesh.is_main:
            print(json.dumps(report))
        return 0
    report = _of_ranks(options.ranks, words) if options.ranks > 1 else _alone(options)
    print(_table(report))
    write_report(options.output, report)
    return 0


def parsed(words: list[str]) -> argparse.Namespace:
    """The options; ends the program where they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--preset", choices=PRESETS, default="m", help="of the model")
    parser.add_argument("--precision", choices=FORMATS, default="fp32", help="as in `training`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all ranks")
    parser.add_argument("--cells", type=at_least(1), default=2, help="of rock salt along each axis, 8 n^3 atoms")
    parser.add_argument("--data", nargs="+", help="structures in place of rock salt")
    parser.add_argument("--structures", type=at_least(1), help="of the data, for each rank (default: 8)")
    parser.add_argument("--cache_dir", help="of what is prepared (default: ~/.cache/janus-matris)")
    policies, kernels = ("none", "selective", "all", "full"), ("torch", "compiled", "native", "triton")
    parser.add_argument("--recompute", choices=policies, default="selective", help="as in `training`")
    parser.add_argument("--kernels", choices=kernels, default="torch", help="as in `training`")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of a rank on CPU")
    parser.add_argument("--ranks", type=at_least(1), default=1, help="processes that share the sum of the gradients")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed ones, after one that is not")
    parser.add_argument("--triad_mb", type=at_least(1), default=256, help="of each of three arrays")
    parser.add_argument("--message_mb", type=at_least(1), default=64, help="of the collectives")
    add_output(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    for name in ("structures", "cache_dir"):
        if options.data is None and getattr(options, name) is not None:
            parser.error(f"--{name} belongs to --data: give that, or leave --{name} out")
    options.structures = options.structures or 8
    return options


def _alone(options: argparse.Namespace) -> dict[str, Any]:
    with open_mesh(options.device) as mesh:
        return measure(options, mesh)


def _of_ranks(count: int, words: list[str]) -> dict[str, Any]:
    """What the first of so many processes on this machine found, each on a CPU of its own where there are enough."""
    port = find_port()
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tools.bench.roofline", *words, "--worker"]
    processes = []
    for rank in range(count):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; see above")
    report: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return report


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """The machine, the batch, and every part of a step. All ranks call it."""
    device = mesh.device
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if mesh.world_size > 1 and len(cpus) >= mesh.world_size * options.threads:
            os.sched_setaffinity(0, cpus[mesh.rank * options.threads :][: options.threads])
    keep_freed_memory()
    set_precision(options.precision, device)
    use_kernels(options.kernels, device)
    machine = _machine(options, mesh)
    model = MatRIS(PRESETS[options.preset], precision=Precision(options.precision), seed=0, mesh=mesh).to(device)
    model.recompute_bytes = {"none": None, "selective": RECOMPUTE_BYTES, "all": 0, "full": 0}[options.recompute]
    model.recompute_blocks = options.recompute == "full"
    model.predicts_magmoms = False
    learner = learner_of(model)
    samples, task_names = _samples(options, mesh)
    collate = Collate(
        pairwise_cutoff=model.hyper.pairwise_cutoff,
        three_body_cutoff=model.hyper.three_body_cutoff,
        task_names=task_names,
    )
    clock = _Clock(model)
    steps = [_step(clock, lambda: collate(samples), model, learner, mesh) for _ in range(1 + options.steps)][1:]
    clock.remove()
    seconds = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    batch = collate(samples)
    parts = _parts(options, model, learner, batch, seconds, machine)
    return {
        "preset": options.preset,
        "precision": options.precision,
        "recompute": options.recompute,
        "kernels": options.kernels,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": machine,
        "batch": vars(_counts(batch.graph)),
        "parts": parts,
        "step": _whole(parts, machine),
    }


def _machine(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    device = mesh.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else this_machine()["processor"]
    own = FORMATS[options.precision][0]
    rates = {kind: measured_rate(device, kind)[0] for kind in dict.fromkeys((own, "fp32", "fp64"))}
    host = torch.device("cpu")
    return {
        "device": name,
        "ranks": mesh.world_size,
        "threads": torch.get_num_threads(),
        "flops_per_s": rates,
        "bytes_per_s": _triad(device, options.triad_mb),
        "host_bytes_per_s": _triad(host, options.triad_mb),
        "collectives_bytes_per_s": _collectives(mesh, options.message_mb) if mesh.world_size > 1 else {},
    }


def _triad(device: torch.device, megabytes: int) -> float:
    """Bytes/s that are read and written, the best of five."""
    b, c = (torch.ones(megabytes * 250_000, device=device) for _ in range(2))
    a = torch.empty_like(b)
    return 3 * a.nbytes / _best(lambda: torch.add(b, c, alpha=3.0, out=a), device, 5)


def _collectives(mesh: Mesh, megabytes: int) -> dict[str, float]:
    """Bytes/s of the whole message: what is summed, what everyone has after it, what a rank sends, to itself too."""
    axis, device = mesh.replicas, mesh.device
    piece = torch.ones(megabytes * 250_000 // axis.size, device=device)
    whole = torch.ones(len(piece) * axis.size, device=device)
    rows = [len(piece)] * axis.size
    ways: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: reduce(whole, axis),
        "all_gather": lambda: start_all_gather(piece, axis).wait(),
        "all_to_all": lambda: start_all_to_all(whole, axis, send=rows, receive=rows).wait(),
    }
    with torch.no_grad():
        return {
            name: whole.nbytes / _best(way, device, 3, meet=lambda: reduce_max(0.0, mesh)) for name, way in ways.items()
        }


def _best(
    function: Callable[[], Any], device: torch.device, times: int, meet: Callable[[], Any] | None = None
) -> float:
    """Seconds, after one that does not count."""
    found = []
    for _ in range(1 + times):
        if meet is not None:
            meet()
        _synchronize(device)
        watch = Stopwatch(device)
        function()
        watch.stop()
        found.append(watch.seconds())
    return min(found[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _samples(options: argparse.Namespace, mesh: Mesh) -> tuple[list[Sample], tuple[str, ...]]:
    """Structures of this rank, and the levels of theory of their labels."""
    if not options.data:
        return [_rock_salt(options.cells, seed=mesh.rank)], ("default",)
    hyper = PRESETS[options.preset]
    dataset = open_dataset(
        options.data,
        pairwise_cutoff=hyper.pairwise_cutoff,
        three_body_cutoff=hyper.three_body_cutoff,
        cache_dir=options.cache_dir,
    )
    chosen = np.random.default_rng(0).permutation(len(dataset))[mesh.rank :: mesh.world_size][: options.structures]
    return [dataset[int(index)] for index in chosen], dataset.task_names


def _rock_salt(cells: int, seed: int) -> Sample:
    """Rattled NaCl with labels of zero."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=seed)
    labels = Labels(energy=0.0, forces=np.zeros((len(atoms), 3)), stress=np.zeros((3, 3)))
    return Sample(identifier="NaCl", structure=Structure.from_atoms(atoms), labels=labels)


class _Clock:
    """Times the modules of a forward pass, up to the end of the readout."""

    def __init__(self, model: MatRIS) -> None:
        self._device = model.mesh.device
        self._running: list[Stopwatch] = []
        self._times: list[tuple[Part, Stopwatch]] = []
        self._until_readout: Stopwatch | None = None
        self.force: Stopwatch | None = None
        of_block = {
            "line_attention": Part.line_attention,
            "atom_attention": Part.atom_attention,
            "line_refinement": Part.line_refinement,
            "atom_refinement": Part.atom_refinement,
        }
        parts = [(getattr(block, name), part) for block in model.blocks for name, part in of_block.items()]
        embeddings = (model.atom_embedding, model.task_embedding, model.edge_embedding, model.angle_embedding)
        parts += [(module, Part.embedding) for module in embeddings if module is not None]
        parts += [(model.readout, Part.readout)]
        self._handles = []
        for module, part in parts:
            self._handles.append(module.register_forward_pre_hook(lambda *_: self._enter()))
            self._handles.append(module.register_forward_hook(lambda *_, part=part: self._leave(part)))

    def start(self) -> None:
        """At the beginning of the forward pass."""
        self._times.clear()
        self.force, self._until_readout = None, Stopwatch(self._device)

    def seconds(self) -> dict[str, float]:
        """Of each part of the forward pass."""
        assert self._until_readout is not None
        found = dict.fromkeys((part.value for part in Part), 0.0)
        for part, watch in self._times:
            found[part.value] += watch.seconds()
        found[Part.geometry.value] = self._until_readout.seconds() - sum(found.values())
        return found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self) -> None:
        if self.force is None:
            self._running.append(Stopwatch(self._device))

    def _leave(self, part: Part) -> None:
        if self.force is not None:  # a backward pass that computes it again
            return
        watch = self._running.pop()
        watch.stop()
        self._times.append((part, watch))
        if part is Part.readout:
            assert self._until_readout is not None
            self._until_readout.stop()
            self.force = Stopwatch(self._device)


def _step(
    clock: _Clock, collate: Callable[[], MicroBatch], model: MatRIS, learner: Learner, mesh: Mesh
) -> dict[str, float]:
    """Seconds of each part of a step."""
    device = mesh.device
    learner.zero_gradients()
    _synchronize(device)
    begin = time.perf_counter()
    on_host = collate()
    graph_seconds = time.perf_counter() - begin
    batch = on_host.to(device)
    totals = LabelTotals.of([(batch.graph, batch.labels)])
    derivatives = _derivatives(batch)
    with learner.weights.run(training=True):
        _synchronize(device)
        clock.start()
        prediction = model(batch.graph, forces=derivatives.forces, stress=derivatives.stress, create_graph=True)
        assert clock.force is not None
        clock.force.stop()
        second = Stopwatch(device)
        loss = force_matching_loss(prediction, batch.labels, batch.graph, totals, LOSS)
        loss.total.backward(inputs=learner.weights.leaves)
        second.stop()
    seconds = {GRAPH: graph_seconds} | clock.seconds() | {FORCE: clock.force.seconds(), SECOND: second.seconds()}
    if mesh.world_size > 1:
        reduce_max(0.0, mesh)  # all meet
        communication = Stopwatch(device)
        learner.sum_gradients()
        communication.stop()
        seconds[COMMUNICATION] = communication.seconds()
    else:
        learner.sum_gradients()
    update = Stopwatch(device)
    learner.clip()
    learner.update()
    update.stop()
    return seconds | {OPTIMIZER: update.seconds()}


def _derivatives(batch: MicroBatch) -> Derivatives:
    """That the labels ask for."""
    return Derivatives(forces=bool(batch.labels.forces_mask.any()), stress=bool(batch.labels.stress_mask.any()))


def _counts(graph: GraphBatch) -> Counts:
    return Counts(
        structures=graph.num_structures,
        atoms=graph.num_atoms,
        edges=graph.num_edges,
        undirected=graph.num_undirected,
        angles=graph.num_angles,
    )


def _parts(
    options: argparse.Namespace,
    model: MatRIS,
    learner: Learner,
    batch: MicroBatch,
    seconds: dict[str, float],
    machine: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each part that was timed."""
    counts, derivatives = _counts(batch.graph), _derivatives(batch)
    products, itemsize = FORMATS[options.precision]
    flops = flops_by_part(model.hyper, counts, derivatives)
    moved = bytes_by_part(model.hyper, counts, derivatives, itemsize=itemsize)
    bandwidth = machine["bytes_per_s"]

    def bound(part: Part, name: str) -> float:
        rate = machine["flops_per_s"]["fp64" if part is Part.geometry else products]
        return max(getattr(flops[part], name) / rate, getattr(moved[part], name) / bandwidth)

    def of_pass(name: str) -> tuple[int, int, float]:
        return (
            sum(getattr(value, name) for value in flops.values()),
            sum(getattr(value, name) for value in moved.values()),
            sum(bound(part, name) for part in Part),
        )

    graph_bytes = sum(value.nbytes for value in vars(batch.graph).values() if isinstance(value, torch.Tensor))
    held = [value for value in learner.parameters.values() if value.requires_grad]
    gradient_bytes = sum(value.nbytes for value in held)
    update = update_bytes(sum(value.numel() for value in held), itemsize=held[0].itemsize)
    rows = {
        GRAPH: (0, graph_bytes, graph_bytes / machine["host_bytes_per_s"]),
        **{part.value: (flops[part].forward, moved[part].forward, bound(part, "forward")) for part in Part},
        FORCE: of_pass("force"),
        SECOND: of_pass("second"),
        OPTIMIZER: (0, update, update / bandwidth),
    }
    if COMMUNICATION in seconds:
        rows[COMMUNICATION] = 0, gradient_bytes, gradient_bytes / machine["collectives_bytes_per_s"]["all_reduce"]
    return [
        {
            "part": name,
            "seconds": seconds[name],
            "flops": number,
            "bytes": size,
            "bound_s": least,
            "share_of_bound": least / seconds[name] if seconds[name] > 0.0 else 0.0,
        }
        for name, (number, size, least) in rows.items()
    ]


def _whole(parts: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    totals = {name: sum(part[name] for part in parts) for name in ("seconds", "flops", "bytes", "bound_s")}
    rate = next(iter(machine["flops_per_s"].values()))
    return {
        "part": "step",
        **totals,
        "share_of_bound": totals["bound_s"] / totals["seconds"],
        "share_of_peak": totals["flops"] / totals["seconds"] / rate,
    }


def _table(report: dict[str, Any]) -> str:
    machine, batch = report["machine"], report["batch"]
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s {kind}" for kind, rate in machine["flops_per_s"].items())
    lines = [
        f"{machine['device']}, {machine['ranks']} ranks of {machine['threads']} threads, torch {torch.__version__}: "
        f"{rates}, {machine['bytes_per_s'] / 1e9:.3g} GB/s",
        *(f"{name}: {rate / 1e9:.3g} GB/s" for name, rate in machine["collectives_bytes_per_s"].items()),
        f"preset {report['preset']}, {report['precision']}, recompute {report['recompute']}"
        f", kernels {report['kernels']}, {report['parameters']} parameters; "
        f"on a rank {batch['atoms']} atoms, {batch['edges']} edges, "
        f"{batch['angles']} angles",
        "",
        "| part | ms | GFLOP | MB | bound, ms | share of bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in (*report["parts"], report["step"]):
        lines.append(
            f"| {row['part']} | {1e3 * row['seconds']:.3g} | {row['flops'] / 1e9:.4g} | {row['bytes'] / 1e6:.4g} | "
            f"{1e3 * row['bound_s']:.3g} | {100.0 * row['share_of_bound']:.2g} % |"
        )
    lines += ["", f"share of peak by formula: {100.0 * report['step']['share_of_peak']:.3g} %"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
