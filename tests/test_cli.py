"""The command's dispatcher, and what every verb has in common."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from janus import __version__
from matris import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb `probe` that returns its number of arguments."""
    module = types.ModuleType("probe_module")
    module.main = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_module", module)
    monkeypatch.setitem(cli.VERBS, "probe", ("probe_module", "for the test"))
    monkeypatch.delenv("JANUS_DEBUG", raising=False)
    return module


def failing(error: BaseException):
    def main(_: list[str]) -> int:
        raise error

    return main


def test_option_names_are_normalised_and_values_are_not() -> None:
    given = ["in-put.xyz", "--dry-run", "--data.max-atoms=1-2", "--output", "a-b", "-x-y", "--", "--data-file"]
    wanted = ["in-put.xyz", "--dry_run", "--data.max_atoms=1-2", "--output", "a-b", "-x-y", "--", "--data-file"]
    assert cli.normalise_option_names(given) == wanted


def test_status_of_the_verb(verb: types.ModuleType) -> None:
    assert cli.main(["probe", "a", "b"]) == 2
    assert cli.main(["probe"]) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("num_layers is 0: it must be positive"), "num_layers is 0: it must be positive"),
        (FileNotFoundError(2, "No such file or directory", "x.xyz"), "x.xyz: No such file or directory"),
        (ValueError(), "ValueError"),
    ],
)
def test_users_mistake_is_one_line(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    verb.main = failing(error)  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr() == ("", f"janus-matris probe: error: {message}\n")


def test_traceback_on_demand(verb: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    verb.main = failing(ValueError("wrong"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["probe", "--debug"])
    monkeypatch.setenv("JANUS_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["probe"])


def test_bug_is_not_hidden(verb: types.ModuleType) -> None:
    verb.main = failing(TypeError("a bug"))  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        cli.main(["probe"])


def test_interrupt(verb: types.ModuleType) -> None:
    verb.main = failing(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 130


def test_unknown_verb_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"janus-matris {__version__}\n"


def test_help_names_every_verb() -> None:
    done = help_without_torch()
    assert all(re.search(rf"^  {verb} ", done, re.MULTILINE) for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb: str) -> None:
    assert f"janus-matris {verb}" in help_without_torch(verb)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_unknown_option_is_refused(verb: str) -> None:
    command = [sys.executable, "-m", "matris", verb, "--no-such-option", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_broken_pipe_is_quiet() -> None:
    code = f"{sys.executable} -m matris --help | (sleep 0.2; true)"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def help_without_torch(*verb: str) -> str:
    """The text of --help, which must be quick: what costs seconds to import is not imported for it."""
    code = (
        "import sys; from matris.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "slow = {'torch', 'megatron', 'ase', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(status or (f'imports {sorted(slow)}' if slow else 0))"
    )
    command = [sys.executable, "-c", code, *verb, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quiet() -> None:
    code = "import matris.calculator, matris.run"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
