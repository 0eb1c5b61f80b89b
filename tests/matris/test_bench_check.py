"""The comparison of a training step's counts with the stored ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from unittest.mock import Mock

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
    found["cases"][CASE]["control_median_over_least"] = 1.0  # whatever else ran here
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


def test_times_of_a_busy_machine_are_not_compared(found: dict) -> None:
    for key, value, told in (
        ("control_median_over_least", 1.3, "something else runs here"),
        ("control_s", 2.0 * found["cases"][CASE]["control_s"], "another processor, or a busy one"),
    ):
        busy = copy.deepcopy(found)
        busy["cases"][CASE] |= {"step_over_control": 1e9, "control_median_over_least": 1.0, key: value}
        worse, lines = check.compare(busy, found, margin=0.1)
        assert not worse
        assert told in lines[-2]


def test_wrong_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "measure", Mock(side_effect=AssertionError("nothing is measured before")))
    path = tmp_path / "baseline.json"
    with pytest.raises(ValueError, match="does not exist: make it with --update"):
        check.main(["--baseline", str(path)])
    for text, told in (("{", "is no JSON"), ("[]", "is no report"), ('{"cases": {}}', "is no report")):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            check.main(["--baseline", str(path)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--margin", "nan"], "a share from 0"),
        (["--margin", "-1"], "a share from 0"),
        (["--update", "--rounds", "0"], "without times"),
    ],
)
def test_wrong_options(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(words)
    assert told in capsys.readouterr().err
