"""`janus-matris prepare`: structures and labels from any file into an HDF5 store."""

from __future__ import annotations

import argparse
import logging

from matris.cli.label_options import HelpFormatter, add_label_options, label_keys, num_available_cores, worker_count


def build_parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    parser = argparse.ArgumentParser(
        prog="janus-matris prepare",
        description="Structures and labels into one HDF5 store, which training reads at random. A killed run goes on "
        "where it was when started again with the same inputs and options.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="extended XYZ (.xyz .extxyz, also .gz .xz .bz2), ASE db (.db), a folder or file of .aselmdb, "
        "stores (.h5), or anything else that ASE reads",
    )
    parser.add_argument("--output", required=True, metavar="STORE.h5", help="the store to write; its folder is made")
    add_label_options(parser)
    parser.add_argument(
        "--labels",
        default="energy,forces",
        help="fail unless each of these is in at least one frame: energy, forces, stress, magmoms",
    )
    parser.add_argument("--task", help="name of the level of theory (default: that of an input store, else `default`)")
    parser.add_argument(
        "--split_key",
        metavar="NAME",
        help="info entry that every frame has (a trajectory, a composition): its value is stored, so that training can "
        "set whole groups aside for validation (--data.split_key)",
    )
    parser.add_argument("--pairwise_cutoff", type=float, default=6.0, help="of the counts of edges, Angstrom")
    parser.add_argument("--three_body_cutoff", type=float, default=4.5, help="of the counts of angles, Angstrom")
    parser.add_argument("--num_workers", type=worker_count, default=num_available_cores(), help="processes")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake."""
    options = build_parser().parse_args(argv)

    from matris.data.prepare import PrepareOptions, prepare

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = prepare(
        options.inputs,
        options.output,
        PrepareOptions(
            keys=label_keys(options),
            wanted=tuple(filter(None, options.labels.split(","))),
            task=options.task,
            pairwise_cutoff=options.pairwise_cutoff,
            three_body_cutoff=options.three_body_cutoff,
            split_key=options.split_key,
        ),
        num_workers=options.num_workers,
        progress=True,
    )
    print(f"{options.output}: {report.num_frames} structures")
    return 0
