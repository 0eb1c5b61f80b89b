"""`janus-matris verify`: whether every layout of ranks gives the numbers of one process, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matris.cli.label_options import HelpFormatter
from matris.config import LossConfig, ModelConfig
from matris.layouts import Layout, parse_layouts
from matris.presets import PRESETS
from matris.train_config import DataConfig, OptimConfig, ParallelConfig, TaskConfig, TrainConfig, TrainingConfig

if TYPE_CHECKING:
    from janus.mesh import Launch

DEFAULT_LAYOUTS = "dp2,fsdp2,fsdp2-keep,gp2,tp2,fsdp2xgp2,fsdp2xtp2,gp2xtp2"
_TERMS = ("energy", "forces", "stress", "magmoms")
_TINY = ModelConfig(
    num_layers=2,
    hidden_size=16,
    pairwise_cutoff=4.0,
    three_body_cutoff=3.0,
    num_radial=5,
    num_angular=5,
    readout_hidden_sizes=(16,),
)


def build_parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    parser = argparse.ArgumentParser(
        prog="janus-matris verify",
        description="Compares layouts of ranks with one process: energies, forces and stress, the weight gradient of "
        "each term of the loss alone, the norm of the gradient, and the weights and their average after three updates. "
        "Under torchrun, srun or mpirun it takes the ranks that are there, and of each layout as many replicas as fill "
        "them; started as plain python it starts the ranks itself, on this machine. Largest relative errors are shown; "
        "exit status 1 if any is too large.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--layouts",
        default=DEFAULT_LAYOUTS,
        help="separated by commas; each made of dp (replicas), tp (tensor), gp (graph), fsdp (sharded parameters, "
        "ZeRO-3; with -keep ZeRO-2) and ep (how many of the dp, fsdp and gp ranks share the experts; with -home whole "
        "ones) with their numbers of ranks, joined by x: tp2xgp2, ep4xfsdp2",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="DIR", help="model directory [default: a tiny new model]")
    what.add_argument("--preset", choices=tuple(PRESETS), help="a new model of a published size")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="labelled structures: stores of `prepare`, or files that ASE reads [default: a built-in alloy set]",
    )
    parser.add_argument("--task", metavar="NAME", help="level of theory of the data, for a --model that knows several")
    parser.add_argument(
        "--terms",
        nargs="+",
        choices=_TERMS,
        default=["energy", "forces", "stress"],
        help="terms of the loss, each with labels in the data",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="structures per update, over all ranks")
    parser.add_argument(
        "--precision", choices=["fp64", "fp32"], default="fp64", help="allowed are errors of 1e-10 and 1e-4"
    )
    parser.add_argument(
        "--kernels",
        choices=["torch", "compiled", "native", "triton"],
        default="torch",
        help="of the layouts, as `training.kernels`; the one process has those of torch (with dp1 the kernels alone)",
    )
    parser.add_argument(
        "--compile",
        choices=["none", "blocks"],
        default="none",
        help="of the layouts, as `training.compile`; takes minutes. The one process compiles nothing",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute; auto: under a launcher a GPU per rank where there are GPUs, else the CPU",
    )
    parser.add_argument(
        "--timeout_minutes", type=float, default=30.0, help="how long a rank waits for the others before the run ends"
    )
    parser.add_argument("--cache_dir", help="where raw files are prepared to [default: ~/.cache/janus-matris]")
    return parser


def main(arguments: list[str]) -> int:
    """Run the verb. Raises ValueError or OSError for a user's mistake."""
    options = build_parser().parse_args(arguments)
    layouts = parse_layouts(options.layouts)

    from janus.mesh import ElsewhereError

    try:
        return _on_ranks(options, layouts)
    except ElsewhereError:
        return 2  # another rank says why


def _on_ranks(options: argparse.Namespace, layouts: Sequence[Layout]) -> int:
    """Exit status on the ranks of a launcher, or on ranks of our own."""
    from janus.comm.local import run_local_ranks
    from janus.mesh import join_ranks, read_launch

    launch = read_launch()
    if launch.launcher == "python":
        device: Literal["auto", "cpu", "cuda"] = "cpu" if options.device == "auto" else options.device
        config = _config(options, device, write_demo=True)
        _check(config, layouts)
        passed = True
        for number, num_ranks in enumerate(sorted({layout.num_ranks for layout in layouts})):
            chosen = [layout for layout in layouts if layout.num_ranks == num_ranks]
            passed &= run_local_ranks(num_ranks, device, _run, config, chosen, number == 0)
        return 0 if passed else 1
    fitting = [filled for layout in layouts if (filled := layout.filled(launch.world_size)) is not None]
    if not fitting:
        raise ValueError(
            f"none of the layouts {options.layouts} fits {launch.world_size} ranks: start a multiple of one"
        )
    for layout in layouts:
        if launch.rank == 0 and layout.filled(launch.world_size) is None:
            print(f"not run: {layout.name}, for its {layout.num_ranks} ranks do not divide {launch.world_size}")
    with join_ranks(options.device, launch=launch, timeout_minutes=options.timeout_minutes):
        config = _config(options, options.device, write_demo=launch.rank == 0)
        _check(config, fitting)
        passed = _run(launch, config, list(dict.fromkeys(fitting)), True)
        return 0 if passed and len(fitting) == len(layouts) else 1


def _check(config: TrainConfig, layouts: Sequence[Layout]) -> None:
    """Raises ValueError for a layout over which the model cannot be spread, before anything is computed."""
    from matris.setup import check_ranks, hyper_parameters

    hyper = hyper_parameters(config)
    for layout in layouts:
        try:
            check_ranks(hyper, layout.applied(config.parallel))
        except ValueError as error:
            raise ValueError(f"layout {layout.name}: {error}") from None


def _config(options: argparse.Namespace, device: Literal["auto", "cpu", "cuda"], *, write_demo: bool) -> TrainConfig:
    """Three updates as the options say, on one rank."""
    from matris.verify import NUM_STEPS

    if options.task is not None and options.model is None:
        raise ValueError(f"--task {options.task}: a new model knows no tasks; leave it out, or give --model DIR")
    hyper = PRESETS[options.preset] if options.preset else _TINY
    files = options.data or [str(_demo(options.cache_dir, write=write_demo))]
    return TrainConfig(
        data=DataConfig(
            train=files if options.task is None else [],
            tasks=[] if options.task is None else [TaskConfig(name=options.task, train=files)],
            valid_fraction=0.0,
            cache_dir=options.cache_dir,
            global_batch_size=options.batch_size,
            reference_energies="fit",
        ),
        training=TrainingConfig(
            train_iters=NUM_STEPS,
            precision=options.precision,
            device=device,
            kernels=options.kernels,
            compile=options.compile,
        ),
        # Clips, and moves the weights far enough to see errors; a gradient that cancels to rounding moves nothing.
        optim=OptimConfig(lr=1e-2, lr_decay_style="constant", clip_grad=0.5, ema_decay=0.9, adam_eps=1e-4),
        loss=LossConfig(
            energy_weight=float("energy" in options.terms),
            forces_weight=float("forces" in options.terms),
            stress_weight=float("stress" in options.terms),
            magmoms_weight=float("magmoms" in options.terms),
        ),
        model=ModelConfig() if options.model else hyper,
        parallel=ParallelConfig(distributed_timeout_minutes=options.timeout_minutes),
        init_from=options.model,
    )


def _demo(cache_dir: str | None, *, write: bool) -> Path:
    """The built-in set, in the cache."""
    folder = (Path(cache_dir) if cache_dir else Path.home() / ".cache" / "janus-matris") / "verify"
    if write and not (folder / "train.xyz").exists():
        from matris.data.demo import make_demo

        make_demo(folder, num=40)
    return folder / "train.xyz"


def _run(launch: Launch, config: TrainConfig, layouts: Sequence[Layout], with_head: bool) -> bool:
    """Verifies layouts on the ranks of a launch; rank 0 prints their rows as they come. Returns whether all passed."""
    from matris.verify import verify

    passed = True
    width = max(20, *(len(layout.name) for layout in layouts))
    for row in verify(config, layouts, launch):
        passed &= row.passed
        if launch.rank == 0:
            names = [_HEADS[name] for name in row.errors]
            if with_head:
                print(f"{'layout':<{width}} ranks " + " ".join(f"{name:>9}" for name in names), flush=True)
                if empty := [_HEADS[name] for name in row.errors if name in row.unchecked]:
                    print(
                        f"-: {', '.join(empty)} not checked: zero or undefined throughout. A gradient is zero without "
                        "labels of its term in the first batch, a stress is undefined without a cell",
                        flush=True,
                    )
                with_head = False
            errors = " ".join(
                f"{'-':>9}" if name in row.unchecked else f"{error:>9.1e}" for name, error in row.errors.items()
            )
            verdict = "ok" if row.passed else f"FAIL, allowed is {row.tolerance:g}"
            print(f"{row.layout.name:<{width}} {launch.world_size:>5} {errors}  {verdict}", flush=True)
    return passed


_HEADS = {
    "energy": "energy",
    "forces": "forces",
    "stress": "stress",
    "magmoms": "magmoms",
    "energy_gradient": "grad E",
    "forces_gradient": "grad F",
    "stress_gradient": "grad S",
    "magmoms_gradient": "grad M",
    "norm": "norm",
    "loss": "loss",
    "weights": "weights",
    "average": "average",
}
