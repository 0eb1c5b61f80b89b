"""The part of Megatron-LM's argument parser that our providers read, with its names and defaults."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from unittest import mock

from matris.megatron_options import add_options

_NUMBERS = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
    "expert-model-parallel-size": 1,
    "expert-tensor-parallel-size": None,
    "global-batch-size": None,
    "micro-batch-size": None,
    "train-iters": None,
    "train-samples": None,
    "eval-iters": 100,
    "num-workers": 2,
    "seed": 1234,
}
_SWITCHES = ("fp16", "bf16", "overlap-grad-reduce", "use-torch-fsdp2", "calculate-per-token-loss", "skip-train")
_TEXTS = {"recompute-granularity": None, "dataloader-type": None, "optimizer": "adam", "save": None}


def megatron_parser() -> ArgumentParser:
    """Without our options."""
    parser = ArgumentParser(allow_abbrev=False)
    for name, default in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name, text in _TEXTS.items():
        parser.add_argument(f"--{name}", default=text)
    parser.add_argument(
        "--no-gradient-accumulation-fusion", action="store_false", dest="gradient_accumulation_fusion", default=True
    )
    return parser


def parse_megatron(options: Sequence[str]) -> Namespace:
    """As Megatron does with `add_options` for its extra arguments; nothing is resumed."""
    with mock.patch.object(sys, "argv", ["pretrain", *options]):
        arguments = add_options(megatron_parser()).parse_args()
    arguments.consumed_train_samples = 0
    return arguments
