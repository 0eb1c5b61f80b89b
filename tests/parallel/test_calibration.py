"""All ranks divide structures by the same cost model, whatever their own clocks say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus.mesh import Mesh
from matris.calibration import calibrate
from matris.evaluation import collate_for
from matris.layouts import parse_layout
from matris.setup import build_setup
from matris.train_config import TrainConfig
from tests.parallel.gate import gate_config, write_gate_files
from tests.parallel.ranks import run_ranks


def measured(mesh: Mesh, config: TrainConfig) -> Any:
    setup = build_setup(config, mesh)
    before = {name: value.clone() for name, value in setup.learner.parameters.items()}
    assert setup.cost.wants_times
    assert setup.portions.budget is not None
    calibrate(
        setup.cost,
        setup.task,
        setup.learner,
        setup.datasets.train,
        setup.sampler.indices(0),
        collate=collate_for(setup.model, setup.datasets.train, "morton"),
        budget=setup.portions.budget,
        mesh=mesh,
    )
    assert not setup.cost.wants_times
    parameters = setup.learner.parameters
    assert all(bool((value == parameters[name]).all()) for name, value in before.items())
    assert all(value.grad is None or not bool(value.grad.any()) for value in parameters.values())
    return setup.cost.facts()


@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "gp2"])
def test_ranks_agree(tmp_path: Path, layout: str) -> None:
    write_gate_files(tmp_path)
    base = gate_config(tmp_path, "mixed")
    place = parse_layout(layout)
    config = replace(base, data=replace(base.data, cost_model="calibrated"), parallel=place.applied(base.parallel))
    sizes = {"shard": place.shard, "graph": place.graph, "tensor": place.tensor}
    first, second = run_ranks(2, measured, config, layout=sizes)
    assert first == second
    assert first is not None
