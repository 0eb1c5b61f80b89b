"""Projected scaling: all points, in bands that begin at one; alpha and beta of measured times."""

from __future__ import annotations

import json
import multiprocessing
import os
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import ranks  # noqa: F401  # says what the server of all processes imports first
from tools.bench import parallel, scaling, two_ranks
from tools.bench.two_ranks import fit


def test_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "project.json", tmp_path / "scaling.png"
    words = f"project --models moe-tiny --ranks 8 16 64 --strong_batch 16 --output {output} --plot {picture}"
    assert scaling.main(words.split()) == 0
    found = json.loads(output.read_text())
    assert found["projected"] is True
    assert picture.read_bytes().startswith(b"\x89PNG")
    weak, strong = (found["models"]["moe-tiny"][kind] for kind in ("weak", "strong"))
    assert [point["ranks"] for point in weak] == [point["ranks"] for point in strong] == [8, 16, 64]
    assert [point["global_batch"] for point in weak] == [32, 64, 256]
    assert {point["global_batch"] for point in strong} == {16}
    for points in (weak, strong):
        assert points[0]["scaling"] == {"low": 1.0, "high": 1.0}
        assert all(0.0 < point["scaling"]["low"] <= point["scaling"]["high"] for point in points)
    assert weak[0]["axes"]["graph"] == weak[-1]["axes"]["graph"]  # replicas of one layout
    assert weak[-1]["axes"]["data"] == 8 * weak[0]["axes"]["data"]
    assert strong[-1]["scaling"]["high"] < 1.0
    assert capsys.readouterr().out.count("scaling, projected") == 2


def test_alpha_and_beta() -> None:
    sizes = [64.0, 1e3, 1e5, 1e7]
    assert fit(sizes, [1e-4 + 2e-9 * size for size in sizes]) == pytest.approx((1e-4, 2e-9))
    alpha, beta = fit(sizes, [1e-4, 1e-4, 1e-4, 0.9e-4])
    assert alpha == pytest.approx(1e-4, rel=0.05)
    assert beta == 0.0
    alpha, beta = fit(sizes, [2e-9 * size * (1.0 + 1e-3 * index) for index, size in enumerate(sizes)])
    assert alpha >= 0.0
    assert beta == pytest.approx(2e-9, rel=0.01)


def test_a_step_is_predicted_from_computation_and_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = {"collectives": {"all_reduce": {"alpha_s": 0.01, "beta_s_per_byte": 1e-6}}}
    alone = {
        "times_s": [],
        "computing_s": 2.0,
        "calls": {"tensor/all_reduce": 5},
        "wire_bytes": {"tensor/all_reduce": 1e5},
    }
    measured = {"control": 1.0, "tp2": 2.2}
    monkeypatch.setattr(two_ranks, "_alone", lambda *_: alone)
    monkeypatch.setattr(two_ranks, "_median", lambda name, *_: measured[name])
    monkeypatch.setattr(parallel, "_write_data", lambda *_: None)
    report = two_ranks.predict(Namespace(layouts=["tp2"], repeat=1, structures=1), machine)
    found = report["layouts"]["tp2"]
    assert found["predicted_s"] == pytest.approx(2.0 + 5 * 0.01 + 1e5 * 1e-6)
    assert found["difference"] == pytest.approx(2.2 / found["predicted_s"] - 1.0)
    assert report["control_s"] == report["control_again_s"] == 1.0


@pytest.mark.parametrize("layout", ["fsdp2-keep", "tp2"])
def test_a_rank_computes_without_the_other(tmp_path: Path, layout: str) -> None:
    parallel._write_data(tmp_path / "train.xyz", 1, 2)
    task = {"layout": layout, "folder": str(tmp_path), "layers": 1, "width": 8, "structures": 1, "steps": 2}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        found = pool.submit(_alone_as_rank_0, task).result(timeout=120.0)
    assert len(found["times_s"]) == 2
    axes = {key.split("/")[0] for key in found["calls"]}
    assert ("tensor" if layout == "tp2" else "shard") in axes
    assert all(found["wire_bytes"][key] > 0 for key in found["calls"])


def _alone_as_rank_0(task: dict[str, Any]) -> dict[str, Any]:
    os.environ["RANK"] = "0"
    return two_ranks._step_alone(task)
