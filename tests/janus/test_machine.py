"""Machines in YAML files, and the time of collectives on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from janus.comm.alphabeta import Place, places, seconds
from janus.comm.traffic import PlainAxis, Traffic
from janus.grid import Grid
from janus.machine import FOLDER, Band, Link, load_machine, machine_names, machine_of
from janus.telemetry.peak import known_peak


def test_machines_that_come_along() -> None:
    assert machine_names() == ("cpu2", "h100", "h200", "mi300")
    for name in machine_names():
        machine = load_machine(name)
        assert machine.sources
        assert all(band.low <= band.high for band in vars(machine.shares).values())


@pytest.mark.parametrize(
    ("name", "device"),
    [("h100", "NVIDIA H100 80GB HBM3"), ("h200", "NVIDIA H200"), ("mi300", "AMD Instinct MI300X")],
)
def test_rates_are_those_that_runs_compare_with(name: str, device: str) -> None:
    machine = load_machine(name)
    for products in ("fp32", "tf32", "bf16"):
        peak = known_peak(device, products)  # type: ignore[arg-type]
        assert peak is not None
        assert machine.flops_per_s(products) == pytest.approx(peak.flops_per_s)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values | {"name": "mine", "devices_per_node": 4, "tflops": {"fp32": 20}}))
    machine = load_machine(str(path))
    assert (machine.name, machine.devices_per_node, machine.flops_per_s("fp32")) == ("mine", 4, 20e12)
    with pytest.raises(ValueError, match=r"machine mine has no rate of bf16 products.*tflops\.bf16"):
        machine.flops_per_s("bf16")


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'h1000' is not known: choose one of cpu2, h100"):
        load_machine("h1000")
    with pytest.raises(FileNotFoundError):
        load_machine(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: no YAML"):
        load_machine(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_GB": 0}, "memory_GB is 0: it must be a positive number"),
        ({"memory_GB": "80"}, "memory_GB is '80'"),
        ({"memory_GB": float("nan")}, "memory_GB is nan"),
        ({"devices_per_node": 0}, "devices_per_node is 0: it must be a whole number"),
        ({"tflops": {"fp8": 1}}, "tflops is .*some of fp32, tf32, bf16"),
        ({"tflops": {"fp32": -1}}, r"tflops\.fp32 is -1"),
        ({"in_node": {"GB_per_s": 1}}, "in_node: missing latency_us: the fields are"),
        ({"in_node": {"GB_per_s": 1, "latency_us": -1}}, "latency_us is -1: it must be a number of at least 0"),
        ({"between_nodes": 50}, "between_nodes: 50 is no mapping"),
        ({"colour": "red"}, "unknown colour"),
        ({"sources": []}, "sources is .*not empty"),
        ({"name": 3}, "name is 3"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    with pytest.raises(ValueError, match=message):
        machine_of(values | change, "file")


@pytest.mark.parametrize("band", [[0.5], [0.7, 0.5], [0.5, 1.1], [0.0, 0.5], 0.5])
def test_shares_are_bands_below_one(band: Any) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    values["shares"] = values["shares"] | {"matrix": band}
    with pytest.raises(ValueError, match=r"shares\.matrix is"):
        machine_of(values, "file")
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    del values["shares"]["links"]
    with pytest.raises(ValueError, match="shares: missing links"):
        machine_of(values, "file")


def test_places_of_axes() -> None:
    grid = Grid.of(64, shard=4, graph=2, tensor=2, expert=8, pipeline=1)
    found = places(grid, 8)
    assert found["tensor"] == Place(size=2, in_node=2)
    assert found["graph"] == Place(size=2, in_node=2)
    assert found["shard"] == Place(size=4, in_node=2)
    assert found["replicas"] == Place(size=32, in_node=4)
    assert found["shard_replicas"] == Place(size=8, in_node=2)
    assert found["expert"] == Place(size=8, in_node=4)
    assert found["expert_replicas"] == Place(size=4, in_node=1)


def test_seconds_by_hand() -> None:
    machine = load_machine("h100")
    full = Band(low=1.0, high=1.0)
    machine = replace(
        machine,
        in_node=Link(GB_per_s=100.0, latency_us=1.0),
        between_nodes=Link(GB_per_s=10.0, latency_us=5.0),
        shares=replace(machine.shares, links=full),
    )
    traffic, axis = Traffic(), PlainAxis(name="shard", size=8)
    traffic.all_gather(axis, 3, 8e9)
    traffic.all_reduce(axis, 1, 8e9)
    traffic.all_to_all(axis, 1, 7e9)

    def times(in_node: int, *, optimistic: bool) -> list[float]:
        place = {"shard": Place(size=8, in_node=in_node)}
        return list(seconds(traffic, place, machine, optimistic=optimistic).values())

    assert times(8, optimistic=True) == pytest.approx([3 * (3e-6 + 0.07), 6e-6 + 0.14, 3e-6 + 0.07])
    assert times(8, optimistic=False) == pytest.approx([3 * (7e-6 + 0.07), 6e-6 + 0.14, 7e-6 + 0.07])
    # Over two nodes a ring has four adapters, and of an all-to-all four sevenths leave by one.
    assert times(4, optimistic=True) == pytest.approx([3 * (15e-6 + 7 / 40), 30e-6 + 14 / 40, 15e-6 + 0.4])
    assert not seconds(Traffic(), {}, machine, optimistic=True)
