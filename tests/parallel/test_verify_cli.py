"""`janus-matris verify` under a launcher, and as plain python."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from janus.comm import adjoint
from janus.comm.local import run_local_ranks
from janus.mesh import Launch
from janus.training.step import StepReport
from matris.cli import main
from matris.cli import verify as verb
from matris.exported import save_model
from matris.layouts import Layout
from matris.model import MatRIS
from matris.train_config import TrainConfig
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


def test_a_model_with_tasks(tmp_path: Path) -> None:
    several = MatRIS(replace(MODEL, tasks=("pbe", "scan")), seed=1)
    save_model(several, tmp_path / "model", provenance={})
    arguments = ["--layouts", "dp2", *small(tmp_path), "--model", str(tmp_path / "model"), "--task"]
    first, _ = run_ranks(2, command, [*arguments, "scan"], False, with_mesh=False)
    assert first[0] == 0
    assert first[1].splitlines()[-1].endswith("ok")
    first, _ = run_ranks(2, command, [*arguments, "b3lyp"], False, with_mesh=False)
    assert first[0] == 2
    assert "knows pbe, scan" in first[2]


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
    homes = ["--layouts", "ep2,ep3-home", "--preset", "moe-tiny", "--cache-dir", str(tmp_path)]
    assert main(["verify", *homes]) == 2
    assert "layout ep3-home: " in capfd.readouterr().err


def test_what_the_data_cannot_check_is_said(tmp_path: Path) -> None:
    """Molecules have no stress, and these files no such labels."""
    molecules = [ase.build.molecule(name) for name in ("H2O", "CH4")]
    for atoms in molecules:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.full((len(atoms), 3), 0.1))
    ase.io.write(tmp_path / "molecules.xyz", molecules, format="extxyz")
    arguments = ["--layouts", "dp2", "--data", str(tmp_path / "molecules.xyz"), "--cache-dir", str(tmp_path)]
    status, output, errors = run_ranks(2, command, arguments, False, with_mesh=False)[0]
    assert status == 0, errors
    head, said, row = output.splitlines()
    assert said.startswith("-: stress, grad S not checked: zero or undefined throughout.")
    shown = dict(zip(head.replace("grad ", "grad_").split(), row.split(), strict=False))
    assert [name for name, value in shown.items() if value == "-"] == ["stress", "grad_S"]


def die(launch: Launch) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_that_no_other_can_name() -> None:
    with pytest.raises(ChildProcessError, match=r"of 1 ranks on this machine a signal ended rank 0 \(SIGKILL\)"):
        run_local_ranks(1, "cpu", die)


_VERIFY = verb._run


def with_a_killed_rank(launch: Launch, config: TrainConfig, layouts: Sequence[Layout], with_head: bool) -> bool:
    """As the verb does on each rank; the second is killed in its second update."""
    from matris import verify

    step = verify.train_step

    def train_step(*arguments: Any, **options: Any) -> StepReport:
        if launch.rank == 1 and arguments[1].step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **options)

    verify.train_step = train_step
    return _VERIFY(launch, config, layouts, with_head)


@pytest.mark.slow
def test_a_killed_rank_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(verb, "_run", with_a_killed_rank)
    assert main(["verify", "--layouts", "dp2", "--timeout-minutes", "1", *small(tmp_path)]) == 2
    waiting, message = capfd.readouterr().err.splitlines()
    assert waiting.startswith("waiting for 2 ranks (local ranks)")
    assert message.startswith("janus-matris verify: error: rank 1 died or stopped in step 2: no sign of life for")
