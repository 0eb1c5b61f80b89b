"""Reports of benchmarks: written whole, with what their numbers belong to; the table of kernels; the largest batch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import kernels, parallel, step
from tools.bench.report import add_output, write_report


def test_report_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_report(path, {"found": 1})
    write_report(path, {"found": 2, "versions": {"reference": "1"}})
    found = json.loads(path.read_text())
    assert found["found"] == 2
    assert found["machine"]["cpus"] >= 1
    assert found["versions"] == {"reference": "1"}
    assert list(tmp_path.iterdir()) == [path]
    write_report(None, {})


@pytest.mark.parametrize(("name", "message"), [("none/a.json", "there is no directory"), (".", "is a directory")])
def test_output_that_cannot_be_written(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_output(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--output", str(tmp_path / name)])
    assert message in capsys.readouterr().err


def test_expert_layouts_need_experts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parallel.main(["--layouts", "dp2", "ep2", "ep2-home"])
    assert "--layouts ep2 ep2-home: the model has no experts" in capsys.readouterr().err


def test_table_of_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, threads = tmp_path / "kernels.json", torch.get_num_threads()
    words = f"--rows 48 --nodes 6 --width 16 --kernels torch native --calls 2 --threads {threads} --output {output}"
    assert kernels.main(words.split()) == 0
    found = json.loads(output.read_text())
    for name, facts in found["functions"].items():
        # Of lengths and cosines there are rows of other widths.
        assert facts["bytes"] % (48 * 4 if name.startswith(("Bessel", "Fourier")) else 48 * 16 * 4) == 0
        assert facts["median_s"].keys() == {"torch", "native"}
        assert min(facts["median_s"].values()) > 0.0
    # Two operands are read and one is written, and each is 48 rows of 16.
    assert found["functions"]["gated layer norm, value"]["bytes"] == 3 * 48 * 16 * 4
    assert capsys.readouterr().out.count("\n") == 3 + len(found["functions"])


class _Linear:
    """In the place of processes: so many MiB for the first cells and for each of the others, with a bend; above 22 GiB
    nothing is measured."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, side: str, verb: str, system: str) -> None:
        assert (side, verb, system) == ("reference", "predict", "nacl:1")

    def time(self, side: str, system: str, *, steps: int, labelled: bool, most_MiB: float) -> dict:
        number = int(system.removeprefix("cells:"))
        assert steps == 1
        assert not labelled
        self.asked.append((side, number))
        each, base = {"reference": (500.0, 300.0), "full": (100.0, 300.0)}[side]
        needed = each * number + base + 2.0 * number**1.5
        return {"peak_MiB": needed} if needed <= most_MiB else {}


def test_largest_batch() -> None:
    work = _Linear()
    options = argparse.Namespace(largest=20.0, without_reference=False, variants=["full"])
    found = step._largest(options, work)
    assert found["limit_GiB"] == 20.0
    for side, most in (("reference", 39), ("full", 160)):
        entry = found["sides"][side]
        assert entry["cells"] == most
        assert entry["peak_MiB"] <= 20480.0 < entry["one_more_MiB"]
        asked = [number for name, number in work.asked if name == side]
        assert len(asked) == len(set(asked)) < 12
        assert max(asked) < 1.3 * most  # memory of this machine may end there
    assert "| full | 160 | 4.1 x |" in step._table_of_largest(found)


def test_largest_batch_where_a_guess_was_far_too_large() -> None:
    class Bent(_Linear):
        def time(self, side: str, system: str, **settings: Any) -> dict:
            number = int(system.removeprefix("cells:"))
            return {"peak_MiB": 1000.0 + number} if number < 40 else {}

    found = step._largest(argparse.Namespace(largest=20.0, without_reference=True, variants=["full"]), Bent())
    assert found["sides"]["full"] == {"cells": 39, "peak_MiB": 1039.0}
    assert "| full | 39 | 1.0 x | 1039 | a tenth over the limit and more |" in step._table_of_largest(found)


def test_step_of_ours_alone(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    words = f"--without_reference --systems nacl:1 --layers 1 --width 8 --steps 1 --threads 1 --output {output}"
    assert step.main(words.split()) == 0
    found = json.loads(output.read_text())
    assert found["versions"].keys() == {"ours"}
    assert found["allocators"].keys() == {"ours"}
    assert found["systems"][0]["relative_difference"] == {}
    assert len(found["systems"][0]["sides"]["default"]["times_s"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--reference_python --without_reference is required"),
        (["--reference_python", "python", "--without_reference"], "not allowed with argument --reference_python"),
        (["--reference_python", "none/python"], "--reference_python none/python: no Python that has PyPI matris 0.1.0"),
        (["--reference_python", sys.executable], "no Python that has PyPI matris 0.1.0"),
        (["--without_reference", "--width", "0"], "model.hidden_size is 0: it must be at least 1"),
        (["--without_reference", "--three_body_cutoff", "9"], "model.three_body_cutoff is 9.0 A"),
        (["--without_reference", "--largest", "-1"], "--largest is -1: give a memory in GiB"),
        (["--without_reference", "--largest", "1", "--steps", "5"], "leave out --steps"),
    ],
)
def test_step_with_or_without_the_reference(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(words)
    assert message in capsys.readouterr().err


def test_no_batch_is_small_enough() -> None:
    options = argparse.Namespace(largest=1.0, without_reference=False, variants=["full"])
    with pytest.raises(SystemExit, match="two cells take more than --largest 1 GiB"):
        step._largest(options, _Linear())
