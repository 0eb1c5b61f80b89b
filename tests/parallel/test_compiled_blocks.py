"""Blocks as programs over replicas and sharded weights; uncompiled, as compilation takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

import matris.blocks.compiled
import matris.model
from janus.blockwise.function import Tensors
from janus.blockwise.traced import BlockFunction, TracedBlock, trace_block
from janus.mesh import Launch, Mesh
from matris.blocks.compiled import CompiledBlocks
from matris.layouts import parse_layout
from matris.setup import build_setup
from matris.train_config import TrainConfig
from matris.verify import Row, verify
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks

LAYOUTS = {"dense": ("dp2", "fsdp2", "fsdp2-keep"), "experts": ("dp2", "ep2xfsdp2", "ep2-homexfsdp2-keep")}


def settings(folder: Path, kind: str) -> TrainConfig:
    """Of a model of one block."""
    config = gate_config(folder, "mixed", kind=kind)
    assert config.model is not None
    return replace(
        config,
        model=replace(config.model, num_layers=1),
        training=replace(config.training, compile="blocks"),
    )


def traced(config: TrainConfig) -> dict[int, TracedBlock]:
    """By the number of their inputs, once for all ranks and layouts: a trace takes long."""
    found = {}

    def trace(function: BlockFunction, x: Tensors, *others: Tensors, rows: Sequence[str]) -> TracedBlock:
        found[len(x)] = trace_block(function, x, *others, rows=rows)
        return found[len(x)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matris.blocks.compiled.trace_block", trace)
        patch.setattr("matris.model.CompiledBlocks", partial(CompiledBlocks, compiled=False))
        setup = build_setup(config, Mesh())
        setup.model(next(iter(setup.train.batches(0))).micro_batches[0].graph)
    return found


def run_compiled(
    launch: Launch, config: TrainConfig, programs: dict[int, TracedBlock], names: Sequence[str]
) -> tuple[list[Row], int]:
    """Rows of all layouts, and how often they asked for programs."""
    asked = Mock(side_effect=lambda function, x, *others, **options: programs[len(x)])
    matris.blocks.compiled.trace_block = asked
    matris.model.CompiledBlocks = partial(CompiledBlocks, compiled=False)
    layouts = [parse_layout(name) for name in names]
    return list(verify(config, layouts, launch, floor=1e-4)), asked.call_count


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_programs"), [("dense", 1), ("experts", 2)])
def test_layouts_change_nothing(tmp_path: Path, kind: str, num_programs: int) -> None:
    write_gate_files(tmp_path)
    config, names = settings(tmp_path, kind), LAYOUTS[kind]
    programs = traced(config)
    assert len(programs) == num_programs
    for rows, asked in run_ranks(2, run_compiled, config, programs, names, with_mesh=False, timeout=300.0):
        assert asked >= num_programs * len(names)
        assert len(rows) == len(names)
        assert not [row for row in rows if not row.passed]
