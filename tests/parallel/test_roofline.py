"""The part of a step that communicates, against the bandwidth of two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from janus.mesh import Mesh
from matris.config import ModelConfig
from matris.model import MatRIS
from tests.parallel.ranks import run_ranks
from tools.bench import roofline

TINY = ModelConfig(num_layers=1, hidden_size=8, readout_hidden_sizes=(8,), pairwise_cutoff=4.0, three_body_cutoff=3.5)


def measured(mesh: Mesh) -> dict[str, Any]:
    roofline.PRESETS["s"] = TINY
    words = "--preset s --cells 1 --steps 1 --triad_mb 1 --message_mb 1"
    return roofline.measure(roofline.parsed(words.split()), mesh)


def test_communication() -> None:
    found, other = run_ranks(2, measured)
    speeds = found["machine"]["collectives_bytes_per_s"]
    assert speeds.keys() == {"all_reduce", "all_gather", "all_to_all"}
    (row,) = (row for row in found["parts"] if row["part"] == "communication")
    model = MatRIS(TINY)
    model.readout.magmom.requires_grad_(False)
    assert row["bytes"] == sum(value.nbytes for value in model.parameters() if value.requires_grad)
    assert row["bound_s"] == pytest.approx(row["bytes"] / speeds["all_reduce"])
    assert found["machine"]["ranks"] == 2
    assert [part["part"] for part in other["parts"]] == [part["part"] for part in found["parts"]]
