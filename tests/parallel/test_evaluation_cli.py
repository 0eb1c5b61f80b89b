"""`janus-matris eval` on ranks that share the atoms of each structure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from matris.cli import main
from matris.exported import save_model
from tests.matris.structures import tiny_model
from tests.parallel.gate import write_gate_files

RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_gate_files(tmp_path)
    save_model(tiny_model(), tmp_path / "model", provenance={})
    data, cache = str(tmp_path / "mixed.xyz"), str(tmp_path / "cache")
    return ["eval", "--model", str(tmp_path / "model"), "--data", data, "--cache_dir", cache, "--device", "cpu"]


@pytest.mark.slow
def test_errors_are_those_of_one_process(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--output", str(tmp_path / "alone.json")]) == 0
    output = tmp_path / "shared.json"
    shared = [*words, "--context_parallel_size", "2", "--graph_partitioner", "balanced", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, *RANKS, "--module", "matris", *shared],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("shared", "alone"))
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graph_partitioner", "index"], "has nothing to divide with --context_parallel_size 1"),
        (["--context_parallel_size", "2"], "1 rank"),
        (["--context_parallel_size", "0"], "0"),
    ],
)
def test_layouts_that_do_not_fit(
    words: list[str], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *options, "--output", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err
