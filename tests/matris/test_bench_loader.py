"""The measuring of how fast structures come, from its options to its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from janus.data.store import StoreWriter
from matris.config import ModelConfig
from matris.data.dataset import ROW, open_dataset
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
    assert [row["shared_bytes_per_record"] for row in found["memory"]] == [0.0]  # a small data set
    assert [row["records"] for row in found["memory"]] == [12]


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """Of a rank that opens a large data set, plans batches and reads: what is known of each record is in a file."""
    atoms = Atoms("Cu", positions=np.zeros((1, 3)))
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    ase.io.write(tmp_path / "data.xyz", [atoms] * 1500, format="extxyz")
    cutoffs = {"pairwise_cutoff": 2.0, "three_body_cutoff": 2.0}
    (reader,) = open_dataset([tmp_path / "data.xyz"], **cutoffs, cache_dir=tmp_path / "cache").stores
    found = []
    for copies in (100, 400):
        store = tmp_path / f"{copies}.h5"
        with StoreWriter(store, reader.fields) as writer:
            for _ in range(copies):
                writer.append_store(reader)
            writer.finish(reader.attributes)
        found.append(loader.measure_memory(store, tmp_path / f"cache_{copies}"))
    few, many = found
    assert (few["records"], many["records"]) == (150_000, 600_000)
    assert few["shared_bytes_per_record"] == many["shared_bytes_per_record"] == ROW.itemsize == 40
    # A byte of each record; its place in an order would be 8.
    assert many["opened_bytes"] - few["opened_bytes"] < 450_000
    # HDF5 keeps what it has read of its indices, up to a limit.
    assert many["after_reading_bytes"] - few["after_reading_bytes"] < 8 * 450_000


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
