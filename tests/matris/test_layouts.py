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


def test_experts_bring_the_replicas_that_they_need() -> None:
    assert parse_layout("ep2") == Layout(data=2, expert=2)
    assert parse_layout("ep4-homexgp2xtp2") == Layout(data=2, graph=2, tensor=2, expert=4, placement="fixed")
    assert parse_layout("fsdp2xep2") == Layout(shard=2, expert=2)
    assert parse_layout("ep2xdp4") == Layout(data=4, expert=2)
    for name in ("ep2", "dp4xep2-home", "fsdp2xgp2xep4"):
        assert parse_layout(name).name == name
    assert parse_layout("ep2").filled(6) == Layout(data=6, expert=2)


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
        ("pp2", "'pp2' is no axis"),
        ("tp2-home", "follows ep alone"),
        ("dp3xep2", "choose dp as a multiple of 2"),
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
