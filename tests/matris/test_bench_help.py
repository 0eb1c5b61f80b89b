"""What each benchmark says of its options: every one has a text, and its default behind it where there is one."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "tools" / "bench"
VERBS = {"scaling": ("ledger", "primitives", "predict", "project")}
COMMANDS = [
    [path.stem, *verb]
    for path in sorted(BENCHES.glob("*.py"))
    if "ArgumentParser(" in path.read_text()
    for verb in ([], *([verb] for verb in VERBS.get(path.stem, ())))
]


def test_commands() -> None:
    assert ["step"] in COMMANDS
    assert ["scaling", "predict"] in COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_defaults(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module(f"tools.bench.{command[0]}")
    asked: list[argparse.ArgumentParser] = []

    def print_help(parser: argparse.ArgumentParser) -> None:
        asked.append(parser)
        print(parser.format_help())

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", print_help)
    monkeypatch.setattr(sys, "argv", [*command, "--help"])
    monkeypatch.setenv("COLUMNS", "1000")  # words are not divided
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for action in asked[0]._actions:
        assert action.help, action.dest
        default, hidden = action.default, argparse.SUPPRESS in (action.help, action.default)
        if not hidden and default is not None and default is not False:
            words = " ".join(map(str, default if isinstance(default, list) else [default]))
            assert f"{' '.join(action.help.split())} (default: {words})" in told
