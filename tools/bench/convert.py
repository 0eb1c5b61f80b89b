"""Memory and time of converting a large model, whose weights are zeros in files with holes: they take no space.

    python -m tools.bench.convert --directory /disk/with/space --preset moe-l --to checkpoint --to model

Each conversion is of what the one before has written, the first of the model directory; it is a process of its own, and
holes are dug into its output before the next. Predictions are not compared: that would load the experts of a crystal.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from janus.checkpoint.header import make_header
from matris.cli import main as command
from matris.config import Precision
from matris.exported import StoredModel, without_weights, write_config
from matris.presets import PRESETS
from matris.tensor_files import INDEX, files_of, sha256_of, write_index
from tools.bench.report import BenchHelp


def main() -> None:
    """Prints a line of JSON for each conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--directory", type=Path, required=True, help="made, and removed again")
    parser.add_argument("--preset", choices=PRESETS, default="moe-l", help="of the model that is converted")
    parser.add_argument("--to", action="append", required=True, help="target of `janus-matris convert`; several")
    parser.add_argument("--one", nargs=2, metavar=("INPUT", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        convert(options.one[0], options.one[1], options.to[0])
        return
    options.directory.mkdir(parents=True)
    try:
        source = options.directory / "source"
        write_holes(options.preset, source)
        for number, target in enumerate(options.to):
            output = options.directory / f"{number}_{target}"
            words = ["--directory", "unused", "--to", target, "--one", str(source), str(output)]
            subprocess.run([sys.executable, __file__, *words], check=True)
            for path in filter(Path.is_file, output.rglob("*")):
                subprocess.run(["fallocate", "--dig-holes", str(path)], check=True)
            source = output
    finally:
        shutil.rmtree(options.directory)


def convert(source: str, output: str, target: str) -> None:
    """One conversion, in this process."""
    start = time.monotonic()
    words = ["convert", "--input", source, "--output", output, "--to", target, "--no-verify"]
    if command(words):
        raise SystemExit(1)
    figures = {
        "to": target,
        "seconds": round(time.monotonic() - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "written_gib": round(sum(path.stat().st_size for path in Path(output).rglob("*")) / 2**30, 2),
    }
    print(json.dumps(figures), flush=True)


def write_holes(preset: str, directory: Path) -> None:
    """A model directory of zeros."""
    shell = without_weights(PRESETS[preset], Precision.fp32, elements=(8, 14), predicts_magmoms=True)
    like = shell.state_dict()
    directory.mkdir()
    files = files_of(like)
    for file, names in files.items():
        own = {name: like[name] for name in names}
        head, _ = make_header(own)
        with (directory / file).open("wb") as stream:
            stream.write(head)
            stream.truncate(len(head) + sum(value.numel() * value.element_size() for value in own.values()))
    if len(files) > 1:
        write_index(directory, like, files)
    digests = {path.name: sha256_of(path) for path in directory.iterdir()}
    assert (INDEX in digests) == (len(files) > 1)

    def zeros(name: str) -> torch.Tensor:
        return torch.zeros(like[name].shape, dtype=like[name].dtype)

    write_config(StoredModel(model=shell, like=like, read=zeros, provenance={"made_by": "zeros"}), directory, digests)


if __name__ == "__main__":
    main()
