"""A small labelled set with every kind of label, missing ones included, and settings of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from matris.config import LossConfig, ModelConfig
from matris.data.demo import make_demo
from matris.train_config import DataConfig, OptimConfig, TrainConfig, TrainingConfig

TINY = ModelConfig(
    num_layers=1,
    hidden_size=8,
    pairwise_cutoff=4.0,
    three_body_cutoff=3.2,
    num_radial=3,
    num_angular=3,
    readout_hidden_sizes=(8,),
)


def write_files(folder: Path, *, atoms: int = 8) -> dict[str, str]:
    """`train`, `valid` and `test` files of 24, 3 and 3 structures of at most so many atoms."""
    demo = make_demo(folder / "demo", num=120)
    rng = np.random.default_rng(1)
    paths = {}
    for name, count in (("train", 24), ("valid", 3), ("test", 3)):
        frames = [frame for frame in ase.io.read(getattr(demo, name), ":") if len(frame) <= atoms][:count]
        for index, frame in enumerate(frames):
            if index % 3 == 0:
                frame.arrays["REF_magmoms"] = rng.normal(size=len(frame))
            if index % 4 == 1:
                del frame.calc.results["forces"]
            if index % 5 == 2:
                del frame.calc.results["energy"]
        paths[name] = str(folder / f"{name}.xyz")
        ase.io.write(paths[name], frames, format="extxyz")
    return paths


def settings(
    folder: Path,
    *,
    data: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    loss: LossConfig | None = None,
    **others: Any,
) -> TrainConfig:
    """A run on `train.xyz` of the folder."""
    return TrainConfig(
        data=DataConfig(
            **{
                "train": [str(folder / "train.xyz")],
                "valid": [str(folder / "valid.xyz")],
                "cache_dir": str(folder / "cache"),
                "global_batch_size": 6,
                **(data or {}),
            }
        ),
        training=TrainingConfig(
            **{"train_iters": 3, "output": str(folder / "run"), "device": "cpu", **(training or {})}
        ),
        optim=OptimConfig(**{"lr": 1e-3, "lr_decay_style": "constant", **(optim or {})}),
        loss=loss or LossConfig(magmoms_weight=0.5),
        **{"model": TINY, **others},
    )
