"""`janus-matris convert`: a checkpoint of another package into a model directory, or a model into a smaller one."""

from __future__ import annotations

import argparse
from pathlib import Path

from matris.elements import number_of


def main(arguments: list[str]) -> int:
    """Exit status 0; a mistake in the options ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="janus-matris convert",
        description="Convert a released MatRIS checkpoint into a model directory (model.safetensors + config.json), or "
        "a model directory with experts into one for some elements, which gives the same results for them. No code in "
        "a checkpoint is run; unknown or missing weights are refused by name.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=["reference", "model"],
        default="model",
        help="what is converted: `reference`, a checkpoint of PyPI matris 0.1.0 or 1.0.0, or `model` (default), a "
        "model directory of ours, of which only the experts for --elements are kept",
    )
    parser.add_argument("--input", type=Path, required=True, help="checkpoint file, .pth.tar, or model directory")
    parser.add_argument(
        "--elements", metavar="Si,O,...", help="chemical symbols that the new model is for; only --from model"
    )
    parser.add_argument("--output", type=Path, required=True, help="model directory to create")
    options = parser.parse_args(arguments)
    if (options.elements is None) != (options.source == "reference"):
        parser.error(
            "--elements belongs to --from model, which needs it: give --from reference, or the elements to keep"
        )
    if options.source == "reference":
        from matris.reference import convert_reference

        convert_reference(options.input, options.output)
    else:
        elements = [number_of(symbol.strip()) for symbol in options.elements.split(",")]
        _keep_elements(options.input, elements, options.output)
    print(f"written: {options.output}")
    return 0


def _keep_elements(source: Path, elements: list[int], output: Path) -> None:
    from matris.exported import load_model, read_config, save_model
    from matris.pruning import keep_elements, pruning_line

    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output, or remove it first")
    model = load_model(source)
    pruned = keep_elements(model, elements)
    config = read_config(source)
    save_model(pruned, output, provenance={**config["provenance"], "experts_kept_of": config["config_sha256"]})
    print(pruning_line(model, pruned))
