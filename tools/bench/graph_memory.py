"""Peak memory per rank of a training step on one large structure, by number of ranks that share its atoms.

    python -m tools.bench.graph_memory --ranks 1 4 --output graph_memory.json

A step is forces, stress and the gradients of a loss of them by all weights. Memory is the growth of the process from
before the batch to its peak (`VmHWM` of Linux, or CUDA's allocator), so libraries and weights do not count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from janus.comm.local import find_port
from tools.bench.report import BenchHelp, add_output, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="numbers of ranks to compare")
    parser.add_argument("--repeat", type=int, default=11, help="fcc cells along each axis: 4 n^3 atoms")
    parser.add_argument("--layers", type=int, default=2, help="interaction blocks")
    parser.add_argument("--width", type=int, default=8, help="feature width")
    parser.add_argument("--partitioner", default="morton", help="morton, index or balanced")
    add_output(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_work(options)))
        return 0
    runs = [_run(ranks, options) for ranks in options.ranks]
    print(_table(runs))
    write_report(options.output, {"runs": runs, **_settings(options)})
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("repeat", "layers", "width", "partitioner")}


def _run(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """One launch; each rank in a process of its own."""
    print(f"measuring {ranks} rank(s)", file=sys.stderr)
    port = find_port()
    arguments = [f"--{name}={value}" for name, value in _settings(options).items()]
    workers = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        # Without a threshold glibc raises its own, and keeps large blocks that were freed.
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-m", "tools.bench.graph_memory", "--worker", *arguments]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    results = []
    for worker in workers:
        text, _ = worker.communicate()
        if worker.returncode:
            raise SystemExit(f"a worker failed with status {worker.returncode}")
        results.append(json.loads(text.splitlines()[-1]))
    return {"ranks": ranks, "per_rank": results}


def _work(options: argparse.Namespace) -> dict[str, Any]:
    """One rank."""
    import ase.build
    import numpy as np
    import torch

    from janus.mesh import open_mesh, read_launch
    from matris.config import ModelConfig, Precision
    from matris.graph.batch import collate_graphs, collate_labels
    from matris.graph.build import build_graph
    from matris.graph.partition import partition_batch
    from matris.graph.structure import Labels, Structure
    from matris.model import MatRIS

    torch.set_num_threads(1)
    ranks = read_launch().world_size
    config = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.width,
        readout_hidden_sizes=(options.width,),
        pairwise_cutoff=4.0,
        three_body_cutoff=3.2,
    )
    atoms = ase.build.bulk("Cu", cubic=True).repeat(options.repeat)
    atoms.positions += np.random.default_rng(0).normal(scale=0.05, size=atoms.positions.shape)
    whole = collate_graphs([build_graph(Structure.from_atoms(atoms), pairwise_cutoff=4.0, three_body_cutoff=3.2)])
    sizes = {"atoms": whole.num_atoms, "edges": whole.num_edges, "angles": whole.num_angles}
    labels = collate_labels([Labels()], [whole.num_atoms])
    with open_mesh("auto", graph=ranks) as mesh:
        model = MatRIS(config, precision=Precision.fp32, seed=0, mesh=mesh).to(mesh.device)
        part = whole
        if ranks > 1:
            part, _ = partition_batch(
                whole, labels, num_parts=ranks, part=mesh.graph.rank, partitioner=options.partitioner
            )
        del whole, labels
        parameters = [value for value in model.parameters() if value.requires_grad]
        before = _start(mesh.device)
        batch = part.to(mesh.device)
        prediction = model(batch, create_graph=True)
        # Sums over this rank's atoms and edges, so that they add up over ranks.
        loss = prediction.energy.square().sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        loss.backward(inputs=parameters)
        peak = _peak(mesh.device) - before
        halos = [halo for halo in (part.atom_halo, part.edge_halo) if halo is not None]
        borrowed = [sum(halo.receive) for halo in halos] or [0, 0]
        return {
            "whole": sizes,
            "atoms": part.num_atoms,
            "edges": part.num_edges,
            "angles": part.num_angles,
            "borrowed_atoms": borrowed[0],
            "borrowed_undirected_edges": borrowed[1],
            "energy": float(prediction.energy.detach().sum()),
            "peak_mib": peak / 2**20,
            "sent_mib": mesh.ledger.wire_bytes["graph/all_to_all"] / 2**20,
        }


def _start(device: Any) -> int:
    """Bytes in use now; the peak is measured from here."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    return _status("VmRSS")


def _peak(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes, of an entry of Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | largest part: atoms, angles | borrowed: atoms, edges | peak MiB per rank | of one rank | sent, MiB |"
    ]
    lines.append("|" + "---|" * 6)
    alone = max(rank["peak_mib"] for rank in runs[0]["per_rank"])
    for run in runs:
        largest = max(run["per_rank"], key=lambda rank: rank["peak_mib"])
        peaks = [rank["peak_mib"] for rank in run["per_rank"]]
        spread = f"{min(peaks):,.0f} to {max(peaks):,.0f}" if len(peaks) > 1 else f"{peaks[0]:,.0f}"
        counts = [largest[name] for name in ("atoms", "angles", "borrowed_atoms", "borrowed_undirected_edges")]
        part, borrowed = (", ".join(f"{count:,}" for count in pair) for pair in (counts[:2], counts[2:]))
        sent = f"{largest['sent_mib']:,.0f}"
        lines.append(f"| {run['ranks']} | {part} | {borrowed} | {spread} | {max(peaks) / alone:.2f} | {sent} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
