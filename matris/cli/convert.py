"""`janus-matris convert`: a checkpoint of another package into a model directory."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Exit status 0; a mistake in the options ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="janus-matris convert",
        description="Convert a released MatRIS checkpoint into a model directory (model.safetensors + config.json). "
        "No code in the checkpoint is run; unknown or missing weights are refused by name.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from", dest="source", choices=["reference"], required=True, help="what wrote it: PyPI matris 0.1.0 or 1.0.0"
    )
    parser.add_argument("--input", type=Path, required=True, help="checkpoint file, .pth.tar")
    parser.add_argument("--output", type=Path, required=True, help="model directory to create")
    options = parser.parse_args(arguments)

    from matris.reference import convert_reference

    convert_reference(options.input, options.output)
    print(f"written: {options.output}")
    return 0
