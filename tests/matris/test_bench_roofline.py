"""The table of a step's parts against their bounds: complete, and its FLOPs those of the step."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import pytest

from matris.config import ModelConfig
from matris.cost import Counts, Derivatives, step_bytes, step_flops
from tests.matris.data.frames_of import copper
from tools.bench import roofline

TINY = ModelConfig(num_layers=2, hidden_size=8, readout_hidden_sizes=(8,), pairwise_cutoff=4.0, three_body_cutoff=3.5)
FORWARD = ("geometry", "embedding", "line attention", "atom attention", "line refinement", "atom refinement", "readout")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.PRESETS, "s", TINY)


def report(output: Path, words: str) -> dict:
    fixed = f"--preset s --steps 2 --triad_mb 4 --output {output} "
    assert roofline.main((fixed + words).split()) == 0
    return json.loads(output.read_text())


def test_all_parts_of_a_step(tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(tmp_path / "roofline.json", "--cells 1")
    parts = {row["part"]: row for row in found["parts"]}
    assert list(parts) == ["graph", *FORWARD, "force pass", "second backward", "optimizer"]
    assert all(row["seconds"] > 0.0 and row["bytes"] > 0 for row in parts.values())
    counts = Counts(**found["batch"])
    flops, moved = step_flops(TINY, counts, Derivatives()), step_bytes(TINY, counts, Derivatives(), itemsize=4)
    assert sum(parts[name]["flops"] for name in FORWARD) == flops.forward
    assert (parts["force pass"]["flops"], parts["second backward"]["flops"]) == (flops.force, flops.second)
    assert found["step"]["flops"] == flops.step
    assert found["step"]["bytes"] == moved.step + parts["graph"]["bytes"] + parts["optimizer"]["bytes"]
    rate, bandwidth = found["machine"]["flops_per_s"]["fp32"], found["machine"]["bytes_per_s"]
    for name in ("line attention", "readout"):
        row = parts[name]
        assert row["bound_s"] == pytest.approx(max(row["flops"] / rate, row["bytes"] / bandwidth))
        assert row["share_of_bound"] == pytest.approx(row["bound_s"] / row["seconds"])
    assert "| second backward |" in capsys.readouterr().out


def test_blocks_that_are_recomputed_are_timed_too(tmp_path: Path, tiny: None) -> None:
    found = report(tmp_path / "roofline.json", "--cells 1 --recompute full")
    parts = {row["part"]: row for row in found["parts"]}
    assert all(parts[name]["seconds"] > 0.0 for name in FORWARD)
    assert found["recompute"] == "full"


def test_structures_without_labels_have_no_force_pass(tmp_path: Path, tiny: None) -> None:
    images = [copper(seed) for seed in range(3)]
    for image in images:
        image.calc.results = {"energy": image.calc.results["energy"]}
    ase.io.write(tmp_path / "data.xyz", images)
    words = f"--data {tmp_path / 'data.xyz'} --structures 2 --cache_dir {tmp_path / 'cache'}"
    found = report(tmp_path / "roofline.json", words)
    assert found["batch"]["structures"] == 2
    flops = {row["part"]: row["flops"] for row in found["parts"]}
    assert flops["force pass"] == 0
    assert (
        found["step"]["flops"]
        == step_flops(TINY, Counts(**found["batch"]), Derivatives(forces=False, stress=False)).step
    )


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ("--steps 0", "--steps: 0 is less than 1"),
        ("--structures 4", "belongs to --data"),
        (f"--output {tmp_path}/none/a.json", "no directory"),
    ):
        with pytest.raises(SystemExit):
            roofline.main(words.split())
        assert message in capsys.readouterr().err
