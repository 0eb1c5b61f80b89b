"""`janus-matris verify` under a launcher, and as plain python."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from janus.comm import adjoint
from janus.mesh import Launch
from matris.cli import main
from matris.exported import save_model
from matris.model import MatRIS
from tests.parallel.gate import MODEL, write_gate_files
from tests.parallel.ranks import run_ranks


def command(launch: Launch, arguments: list[str], broken: bool) -> tuple[int, str, str]:
    """The verb on a rank of a launch."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        if broken:
            patch.setattr(adjoint._Copy, "backward", lambda ctx, grad: (grad, None))
        return main(["verify", *arguments]), output.getvalue(), errors.getvalue()


def small(folder: Path) -> list[str]:
    write_gate_files(folder)
    return ["--data", str(folder / "small.xyz"), "--cache-dir", str(folder), "--terms", "energy", "forces"]


def test_under_a_launcher(tmp_path: Path) -> None:
    save_model(MatRIS(MODEL, seed=1), tmp_path / "model", provenance={})
    arguments = ["--layouts", "dp1,tp2,dp3", *small(tmp_path), "--model", str(tmp_path / "model")]
    first, second = run_ranks(2, command, arguments, False, with_mesh=False)
    assert (first[0], second[0]) == (1, 1)  # one of them did not run
    left_out, head, replicas, tensor = first[1].splitlines()
    assert left_out == "not run: dp3, for its 3 ranks do not divide 2"
    assert head.split()[:4] == ["layout", "ranks", "energy", "forces"]
    assert replicas.split()[:2] == ["dp2", "2"]
    assert tensor.split()[:2] == ["tp2", "2"]
    assert replicas.endswith("ok")
    assert second[1] == ""


def test_exit_status_of_a_failure_and_of_mistakes(tmp_path: Path) -> None:
    arguments = small(tmp_path)
    for status, output, _ in run_ranks(2, command, ["--layouts", "tp2", *arguments], True, with_mesh=False):
        assert status == 1
        assert not output or output.splitlines()[-1].endswith("FAIL, allowed is 1e-10")
    found = run_ranks(2, command, ["--layouts", "tp4", *arguments], False, with_mesh=False)
    assert [status for status, _, _ in found] == [2, 2]
    assert "none of the layouts tp4 fits 2 ranks" in found[0][2]
    missing = ["--layouts", "tp2", "--data", str(tmp_path / "missing.xyz"), "--cache-dir", str(tmp_path)]
    first, second = run_ranks(2, command, missing, False, with_mesh=False)
    assert (first[0], second[0]) == (2, 2)
    assert "missing.xyz" in first[2]
    assert second[2] == ""


@pytest.mark.slow
def test_as_plain_python(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts its ranks itself, and takes the built-in data."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["verify", "--layouts", "gp2", "--cache-dir", str(tmp_path), "--batch-size", "2"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].split()[:2] == ["gp2", "2"]
    missing = ["--data", str(tmp_path / "missing.xyz"), "--cache-dir", str(tmp_path)]
    assert main(["verify", "--layouts", "dp1", *missing]) == 2
    assert "missing.xyz" in capfd.readouterr().err
