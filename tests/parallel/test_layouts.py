"""The gate: under every layout of ranks the results, gradients and weights of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.gate import run_gate, write_gate_files
from tests.parallel.ranks import run_ranks

LAYOUTS = {
    2: "dp2 fsdp2 fsdp2-keep gp2 tp2",
    4: "dp4 gp4 tp4 fsdp4 fsdp4-keep dp2xfsdp2 fsdp2xgp2 fsdp2xtp2 gp2xtp2",  # the other pairs are in those of 8
    8: "dp2xfsdp2-keepxgp2 dp2xfsdp2-keepxtp2 dp2xgp2xtp2 fsdp2xgp2xtp2",
}
EXPERT_LAYOUTS = {
    2: "ep2 ep2-home ep2xgp2 ep2-homexgp2 ep2xfsdp2 ep2-homexfsdp2 ep2xfsdp2-keep",
    4: "ep4 ep4-home ep2xtp2 ep2-homextp2 dp4xep2 dp2xep2xfsdp2 dp2xep2-homexgp2 ep4xfsdp2xgp2",
    8: "ep8-home ep8xfsdp4-keepxgp2 ep4xfsdp2xgp2xtp2 ep2-homexfsdp2xgp2xtp2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate")
    write_gate_files(path)
    return path


def assert_equal(world_size: int, folder: Path, names: list[str], runs: list[tuple[str, ...]]) -> None:
    """Each run is data, precision, and a kind of model other than dense."""
    for rows in run_ranks(world_size, run_gate, folder, names, runs, with_mesh=False, timeout=600.0):
        assert len(rows) == len(names) * len(runs)
        assert not [row for row in rows if not row.passed]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_change_nothing(folder: Path, world_size: int) -> None:
    assert_equal(world_size, folder, LAYOUTS[world_size].split(), [("mixed", "fp64")])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", EXPERT_LAYOUTS)
def test_experts_may_be_anywhere(folder: Path, world_size: int) -> None:
    """Most of the experts get no token of these data; their gradients are compared all the same."""
    assert_equal(world_size, folder, EXPERT_LAYOUTS[world_size].split(), [("mixed", "fp64", "experts")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layouts", "runs"),
    [
        ("dp2 fsdp2 fsdp2-keep gp2 tp2", [("mixed", "fp64", "experts")]),
        ("fsdp2 gp2 tp2", [("small", "fp32"), ("molecules", "fp64")]),
        ("ep2 ep2-homexgp2", [("small", "fp32", "experts"), ("molecules", "fp64", "experts")]),
    ],
)
def test_other_models_precisions_and_data(folder: Path, layouts: str, runs: list[tuple[str, ...]]) -> None:
    assert_equal(2, folder, layouts.split(), runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layouts", "kind"),
    [
        (4, ["fsdp2xgp2", "fsdp2-keepxtp2"], "dense-full"),
        (2, ["ep2-homexgp2"], "experts-full"),
        (4, ["fsdp2xgp2", "gp2xtp2"], "dense-native"),
        (2, ["ep2xgp2", "ep2-homexfsdp2"], "experts-native"),
    ],
)
def test_recomputation_and_kernels_under_layouts(folder: Path, world_size: int, layouts: list[str], kind: str) -> None:
    assert_equal(world_size, folder, layouts, [("mixed", "fp64", kind)])
