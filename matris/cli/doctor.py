"""`janus-matris doctor`: what a data set holds and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matris.cli.label_options import HelpFormatter, add_label_options, label_keys, num_available_cores, worker_count
from matris.writable import check_writable


def build_parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    parser = argparse.ArgumentParser(
        prog="janus-matris doctor",
        description="Which labels were found where, counts, elements, ranges, shortest distances, duplicates, "
        "constraint-zeroed forces, whether forces and stress fit the energies (unit and sign), sizes of the graphs and "
        "budgets for them. Exit status 1 on a fatal finding.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="stores (.h5) or any files that `prepare` reads")
    add_label_options(parser)
    parser.add_argument(
        "--labels",
        metavar="LABELS",
        help="fatal unless each of these is in some frame: energy, forces, stress, magmoms (default: any label)",
    )
    parser.add_argument("--pairwise_cutoff", type=float, default=6.0, help="of the counts of edges, Angstrom")
    parser.add_argument("--three_body_cutoff", type=float, default=4.5, help="of the counts of angles, Angstrom")
    parser.add_argument("--output", metavar="DIR", help="write pictures (PNG) into this folder")
    parser.add_argument("--json", metavar="FILE", help="write the diagnosis as JSON")
    parser.add_argument("--num_workers", type=worker_count, default=num_available_cores(), help="processes")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake; returns 1 on a fatal finding."""
    options = build_parser().parse_args(argv)
    if options.json:
        check_writable(Path(options.json).parent)
        if Path(options.json).is_dir():
            raise ValueError(f"--json {options.json}: is a folder; give the name of a file")
    if options.output:
        check_writable(Path(options.output))

    from matris.data.doctor import examine
    from matris.data.doctor_report import draw, to_json, to_text
    from matris.data.prepare import PrepareOptions

    diagnosis = examine(
        options.paths,
        PrepareOptions(
            keys=label_keys(options),
            wanted=tuple(filter(None, (options.labels or "").split(","))),
            pairwise_cutoff=options.pairwise_cutoff,
            three_body_cutoff=options.three_body_cutoff,
        ),
        num_workers=options.num_workers,
        progress=True,
    )
    print(to_text(diagnosis))
    if options.json:
        target = Path(options.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(to_json(diagnosis), indent=1, allow_nan=False) + "\n")
        partial.replace(target)
    if options.output:
        for picture in draw(diagnosis, options.output):
            print(f"wrote {picture}")
    return int(diagnosis.fatal)
