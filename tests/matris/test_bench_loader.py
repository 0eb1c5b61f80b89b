"""The measuring of how fast structures come, from its options to its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import pytest

from matris.config import ModelConfig
from tests.matris.data.frames_of import copper
from tools.bench import loader


def test_all_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelConfig(
        num_layers=1, hidden_size=8, readout_hidden_sizes=(8,), pairwise_cutoff=3.0, three_body_cutoff=3.0
    )
    monkeypatch.setitem(loader.PRESETS, "s", tiny)
    ase.io.write(tmp_path / "data.xyz", [copper(seed) for seed in range(6)])
    output = tmp_path / "loader.json"
    words = f"--data {tmp_path / 'data.xyz'} --cache_dir {tmp_path / 'cache'} --output {output}"
    words += " --structures 3 --turns 1 --copies 2 --steps 2 --batch_size 2 --num_workers 0"
    assert loader.main(words.split()) == 0
    found = json.loads(output.read_text())
    assert found["data"]["structures"] == 6
    assert found["reading"]["structures_per_s"].keys() == {"store", "ase_db", "micro_batches"}
    assert all(plan["largest_over_mean"] == pytest.approx(plan["at_least"]) for plan in found["packing"])
    assert 0.0 <= found["waiting"]["0"]["second_half"] <= 1.0
    # 3 sizes and the number of the task of 8 bytes each, and whether there are 4 labels.
    assert [row["kept_bytes_per_record"] for row in found["memory"]] == [36.0]
    assert [row["records"] for row in found["memory"]] == [12]


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loader.main(["--data", "a.xyz", "--output", str(tmp_path / "none" / "a.json")])
    assert "no directory" in capsys.readouterr().err
