"""The picture of step times: made of whole reports, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import figures


def _report(path: Path, system: str, sides: dict[str, tuple[float, float]]) -> str:
    ratios = {side: {"faster": faster, "memory": memory} for side, (faster, memory) in sides.items()}
    path.write_text(json.dumps({"systems": [{"system": system, "num_atoms": 8, "num_angles": 2448, "sides": ratios}]}))
    return str(path)


def test_picture_of_two_reports(tmp_path: Path) -> None:
    reports = [
        _report(tmp_path / "a.json", "nacl:1", {"reference": (1.0, 1.0), "default": (2.0, 0.4), "native": (4.1, 0.3)}),
        _report(tmp_path / "b.json", "tio2:1", {"reference": (1.0, 1.0), "native": (4.9, 0.2)}),
    ]
    output = tmp_path / "step.png"
    assert figures.main([*reports, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"sides": {}}', '{"systems": [{}]}', '{"systems": 1}', '{"systems": [{"system": "a", "sides": []}]}'],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is not a report of step times"):
        figures.read_systems(path)


@pytest.mark.parametrize("side", ["default", "reference"])
def test_one_side_alone_has_no_ratio(tmp_path: Path, side: str) -> None:
    path = _report(tmp_path / "a.json", "nacl:1", {side: (1.0, 1.0)})
    with pytest.raises(ValueError, match=r"a\.json has no times of the reference and ours: make it with"):
        figures.read_systems(Path(path))


def test_report_of_no_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"systems": []}')
    with pytest.raises(ValueError, match=r"a\.json has no times of the reference and ours"):
        figures.read_systems(path)
