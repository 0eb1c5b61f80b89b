"""`janus-matris eval`: errors of a model on labelled structures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matris.cli.label_options import HelpFormatter, add_label_options, label_keys
from matris.config import Precision


def build_parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    parser = argparse.ArgumentParser(
        prog="janus-matris eval",
        description="Errors of a model on labelled structures, over all of them and per task (level of theory): energy "
        "per atom, force components, Voigt components of the stress, magnetic moments. Several processes (torchrun, "
        "srun, mpirun) share the structures; the errors stay exact.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, such as best/ of a run")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="stores of `prepare`, or files that ASE reads"
    )
    parser.add_argument("--task", metavar="NAME", help="level of theory of the data, for models that know several")
    parser.add_argument("--output", required=True, type=Path, metavar="metrics.json", help="the file to write")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="parity plot [default: the output's name with .png]")
    add_label_options(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="structures at a time, over all processes")
    parser.add_argument("--max_atoms", type=int, help="atoms per micro-batch of one process")
    parser.add_argument("--max_edges", type=int, help="directed edges per micro-batch")
    parser.add_argument("--max_angles", type=int, help="angles per micro-batch")
    parser.add_argument(
        "--context_parallel_size",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the atoms of each structure, for structures too large for one; limits of a "
        "micro-batch count whole structures",
    )
    parser.add_argument(
        "--graph_partitioner",
        choices=["morton", "index", "balanced"],
        help="who owns which atom, with --context_parallel_size above 1 [default: morton]",
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that build graphs ahead")
    parser.add_argument("--cache_dir", help="where raw files are prepared to [default: ~/.cache/janus-matris]")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        help="number formats [default: that of the model's weights]",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake."""
    options = build_parser().parse_args(arguments)

    from janus.comm.collectives import ElsewhereError

    try:
        return _evaluate(options)
    except ElsewhereError:
        return 2  # rank 0 says why


def _evaluate(options: argparse.Namespace) -> int:

    from janus.comm.collectives import on_main_rank
    from janus.mesh import open_mesh
    from matris.data.dataset import StructureDataset, graph_budget, open_dataset
    from matris.data.frames import refuse_idle_keys
    from matris.evaluation import Portions, evaluate_dataset
    from matris.exported import load_model
    from matris.metrics import metrics_line
    from matris.plots import plot_parity
    from matris.precision import set_precision
    from matris.run_data import of_task
    from matris.writable import check_writable

    plot = options.plot or options.output.with_suffix(".png")
    for name, path in (("output", options.output), ("plot", plot)):
        if path.is_dir():
            raise ValueError(f"{name} {path} is a directory: give the name of a file")
        check_writable(path.parent)
    if options.context_parallel_size == 1 and options.graph_partitioner is not None:
        raise ValueError(
            f"--graph_partitioner {options.graph_partitioner} has nothing to divide with --context_parallel_size 1: "
            "leave it out, or let several processes share the atoms"
        )
    with open_mesh(options.device, graph=options.context_parallel_size) as mesh:
        precision = set_precision(options.precision, mesh.device)
        model = load_model(options.model, precision=precision, mesh=mesh).to(mesh.device)
        model.task_number(options.task)  # refuses names that it does not know

        refuse_idle_keys(options.data, label_keys(options))

        def open_data() -> StructureDataset:
            dataset = open_dataset(
                options.data,
                pairwise_cutoff=model.hyper.pairwise_cutoff,
                three_body_cutoff=model.hyper.three_body_cutoff,
                keys=label_keys(options),
                wanted=(),
                cache_dir=options.cache_dir,
                num_workers=options.num_workers,
            )
            return dataset if options.task is None else of_task(dataset, model.hyper, options.task)

        on_main_rank(lambda: len(open_data()), mesh)  # prepares raw files
        dataset = open_data()
        if not any(present.any() for present in vars(dataset.label_presence).values()):
            raise ValueError(
                f"{', '.join(options.data)}: no structure has a label, so there is nothing to compare with. Give the "
                "keys that the files have (--energy_key, --forces_key, ...), or other files"
            )
        model.check_elements(dataset.elements(), options.task)
        portions = Portions(
            batch_size=options.batch_size,
            budget=graph_budget(
                max_atoms=options.max_atoms, max_edges=options.max_edges, max_angles=options.max_angles
            ),
            num_workers=options.num_workers,
            partitioner=options.graph_partitioner or "morton",
        )
        evaluation = evaluate_dataset(model, dataset, mesh, portions)
        if mesh.is_main:
            for path in (options.output, plot):
                path.parent.mkdir(parents=True, exist_ok=True)
            temporary = options.output.with_name(options.output.name + ".tmp")
            temporary.write_text(
                json.dumps({"model": options.model, "data": options.data, **evaluation.report}, indent=1)
            )
            temporary.replace(options.output)
            plot_parity(evaluation.points, evaluation.report, plot)
            print(f"{evaluation.report['num_structures']} structures  {metrics_line(evaluation.report)}")
            print(f"written: {options.output} and {plot}")
    return 0
