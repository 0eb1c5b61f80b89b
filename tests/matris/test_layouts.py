"""Layouts by name."""

from __future__ import annotations

import pytest

from matris.layouts import Layout, parse_layout, parse_layouts
from matris.train_config import ParallelConfig


def test_names_are_read_and_written() -> None:
    assert parse_layout("tp2xgp3") == Layout(tensor=2, graph=3)
    assert parse_layout("tp2xgp3").name == "gp3xtp2"
    assert parse_layouts("dp2, fsdp4-keepxdp2") == (Layout(data=2), Layout(shard=4, data=2, policy="keep"))
    assert [layout.num_ranks for layout in parse_layouts("dp2,fsdp2xdp2xtp2,dp1")] == [2, 8, 1]
    for name in ("dp2", "dp2xfsdp4-keep", "dp2xfsdp2xgp2xtp2"):
        assert parse_layout(name).name == name
    assert parse_layout("dp1").name == "one"


def test_replicas_fill_the_ranks() -> None:
    assert parse_layout("tp2").filled(6) == Layout(tensor=2, data=3)
    assert parse_layout("dp2xtp2").filled(4) == Layout(tensor=2, data=2)
    assert parse_layout("tp4").filled(6) is None


def test_settings_of_a_run() -> None:
    parallel = parse_layout("fsdp2-keepxgp3xtp4").applied(ParallelConfig(graph_partitioner="balanced"))
    assert parallel == ParallelConfig(
        tensor_model_parallel_size=4,
        context_parallel_size=3,
        fully_sharded_size=2,
        sharding_policy="keep",
        graph_partitioner="balanced",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ep2", "'ep2' is no axis"),
        ("dp2,", "'' is no axis"),
        ("tp2*gp2", "no axis with a number"),
        ("dp2xdp2", "names dp twice"),
        ("tp0", "tp0 has no rank"),
        ("tp2-keep", "follows fsdp alone"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layouts(text)
