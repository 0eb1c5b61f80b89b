"""The comparison of a training step's counts with the stored ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tools.bench import check

CASE = "dense, 8 atoms"


@pytest.fixture(scope="module")
def found() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CASES", {CASE: check.CASES[CASE]})
        return check.measure(rounds=1)


def test_counts_are_the_same_each_time(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CASES", {CASE: check.CASES[CASE]})
    again = check.measure(rounds=0)
    worse, lines = check.compare(again, found, margin=0.1)
    assert not worse
    assert len(lines) == 6
    assert lines[-1] == "nothing is worse"


def test_stored_counts_are_those_of_all_cases() -> None:
    stored = json.loads(check.BASELINE.read_text())
    assert stored["cases"].keys() == check.CASES.keys()


def test_stored_counts_are_those_of_now(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 atoms as well, where results are large enough to be made again."""
    stored = json.loads(check.BASELINE.read_text())
    versions = [report["versions"]["torch"].partition("+")[0] for report in (stored, found)]
    if len(set(versions)) > 1:
        pytest.skip(f"stored are counts of torch {versions[0]}, here is {versions[1]}")
    large = "dense, 64 atoms"
    monkeypatch.setattr(check, "CASES", {large: check.CASES[large]})
    for case, now in ((CASE, found), (large, check.measure(rounds=0))):
        _, lines = check.compare(now, stored | {"cases": {case: stored["cases"][case]}}, margin=1e9)
        assert not [line for line in lines if "WAS" in line]


def test_other_counts_and_slower_steps_are_noticed(found: dict) -> None:
    for key in found["cases"][CASE]["counts"]:
        other = copy.deepcopy(found)
        other["cases"][CASE]["counts"][key] = round(1.02 * other["cases"][CASE]["counts"][key])
        worse, lines = check.compare(other, found, margin=0.1)
        assert worse
        assert [line for line in lines if "WAS" in line] == [
            f"{CASE}: {key} {other['cases'][CASE]['counts'][key]}  WAS {found['cases'][CASE]['counts'][key]}: "
            "--update if that is meant"
        ]
    slower = copy.deepcopy(found)
    slower["cases"][CASE]["step_over_control"] *= 1.11
    assert check.compare(slower, found, margin=0.1)[0]
    assert not check.compare(slower, found, margin=0.12)[0]


def test_what_cannot_be_compared_is_said(found: dict) -> None:
    other = {**found, "versions": {"torch": "0"}, "machine": {"processor": "abacus"}}
    worse, lines = check.compare(other, found, margin=0.1)
    assert worse
    told = ["counts are not compared", "times are not compared", "NOTHING WAS COMPARED"]
    assert [line.split(":")[0] for line in lines] == told
    build = {**found["versions"], "torch": found["versions"]["torch"].partition("+")[0] + "+another"}
    assert not check.compare({**found, "versions": build}, found, margin=0.1)[0]
    assert check.compare({**found, "cases": {}}, found, margin=0.1)[0]
    new = {**found, "cases": {"new": found["cases"][CASE]}}
    assert check.compare(new, found, margin=0.1)[0]


def test_missing_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--baseline", str(tmp_path / "none.json")])
    assert "make it with --update" in capsys.readouterr().err
