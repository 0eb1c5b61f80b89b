"""Blocks as programs over replicas and sharded weights; uncompiled, as compilation takes minutes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import matris.blocks.compiled
import matris.model
from janus.blockwise.traced import TracedBlock, trace_block
from janus.mesh import Launch, Mesh
from matris.blocks.compiled import CompiledBlocks
from matris.layouts import parse_layout
from matris.verify import Row, measure, verify
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks


def run_compiled(launch: Launch, folder: Path) -> list[Row]:
    """A model of one block, traced once for all layouts."""
    made: dict[str, TracedBlock] = {}

    def once(*arguments: Any, **options: Any) -> TracedBlock:
        return made.get("last") or made.setdefault("last", trace_block(*arguments, **options))

    matris.blocks.compiled.trace_block = once
    matris.model.CompiledBlocks = partial(CompiledBlocks, compiled=False)
    config = gate_config(folder, "mixed")
    assert config.model is not None
    config = replace(
        config,
        model=replace(config.model, num_layers=1),
        training=replace(config.training, compile="blocks"),
    )
    layouts = [parse_layout(name) for name in ("dp2", "fsdp2", "fsdp2-keep")]
    measure(config, Mesh(device=torch.device("cpu")))  # traces, which takes long, before ranks wait for each other
    rows = list(verify(config, layouts, launch, floor=1e-4))
    assert made
    return rows


@pytest.mark.slow
def test_layouts_change_nothing(tmp_path: Path) -> None:
    write_gate_files(tmp_path)
    for rows in run_ranks(2, run_compiled, tmp_path, with_mesh=False, timeout=300.0):
        assert len(rows) == 3
        assert not [row for row in rows if not row.passed]
