"""`janus-matris convert`: weights from one format into another."""

from __future__ import annotations

import argparse
from pathlib import Path

from matris.convert.kinds import Kind, Target
from matris.elements import number_of

_ABOUT = """\
Converts weights, and compares the result with what it came from. What the input is follows from its content: a model
directory, a training checkpoint (step_00001000) or a run (its newest valid checkpoint), a checkpoint of the reference
package (.pth.tar), or a Megatron checkpoint (torch_dist). No code in any of them is run. The output appears when it is
whole and verified, or not at all.
"""
_EXAMPLES = """\
examples:
  a released model            convert --input MatRIS_10M_OAM.pth.tar --output models/oam
  a run, its average          convert --input runs/first --output models/first
  for the reference package   convert --input models/oam --to reference --output ours.pth.tar
  experts of some elements    convert --input models/moe --elements Si,O --output models/silica
  a dense model with experts  convert --input models/oam --to moe --experts 16 --topk 2 --output models/oam-moe
  to start a training from    convert --input models/oam-moe --to checkpoint --output start
                              train --training.resume start ...
  for Megatron tools          convert --input runs/first --to torch_dist --output megatron
"""


def main(arguments: list[str]) -> int:
    """Exit status 0; a mistake in the options ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="janus-matris convert",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", type=Path, required=True, help="file or directory to convert")
    parser.add_argument("--output", type=Path, required=True, help="file or directory to create")
    parser.add_argument(
        "--to",
        choices=[target.value for target in Target],
        help="what to make: `model` (default) a model directory, `reference` a .pth.tar of PyPI matris, `checkpoint` a "
        "training checkpoint of no updates, `torch_dist` a Megatron checkpoint, `moe` a model directory with experts "
        "that gives the same results and is to be trained on",
    )
    parser.add_argument(
        "--from", dest="source", choices=[kind.value for kind in Kind], help="refuse an input that is anything else"
    )
    parser.add_argument(
        "--elements", metavar="Si,O,...", help="keep only the experts that serve these chemical elements"
    )
    parser.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="of a training checkpoint: the averaged weights (default), or those of the last update",
    )
    parser.add_argument("--experts", type=int, help="with --to moe: experts at each site")
    parser.add_argument("--topk", type=int, help="with --to moe: experts that serve an element")
    parser.add_argument(
        "--expert_hidden_size", type=int, help="with --to moe: hidden width of an expert; by default that of the model"
    )
    parser.add_argument("--seed", type=int, help="with --to moe: of the routing and the experts (default 0)")
    parser.add_argument(
        "--like", type=Path, metavar="DIR", help="model directory that says what a Megatron checkpoint of others is"
    )
    parser.add_argument(
        "--no_verify",
        "--no-verify",
        action="store_true",
        help="do not compare energies and forces of source and result, for which both are loaded",
    )
    options = parser.parse_args(arguments)
    target = Target(options.to or "model")
    of_experts = {"--experts": options.experts, "--topk": options.topk}
    _check(parser, options, target)

    from matris.convert.run import Conversion, convert
    from matris.convert.upcycle import Upcycling

    experts = None
    if target is Target.moe:
        experts = Upcycling(
            num_experts=of_experts["--experts"],
            topk=of_experts["--topk"],
            hidden_size=options.expert_hidden_size,
            seed=options.seed or 0,
        )
    elements = None if options.elements is None else [number_of(name.strip()) for name in options.elements.split(",")]
    lines = convert(
        Conversion(
            input=options.input,
            output=options.output,
            target=target,
            kind=None if options.source is None else Kind(options.source),
            elements=elements,
            averaged=options.weights != "raw",
            weights_chosen=options.weights is not None,
            experts=experts,
            like=options.like,
            verify=not options.no_verify,
        )
    )
    print("\n".join(lines))
    print(f"written: {options.output}")
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace, target: Target) -> None:
    """Options that do not belong together."""
    of_moe = ("experts", "topk", "expert_hidden_size", "seed")
    given = [f"--{name}" for name in of_moe if getattr(options, name) is not None]
    if target is not Target.moe and given:
        parser.error(f"{', '.join(given)}: only with --to moe")
    if target is Target.moe and (options.experts is None or options.topk is None):
        parser.error("--to moe needs --experts and --topk")
    if target is Target.moe and options.elements is not None:
        parser.error("--elements is of a model with experts, and --to moe of one without: convert twice")
