"""Projected scaling: all points, in bands that begin at one; alpha and beta of measured times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import scaling
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
