"""Primitives of this machine with two pinned gloo ranks, and the step of two ranks predicted from them.

Collectives of many sizes are timed and fitted by a latency and a time per byte (alpha and beta), with weights that make
relative errors count. A step of two ranks is predicted as that of two processes that do not communicate, which is
measured, and for every collective, whose calls and bytes are known by formula, its calls times alpha and bytes times
beta. Nothing is hidden behind computation: on CPUs the exchange needs the processor that computes.
"""

from __future__ import annotations

import json
import os
import socket
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

MODULE = "tools.bench.two_ranks"
ROOT = Path(__file__).resolve().parent.parent.parent
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def primitives(*, largest_mb: float, repeats: int) -> dict[str, Any]:
    """Alpha in s and beta in s per byte that a rank sends, of each collective; FLOP/s and bytes/s of a rank while the
    other does the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    task = json.dumps({"largest_mb": largest_mb, "repeats": repeats})
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, task],
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
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


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
    """Prints what is predicted for each layout, then measures it.

    Args:
        options: those of tools/bench/parallel.py.
        machine: as `primitives` gives it.
    """
    from tools.bench import parallel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parallel._write_data(folder / "train.xyz", options.repeat, 8 * options.structures)
        alone = _median("control", options, folder)
        print(f"two processes that do not communicate: {alone:.4f} s per step", flush=True)
        report: dict[str, Any] = {"control_s": alone, "layouts": {}}
        for layout in options.layouts:
            traffic = _traffic(layout, options, folder)
            communication = sum(
                calls * machine["collectives"][key.split("/")[1]]["alpha_s"]
                + traffic["wire_bytes"][key] * machine["collectives"][key.split("/")[1]]["beta_s_per_byte"]
                for key, calls in traffic["calls"].items()
            )
            print(
                f"{layout:<12} predicted {alone + communication:.4f} s ({communication:.4f} s of it sent)", flush=True
            )
            report["layouts"][layout] = {"predicted_s": alone + communication, **traffic}
        for layout, entry in report["layouts"].items():
            measured = _median(layout, options, folder)
            difference = measured / entry["predicted_s"] - 1.0
            print(f"{layout:<12} measured  {measured:.4f} s, {100 * difference:+.1f} %", flush=True)
            entry |= {"measured_s": measured, "difference": difference}
        # Whether the machine was the same all the time.
        report["control_again_s"] = _median("control", options, folder)
        print(f"control again: {report['control_again_s']:.4f} s per step")
    return report


def _median(name: str, options: Namespace, folder: Path) -> float:
    from tools.bench import parallel

    results = parallel._two_processes(name, options, folder)
    return statistics.median(map(max, zip(*(result["times_s"] for result in results), strict=True)))


def _traffic(name: str, options: Namespace, folder: Path) -> dict[str, Any]:
    """Calls and bytes of a step by formula."""
    import ase.io
    import torch

    from janus.comm.traffic import PlainAxis
    from janus.grid import Grid
    from janus.sharding.memory import WeightSizes
    from janus.sharding.traffic import UnitSize, WeightAxes, weight_traffic
    from matris.config import ModelConfig
    from matris.data.dataset import Collate
    from matris.data.records import Sample
    from matris.graph.structure import Labels, Structure
    from matris.model import MatRIS
    from matris.traffic import RankRows, feature_traffic
    from tools.bench import parallel

    sizes = parallel.LAYOUTS[name]
    grid = Grid.of(
        2,
        shard=sizes.get("fully_sharded_size", 1),
        graph=sizes.get("context_parallel_size", 1),
        tensor=sizes.get("tensor_model_parallel_size", 1),
        expert=1,
        pipeline=1,
    )
    hyper = ModelConfig(num_layers=options.layers, hidden_size=options.width)
    own = 2 * options.structures // (grid.data * grid.shard)
    frames = ase.io.read(folder / "train.xyz", index=f":{own}")
    samples = [
        Sample(identifier=f"{index}", structure=Structure.from_atoms(atoms), labels=Labels())
        for index, atoms in enumerate(frames)
    ]
    collate = Collate(
        pairwise_cutoff=hyper.pairwise_cutoff,
        three_body_cutoff=hyper.three_body_cutoff,
        task_names=("default",),
        num_parts=grid.graph,
        part=0,
    )
    with torch.device("meta"):
        model = MatRIS(hyper)
        model.readout.magmom.requires_grad_(False)
    modules = model.sharding_units() if grid.shard > 1 else ()
    weights = WeightSizes.of(model, modules, tensor=grid.tensor)
    axes = {
        "shard": grid.shard,
        "tensor": grid.tensor,
        "replicas": grid.data * grid.shard * grid.graph,
        "shard_replicas": grid.data * grid.graph,
        "expert": 1,
        "expert_replicas": 1,
    }
    traffic = weight_traffic(
        [
            UnitSize.of(size, grid.shard, itemsize=4, in_force_pass=module is not model.atom_embedding)
            for module, size in zip(modules, weights.units, strict=True)
        ],
        WeightAxes(**{axis: PlainAxis(name=axis, size=size) for axis, size in axes.items()}),
        whole_bytes=weights.everywhere,
        policy=sizes.get("sharding_policy", "regather"),
        micro_batches=1,
    )
    traffic.add(
        feature_traffic(
            hyper,
            RankRows.of(collate(samples).graph),
            graph=PlainAxis(name="graph", size=grid.graph),
            tensor=PlainAxis(name="tensor", size=grid.tensor),
        )
    )
    return {"calls": dict(traffic.calls), "wire_bytes": dict(traffic.wire_bytes)}


# A rank ---------------------------------------------------------------------------------------------------------------


def _work(task: dict[str, Any]) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[int(os.environ["RANK"]) % len(cpus)]})

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
    print(json.dumps(_work(json.loads(sys.argv[1]))))
