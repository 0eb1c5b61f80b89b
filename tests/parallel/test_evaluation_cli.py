"""`janus-matris eval` on ranks that share the atoms of each structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from janus.mesh import Launch
from matris.cli import main
from matris.exported import save_model
from tests.matris.structures import tiny_model
from tests.parallel.gate import write_gate_files
from tests.parallel.ranks import run_ranks


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_gate_files(tmp_path)
    save_model(tiny_model(), tmp_path / "model", provenance={})
    data, cache = str(tmp_path / "mixed.xyz"), str(tmp_path / "cache")
    return ["eval", "--model", str(tmp_path / "model"), "--data", data, "--cache_dir", cache, "--device", "cpu"]


def command(_: Launch, words: list[str]) -> int:
    return main(words)


def numbers(report: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All entries, of the inner dictionaries too, by their path."""
    entries: dict[str, Any] = {}
    for name, value in report.items():
        entries |= numbers(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return entries


@pytest.mark.parametrize("partitioner", ["morton", "balanced"])
def test_errors_are_those_of_one_process(words: list[str], tmp_path: Path, partitioner: str) -> None:
    assert main([*words, "--output", str(tmp_path / "alone.json")]) == 0
    shared = [*words, "--context_parallel_size", "2", "--graph_partitioner", partitioner, "--batch_size", "3"]
    shared += ["--output", str(tmp_path / "shared.json")]
    assert run_ranks(2, command, shared, with_mesh=False) == [0, 0]
    found, expected = (numbers(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("shared", "alone"))
    assert found.keys() == expected.keys()
    assert {"energy_mae_meV_per_atom", "forces_rmse_meV_per_A", "stress_mae_meV_per_A3"} <= expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), name
    assert (tmp_path / "shared.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph_partitioner", "index"], "--graph_partitioner index has nothing to divide"),
        (["--context_parallel_size", "2"], "1 ranks do not divide into shard 1 x graph 2 x tensor 1 = 2 ranks"),
        (["--context_parallel_size", "0"], "parallel size of the graph axis is 0"),
    ],
)
def test_layouts_that_do_not_fit(
    words: list[str], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *options, "--output", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
