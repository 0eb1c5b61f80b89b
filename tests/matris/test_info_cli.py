"""`janus-matris info`."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from matris.cli import main
from matris.elements import SYMBOLS
from matris.exported import save_model
from matris.model import MatRIS
from matris.plots import _place
from tests.matris.structures import EXPERTS
from tests.matris.structures import tiny_model as make_model


def test_directory(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(tiny_model_directory), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["hidden_size"] == 8
    assert facts["provenance"] == {"made_by": "tests"}
    assert main(["info", "--model", str(tiny_model_directory)]) == 0
    shown = capsys.readouterr().out
    assert "H..Pu (94)" in shown
    assert "Cu                       -3.5" in shown


def test_settings_of_the_run_are_one_per_line(
    tmp_path: Path, tiny_model: MatRIS, capsys: pytest.CaptureFixture[str]
) -> None:
    provenance = {"settings": {"data": {"train": ["a.xyz", "b.xyz"], "max_atoms": None}, "loss": {}}, "step": 12000}
    save_model(tiny_model, tmp_path / "model", provenance=provenance)
    assert main(["info", "--model", str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("provenance:")
    assert lines[start + 1 : start + 7] == [
        "  settings:",
        "    data:",
        "      train                a.xyz,b.xyz",
        "      max_atoms            None",
        "    loss                   {}",
        "  step                     12 000",
    ]


def test_elements_are_listed(tmp_path: Path, tiny_model: MatRIS, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(tiny_model)
    model.elements = (1, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53)
    save_model(model, tmp_path / "model", provenance={})
    assert main(["info", "--model", str(tmp_path / "model")]) == 0
    assert "H,C,N,O,F,Si,P,S,Cl,Br,I" in capsys.readouterr().out


def test_each_task_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MatRIS(dataclasses.replace(EXPERTS, tasks=("pbe", "wb97m", "scan"), charge_tasks=("wb97m",)), seed=0)
    model.set_reference_energies({8: -432.5, 92: -1.25}, "pbe")
    model.set_reference_energies({1: -13.5}, "wb97m")
    model.elements_of_task |= {"pbe": (1, 6, 7, 8, 9, 14, 15, 16, 17, 35, 92), "wb97m": (1,)}
    save_model(model, tmp_path / "model", provenance={})
    assert main(["info", "--model", str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("reference_energies:")
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 7]] == [
        "pbe:",
        "O -432.5",
        "U -1.25",
        "wb97m:",
        "H -13.5",
        "scan all zero",
    ]
    assert "  tasks                    pbe,wb97m,scan" in lines
    assert "  charge_tasks             wb97m" in lines
    start = lines.index("task_elements:")
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 4]] == [
        "pbe H,C,N,O,F,Si,P,S,Cl,Br,U",
        "wb97m H",
        "scan H..Og (118)",
    ]
    assert main(["info", "--model", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reference_energies"]["pbe"]["U"] == -1.25


def test_released_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model.num-layers", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 10443505


def test_preset_with_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "s", "--model.num_layers=1", "--model.hidden_size", "16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"]["num_layers"], facts["model"]["hidden_size"]) == (1, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.no_field", "1"], "no_field"),
        (["--model.num_layers", "x"], "num_layers"),
        (["--model.num_layers", "0"], "num_layers"),
        (["--preset", "none"], "none"),
        (["--model", "."], "not a model directory"),
        (["--model", ".", "--model.num_layers", "1"], "complete by itself"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["info", *arguments])
    except SystemExit as end:  # the option parser's own way out
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_picture_of_the_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(EXPERTS), tmp_path / "experts", provenance={})
    save_model(make_model(), tmp_path / "dense", provenance={})
    picture = tmp_path / "experts.png"
    assert main(["info", "--model", str(tmp_path / "experts"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words, message in (
        (["--model", str(tmp_path / "dense")], "no experts to draw"),
        (["--preset", "moe-s"], "give --model DIR"),
    ):
        try:
            status = main(["info", *words, "--plot", str(tmp_path / "none.png")])
        except SystemExit as end:
            status = end.code
        assert status == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_every_element_has_a_place_of_its_own() -> None:
    places = {_place(number): SYMBOLS[number] for number in range(1, 119)}
    assert len(places) == 118
    assert [places[column, 3] for column in (0, 2, 16, 17)] == ["K", "Sc", "Br", "Kr"]


def test_memory_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    def memory(layout: str) -> tuple[int, dict[str, int]]:
        assert main(["info", "--preset", "moe-tiny", "--layout", layout, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        return facts["total_parameters"], facts["training_memory_per_rank"]

    parameters, alone = memory("dp4")
    frozen = 118  # reference energies, fp64: neither gradient nor moments nor average
    assert alone["held_bytes"] == 5 * 4 * (parameters - frozen) + 8 * frozen
    assert alone["gathered_bytes"] == 0
    assert 4 * (parameters - frozen) < alone["waiting_bytes"] < 1.5 * 4 * (parameters - frozen)
    assert alone["total_GiB"] == pytest.approx((alone["held_bytes"] + alone["waiting_bytes"]) / 2**30, abs=0.01)
    _, sharded = memory("fsdp4")
    assert sharded["held_bytes"] == pytest.approx(alone["held_bytes"] / 4, rel=1e-3)
    assert sharded["gathered_bytes"] > 2 * 4 * (parameters - frozen)
    assert sharded["waiting_bytes"] < 1e-3 * alone["waiting_bytes"]
    _, split = memory("fsdp4xtp2")
    assert split["ranks"] == 8
    assert 0.5 < split["held_bytes"] / sharded["held_bytes"] < 0.6
    assert main(["info", "--preset", "moe-tiny", "--layout", "fsdp4xpp2"]) == 2
    assert "no axis" in capsys.readouterr().err
    four, eight, home = (memory(name)[1]["gathered_experts_bytes"] for name in ("ep4", "ep8", "ep4-home"))
    assert four == 2 * eight > 0  # two and one of the eight experts of each site
    assert home == 0
    for layout in ("tp3", "ep3-home"):
        assert main(["info", "--preset", "moe-tiny", "--layout", layout]) == 2
        assert "does not divide" in capsys.readouterr().err
