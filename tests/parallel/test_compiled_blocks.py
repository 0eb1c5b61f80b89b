"""Blocks as programs over replicas and sharded weights; uncompiled, as compilation takes minutes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

import matris.blocks.compiled
import matris.model
from janus.blockwise.traced import TracedBlock
from janus.mesh import Launch, Mesh
from matris.blocks.compiled import CompiledBlocks
from matris.layouts import parse_layout
from matris.setup import build_setup
from matris.train_config import TrainConfig
from matris.verify import Row, verify
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks

LAYOUTS = ("dp2", "fsdp2", "fsdp2-keep")


def settings(folder: Path) -> TrainConfig:
    """Of a model of one block."""
    config = gate_config(folder, "mixed")
    assert config.model is not None
    return replace(
        config,
        model=replace(config.model, num_layers=1),
        training=replace(config.training, compile="blocks"),
    )


def traced(config: TrainConfig) -> TracedBlock:
    """The block, once for all ranks and layouts: a trace takes long."""
    plain = replace(config, training=replace(config.training, compile="none"))
    setup = build_setup(plain, Mesh())
    programs = CompiledBlocks(setup.model.config, compiled=False)
    setup.model.blocks[0].make_passes = programs
    setup.model(next(iter(setup.train.batches(0))).micro_batches[0].graph)
    (block,) = programs._blocks.values()
    assert block is not None
    return block


def run_compiled(launch: Launch, config: TrainConfig, block: TracedBlock) -> tuple[list[Row], int]:
    """Rows of all layouts, and how often they asked for the block."""
    asked = Mock(return_value=block)
    matris.blocks.compiled.trace_block = asked
    matris.model.CompiledBlocks = partial(CompiledBlocks, compiled=False)
    layouts = [parse_layout(name) for name in LAYOUTS]
    return list(verify(config, layouts, launch, floor=1e-4)), asked.call_count


@pytest.mark.slow
def test_layouts_change_nothing(tmp_path: Path) -> None:
    write_gate_files(tmp_path)
    config = settings(tmp_path)
    for rows, asked in run_ranks(2, run_compiled, config, traced(config), with_mesh=False, timeout=300.0):
        assert asked >= len(LAYOUTS)
        assert len(rows) == len(LAYOUTS)
        assert not [row for row in rows if not row.passed]
