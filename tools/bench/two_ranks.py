"""Primitives of this machine with two pinned gloo ranks, and the step of two ranks predicted from them.

Collectives of many sizes are timed and fitted by a latency and a time per byte (alpha and beta), with weights that make
relative errors count. A step of two ranks is predicted from what a rank computes by itself and from every collective,
whose calls and bytes are known by formula: its calls times alpha and bytes times beta. What a rank computes by itself
is measured on both processors at once with torch's fake process group, which answers collectives at once and without
data: under a tensor axis that is more than half of what one process computes. Nothing is hidden behind computation: on
CPUs the exchange needs the processor that computes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from janus.comm.local import find_port

MODULE = "tools.bench.two_ranks"
ROOT = Path(__file__).resolve().parent.parent.parent
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def primitives(*, largest_mb: float, repeats: int) -> dict[str, Any]:
    """Alpha in s and beta in s per byte that a rank sends, of each collective; FLOP/s and bytes/s of a rank while the
    other does the same."""
    return _on_two_processors("primitives", {"largest_mb": largest_mb, "repeats": repeats})[0]


def _on_two_processors(verb: str, task: dict[str, Any]) -> list[dict[str, Any]]:
    """What two processes of one thread each find, as two ranks of one launch."""
    port = find_port()
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, verb, json.dumps(task)],
            cwd=ROOT,
            env=os.environ | shared | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def fit(sizes: list[float], times: list[float]) -> tuple[float, float]:
    """Alpha and beta of time = alpha + beta size, both at least 0, with the least sum of squared relative errors."""
    size, time_s = np.array(sizes), np.array(times)
    rows = np.stack([1.0 / time_s, size / time_s], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(size)), rcond=None)
    if beta < 0.0:
        return float(1.0 / np.mean(1.0 / time_s)), 0.0
    if alpha < 0.0:
        ratio = size / time_s
        return 0.0, float(ratio.sum() / np.square(ratio).sum())
    return float(alpha), float(beta)


def predict(options: Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Prints what is predicted for a layout, then measures it; one layout after the other.

    Args:
        options: those of tools/bench/parallel.py.
        machine: as `primitives` gives it.
    """
    from tools.bench import parallel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parallel._write_data(folder / "train.xyz", options.repeat, 8 * options.structures)
        control = _median("control", options, folder)
        print(f"two processes that do not communicate: {control:.4f} s per step", flush=True)
        report: dict[str, Any] = {"control_s": control, "layouts": {}}
        for layout in options.layouts:
            alone = _alone(layout, options, folder)
            communication = sum(
                calls * machine["collectives"][key.split("/")[1]]["alpha_s"]
                + alone["wire_bytes"][key] * machine["collectives"][key.split("/")[1]]["beta_s_per_byte"]
                for key, calls in alone["calls"].items()
            )
            predicted = alone["computing_s"] + communication
            print(f"{layout:<12} predicted {predicted:.4f} s ({communication:.4f} s of it sent)", flush=True)
            measured = _median(layout, options, folder)  # at once, for the machine's speed drifts
            difference = measured / predicted - 1.0
            print(f"{layout:<12} measured  {measured:.4f} s, {100 * difference:+.1f} %", flush=True)
            report["layouts"][layout] = {
                "predicted_s": predicted,
                "measured_s": measured,
                "difference": difference,
                **{key: alone[key] for key in ("computing_s", "calls", "wire_bytes")},
            }
        # Whether the machine was the same all the time.
        report["control_again_s"] = _median("control", options, folder)
        print(f"control again: {report['control_again_s']:.4f} s per step")
    return report


def _median(name: str, options: Namespace, folder: Path) -> float:
    from tools.bench import parallel

    return _median_of_slower(parallel._two_processes(name, options, folder))


def _median_of_slower(results: list[dict[str, Any]]) -> float:
    return statistics.median(map(max, zip(*(result["times_s"] for result in results), strict=True)))


def _alone(layout: str, options: Namespace, folder: Path) -> dict[str, Any]:
    """Of a step in which every collective is answered at once: seconds, and calls and bytes by formula."""
    sizes = {key: getattr(options, key) for key in ("layers", "width", "structures", "steps")}
    ranks = _on_two_processors("alone", {"layout": layout, "folder": str(folder), **sizes})
    return ranks[0] | {"computing_s": _median_of_slower(ranks)}


# A rank ---------------------------------------------------------------------------------------------------------------


def _work(verb: str, task: dict[str, Any]) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[int(os.environ["RANK"]) % len(cpus)]})
    return _times_of_primitives(task) if verb == "primitives" else _step_alone(task)


def _step_alone(task: dict[str, Any]) -> dict[str, Any]:
    import ase.io
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from janus.mesh import open_mesh
    from janus.training.step import accumulate_gradients
    from matris.config import ModelConfig
    from matris.graph.batch import LabelTotals
    from matris.layouts import parse_layout
    from tools.bench.fake_ranks import by_formula, micro_batch, task_and_learner

    torch.set_num_threads(1)
    layout, hyper = parse_layout(task["layout"]), ModelConfig(num_layers=task["layers"], hidden_size=task["width"])
    dist.init_process_group("fake", store=FakeStore(), rank=int(os.environ["RANK"]), world_size=2)
    with open_mesh("cpu", watched=False, shard=layout.shard, graph=layout.graph, tensor=layout.tensor) as mesh:
        learned, learner = task_and_learner(hyper, mesh, layout.policy)
        structures = 2 * task["structures"]
        frames = ase.io.read(
            f"{task['folder']}/train.xyz", index=f":{structures // (mesh.data.size * mesh.shard.size)}"
        )
        batch = micro_batch(frames, hyper, num_parts=mesh.graph.size, part=mesh.graph.rank)
        totals = LabelTotals(
            energy_structures=structures,
            forces_structures=structures,
            forces_atoms=float(batch.graph.num_atoms),
            stress_structures=structures,
            magmoms_atoms=0.0,
        )
        times = []
        for _ in range(1 + task["steps"]):
            start = time.perf_counter()
            learner.zero_gradients()
            accumulate_gradients(learned, [batch], totals, learner)
            learner.sum_gradients()
            learner.clip()
            learner.update()
            times.append(time.perf_counter() - start)
        traffic = by_formula(hyper, mesh, layout.policy, batch.graph, micro_batches=1)
    return {"times_s": times[1:], "calls": dict(traffic.calls), "wire_bytes": dict(traffic.wire_bytes)}


def _times_of_primitives(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from janus.comm.adjoint import reduce
    from janus.comm.collectives import reduce_max, start_all_gather, start_all_to_all, start_reduce_scatter
    from janus.mesh import open_mesh
    from janus.telemetry.peak import measured_rate

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    with open_mesh("cpu", watched=False) as mesh, torch.no_grad():
        axis = mesh.replicas

        def best(function: Callable[[], Any]) -> float:
            found = []
            for _ in range(1 + task["repeats"]):
                reduce_max(0.0, mesh)
                start = time.perf_counter()
                function()
                found.append(time.perf_counter() - start)
            # Communication takes part of whole steps, so the usual time counts and not the best.
            return statistics.median(found[1:])

        most = int(250_000 * task["largest_mb"])
        counts = [number for number in (16, 256, 4096, 65_536, 1_048_576, 4_194_304) if number <= most] or [most]
        collectives = {}
        for name in COLLECTIVES:
            sent, times = [], []
            for count in counts:
                whole, piece = torch.ones(count), torch.ones(count // 2)
                ways: dict[str, Callable[[], Any]] = {
                    "all_reduce": lambda whole=whole: reduce(whole, axis),
                    "all_gather": lambda piece=piece: start_all_gather(piece, axis).wait(),
                    "reduce_scatter": lambda whole=whole: start_reduce_scatter(whole, axis).wait(),
                    # Rows for the other rank alone.
                    "all_to_all": lambda whole=whole: start_all_to_all(
                        whole,
                        axis,
                        send=[0, len(whole)] if axis.rank == 0 else [len(whole), 0],
                        receive=[0, len(whole)] if axis.rank == 0 else [len(whole), 0],
                    ).wait(),
                }
                mesh.ledger.clear()
                ways[name]()
                sent.append(sum(mesh.ledger.wire_bytes.values()))
                times.append(best(ways[name]))
            alpha, beta = fit(sent, times)
            collectives[name] = {"alpha_s": alpha, "beta_s_per_byte": beta, "bytes": sent, "seconds": times}
        reduce_max(0.0, mesh)
        rate, _ = measured_rate(cpu, "fp32")
        reduce_max(0.0, mesh)
        b, c = (torch.ones(16_000_000) for _ in range(2))
        a = torch.empty_like(b)
        triad = 3 * a.nbytes / best(lambda: torch.add(b, c, alpha=3.0, out=a))
    return {"collectives": collectives, "fp32_flops_per_s": rate, "triad_bytes_per_s": triad}


if __name__ == "__main__":
    print(json.dumps(_work(sys.argv[1], json.loads(sys.argv[2]))))
