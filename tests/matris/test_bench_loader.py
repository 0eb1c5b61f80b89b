"""The measuring of how fast structures come, from its options to its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import ase.db
import ase.io
import pytest

from matris.config import ModelConfig
from matris.data.dataset import open_dataset
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
    ways = {"store", "store_one_by_one", "ase_db", "ase_db_unasked", "micro_batches"}
    assert found["reading"]["structures_per_s"].keys() == ways
    assert found["reading"]["store_over_ase_db"]["median"] > 0.0
    assert all(plan["largest_over_mean"] == pytest.approx(plan["at_least"]) for plan in found["packing"])
    assert 0.0 <= found["waiting"]["0"]["second_half"] <= 1.0
    # 3 sizes and the number of the task of 8 bytes each, and whether there are 4 labels.
    assert [row["kept_bytes_per_record"] for row in found["memory"]] == [36.0]
    assert [row["records"] for row in found["memory"]] == [12]


def test_store_and_ase_db_hold_the_same(tmp_path: Path) -> None:
    """What is compared by time is compared by content first: every number, and every label that there is."""
    ase.io.write(tmp_path / "data.xyz", [copper(seed) for seed in range(3)])
    dataset = open_dataset(
        [tmp_path / "data.xyz"], pairwise_cutoff=3.0, three_body_cutoff=3.0, cache_dir=tmp_path / "cache"
    )
    with ase.db.connect(tmp_path / "data.db") as db:
        for index in range(3):
            db.write(loader.as_atoms(dataset[index]))
        stored = [db.get(row).toatoms() for row in (1, 2, 3)]
    assert stored[0].calc.results.keys() >= {"energy", "forces", "stress"}
    for index in range(3):
        loader.check_same(dataset[index], stored[index])
        with pytest.raises(ValueError, match=r"data\.xyz:\d: store and ASE db differ in cell, energy, forces"):
            loader.check_same(dataset[index], stored[index - 1])
        stored[index].calc.results["stress"] += 1e-12
        with pytest.raises(ValueError, match="differ in stress"):
            loader.check_same(dataset[index], stored[index])


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loader.main(["--data", "a.xyz", "--output", str(tmp_path / "none" / "a.json")])
    assert "no directory" in capsys.readouterr().err
