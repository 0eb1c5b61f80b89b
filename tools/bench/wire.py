"""What fp16 on the wire of the experts costs in accuracy and saves in bytes, on real structures.

Two ranks are home to half of the experts of a new moe-tiny each, so that nothing but tokens travels. The first batch is
predicted and differentiated once with fp32 and once with fp16 on the wire, and both are compared with the same in fp64.
Largest error of each kind, relative to the largest value of its tensor, for energies, forces, stress, the weight
gradient of each loss term, and weights after an update.

    torchrun --nproc_per_node 2 -m tools.bench.wire --data train.xyz.gz --output wire.json
"""

from __future__ import annotations

import argparse

from janus.mesh import Launch, join_ranks, open_mesh
from matris.config import LossConfig
from matris.presets import PRESETS
from matris.train_config import DataConfig, ParallelConfig, TrainConfig, TrainingConfig
from matris.verify import compare, measure
from tools.bench.report import BenchHelp, add_output, write_report

KINDS = ("energy", "forces", "stress", "energy_gradient", "forces_gradient", "stress_gradient", "weights")
LAYOUTS = {
    "fp64": ParallelConfig(expert_model_parallel_size=2, expert_placement="fixed"),
    "fp32": ParallelConfig(expert_model_parallel_size=2, expert_placement="fixed"),
    "fp32, fp16 wire": ParallelConfig(expert_model_parallel_size=2, expert_placement="fixed", expert_fp16_wire=True),
}


def main() -> None:
    """Prints a markdown table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--data", nargs="+", required=True, help="files or folders of structures")
    parser.add_argument("--batch_size", type=int, default=16, help="structures of the batch")
    parser.add_argument("--cache_dir", help="of what is prepared (default: ~/.cache/janus-matris)")
    add_output(parser, required=True)
    options = parser.parse_args()
    with join_ranks("cpu") as launch:
        found = compared(options, launch)
    if launch.rank == 0:
        write_report(options.output, found)
        print(f"| wire | bytes on the wire | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
        for name, entry in found.items():
            errors = " | ".join(f"{entry['errors'][kind]:.1e}" for kind in KINDS)
            print(f"| {name} | {entry['wire_bytes']:.0f} | {errors} |")


def compared(options: argparse.Namespace, launch: Launch) -> dict[str, dict[str, object]]:
    """By format: bytes that the experts' exchanges sent from one rank, and errors."""
    measured, sent = {}, {}
    for name, parallel in LAYOUTS.items():
        config = TrainConfig(
            data=DataConfig(
                train=options.data,
                valid_fraction=0.0,
                global_batch_size=options.batch_size,
                max_atoms=256,
                cache_dir=options.cache_dir,
            ),
            training=TrainingConfig(train_iters=1, precision=name[:4], device="cpu"),
            loss=LossConfig(),
            model=PRESETS["moe-tiny"],
            parallel=parallel,
        )
        with open_mesh("cpu", expert=2, launch=launch) as mesh:
            measured[name] = measure(config, mesh)
            sent[name] = mesh.ledger.wire_bytes["expert/all_to_all"]
    return {
        name: {"wire_bytes": sent[name], "errors": compare(measured[name], measured["fp64"])}
        for name in LAYOUTS
        if name != "fp64"
    }


if __name__ == "__main__":
    main()
