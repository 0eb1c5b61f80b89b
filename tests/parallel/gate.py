"""The data and settings on which layouts are compared, and what all ranks of a launch do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from janus.mesh import Launch
from matris.config import LossConfig, ModelConfig
from matris.layouts import parse_layout
from matris.train_config import DataConfig, OptimConfig, TrainConfig, TrainingConfig
from matris.verify import Row, verify

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    pairwise_cutoff=4.0,
    three_body_cutoff=3.0,
    num_radial=3,
    num_angular=3,
    readout_hidden_sizes=(8,),
)
EXPERTS = replace(MODEL, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=6, kv_channels=4)

_FLOOR = 1e-4
"""Tensors down to so much of the largest are compared on a scale of their own; no gradient of these data cancels."""


def structures() -> dict[str, list[Atoms]]:
    """`molecules`; `mixed`: also a cell with fewer atoms than ranks, and one longer than the cutoffs; `small`."""
    molecules = [ase.build.molecule(name) for name in ("CH3CH2OH", "H2O", "CH4")]
    salt = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystals = [ase.build.bulk("Cu"), ase.build.bulk("Si", cubic=True), salt.repeat((3, 1, 1))]
    return {
        "molecules": [*molecules, Atoms("O")],
        "mixed": [*crystals, Atoms("O"), *molecules[:2]],
        "small": [crystals[1], ase.build.bulk("NaCl", "rocksalt", a=5.6), molecules[1]],
    }


def write_gate_files(folder: Path) -> None:
    """Each with labels of noise, some of them missing."""
    for name, frames in structures().items():
        rng = np.random.default_rng(len(name))
        labelled = [atoms.copy() for atoms in frames]
        for index, atoms in enumerate(labelled):
            atoms.rattle(0.1, seed=index)
            results = {"energy": float(rng.normal()), "forces": rng.normal(size=(len(atoms), 3))}
            if atoms.cell.rank == 3:
                results["stress"] = 0.1 * rng.normal(size=6)
            if index == 1:
                del results["forces"]
            if index == 2:
                del results["energy"]
            atoms.calc = SinglePointCalculator(atoms, **results)
            if index % 2 == 0:
                atoms.arrays["REF_magmoms"] = rng.normal(size=len(atoms))
        ase.io.write(folder / f"{name}.xyz", labelled, format="extxyz")


def gate_config(folder: Path, data: str, precision: str = "fp64", kind: str = "dense") -> TrainConfig:
    """Some updates with all structures in each, in micro-batches.

    Args:
        kind: `dense`, or `experts`: a model with experts, and no clipping, so that sharded blocks are updated during
            the backward pass; `-full` behind it for full recomputation, `-native` for kernels in C++.
    """
    kind, _, way = kind.partition("-")
    experts = kind == "experts"
    return TrainConfig(
        data=DataConfig(
            train=[str(folder / f"{data}.xyz")],
            valid_fraction=0.0,
            cache_dir=str(folder / "cache"),
            global_batch_size=6,
            max_atoms=30,
        ),
        training=TrainingConfig(
            train_iters=2,  # the second update has moments, and an average, of the first
            precision=precision,
            device="cpu",
            output=str(folder / "run"),
            recompute="full" if way == "full" else "all",
            kernels="native" if way == "native" else "torch",
        ),
        optim=OptimConfig(
            lr=1e-2, lr_decay_style="constant", clip_grad=0.0 if experts else 0.5, ema_decay=0.9, adam_eps=1e-4
        ),
        loss=LossConfig(magmoms_weight=0.5),
        model=EXPERTS if experts else MODEL,
    )


def run_gate(launch: Launch, folder: Path, names: Sequence[str], runs: Sequence[tuple[str, ...]]) -> list[Row]:
    """Rows of all layouts, for each of `runs` (data, precision, and a kind other than dense)."""
    layouts = [parse_layout(name) for name in names]
    return [row for run in runs for row in verify(gate_config(folder, *run), layouts, launch, floor=_FLOOR)]
