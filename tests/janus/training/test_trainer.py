"""The loop: what it writes, and that a run that was interrupted anyhow ends with the same bits."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from janus.checkpoint import CheckpointError, read_directory, write_directory
from janus.checkpoint.directory import write_pieces
from janus.mesh import Mesh
from janus.optim import AdamWConfig, Schedule
from janus.telemetry import Peak
from janus.telemetry.csv_log import read_csv
from janus.training import trainer as trainer_module
from janus.training.learner import Learner
from janus.training.step import NonFiniteError
from janus.training.trainer import Outcome, Trainer, TrainerConfig
from tests.janus.toy import ToyTask, toy_step, toy_training, toy_validation

STEPS = 9


def run(
    directory: Path,
    *,
    steps: int = STEPS,
    delay: float = 0.0,
    bad: int = -1,
    bad_validation: bool = False,
    resume: str = "auto",
    seed: int = 0,
    save_interval: int = 2,
    settings: dict[str, Any] | None = None,
    log_interval: int = 1,
    flops: float = 0.0,
    peak: Peak | None = None,
) -> Outcome:
    task = ToyTask(seed, noise=0.1, delay=delay, flops=flops)
    schedule = Schedule(lr=1e-2, num_steps=steps, warmup_steps=2)
    trainer = Trainer(
        task=task,
        learner=Learner(task.model, AdamWConfig(), schedule, ema_decay=0.9, clip_grad=1.0, mesh=Mesh()),
        train=toy_training(bad=bad),
        valid=toy_validation(bad=102 if bad_validation else -1),
        config=TrainerConfig(
            num_steps=steps, eval_interval=3, save_interval=save_interval, log_interval=log_interval, resume=resume
        ),
        mesh=Mesh(),
        directory=directory,
        settings=settings or {"model": {"width": 8}, "optim": {"lr": 1e-2}},
        provenance={"code": "toy"},
        peak=peak,
    )
    trainer.resume()
    return trainer.run()


def final_state(directory: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors, _ = read_directory(directory / "checkpoints" / f"step_{step:08d}")
    return tensors


def assert_same_bits(first: Path, second: Path) -> None:
    one, other = final_state(first), final_state(second)
    assert one.keys() == other.keys()
    assert len(one) == 6 + 1 + 7 + 2 * 7  # weights, the unused one, averages, moments
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert run(directory).step == STEPS
    return directory


def test_run_directory(uninterrupted: Path) -> None:
    rows = read_csv(uninterrupted / "log.csv")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    evaluations = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6, 9]
    assert evaluations[-1]["valid_loss"] < evaluations[0]["valid_loss"]
    assert all(row["lr"] > 0 and row["grad_norm"] > 0 and row["edges_per_s"] > 0 for row in rows if "loss" in row)
    assert (uninterrupted / "best" / "config.json").is_file()
    assert '"code": "toy"' in (uninterrupted / "last" / "config.json").read_text()
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000009"]


class Clock:
    """Each look at it takes a second. The trainer's; a stopwatch has one of its own."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now

    monotonic = staticmethod(time.monotonic)


def test_speeds_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A step waits for one second and works for one, as its clock goes, on two micro-batches of 300 FLOPs; the first
    step does not count."""
    ranks: list[list[float]] = []

    def of_two_ranks(own: list[float], mesh: Mesh) -> np.ndarray:
        ranks.append(own)
        return np.array([own, [3.0 * own[0], 2.0]])  # the other computes longer, and waits less

    monkeypatch.setattr(trainer_module, "time", Clock())
    monkeypatch.setattr(trainer_module, "gather_numbers", of_two_ranks)
    peak = Peak(flops_per_s=1000.0, origin="as the test says")
    assert run(tmp_path, log_interval=4, flops=300.0, peak=peak).step == STEPS
    rows = [row for row in read_csv(tmp_path / "log.csv") if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 9]
    for row, steps in zip(rows, (3, 4, 1), strict=True):
        assert row["flops_per_s"] == 600.0 / 2.0
        assert row["mfu"] == 300.0 / 1000.0
        assert row["straggler_ratio"] == pytest.approx(1.5)
        assert row["data_wait"] == max(steps, 2.0) / (2.0 * steps)
    assert [own[1] for own in ranks] == [3.0, 4.0, 1.0]
    assert "as the test says" in capsys.readouterr().out


def test_speeds_without_formulas(uninterrupted: Path) -> None:
    rows = [row for row in read_csv(uninterrupted / "log.csv") if "loss" in row]
    assert all("flops_per_s" not in row and "mfu" not in row for row in rows)
    assert all(row["straggler_ratio"] == 1.0 and 0.0 <= row["data_wait"] <= 1.0 for row in rows)


def kill_at(directory: Path, step: int) -> None:
    """Trains in another process and kills it once `step` shows up in the log."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(directory,), kwargs={"delay": 0.02})
    process.start()
    log = directory / "log.csv"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.is_file() and any(row["step"] >= step and "loss" in row for row in read_csv(log)):
            break
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("step", [1, 2, 5, 6, 8])
def test_killed_run_resumes_to_the_same_bits(uninterrupted: Path, tmp_path: Path, step: int) -> None:
    kill_at(tmp_path, step)
    # Other initial weights where there is a checkpoint: all must come from it.
    saved = list((tmp_path / "checkpoints").glob("step_*"))
    assert run(tmp_path, seed=7 if saved else 0).step == STEPS
    assert_same_bits(tmp_path, uninterrupted)
    rows = read_csv(tmp_path / "log.csv")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


def test_kill_at_any_moment_even_twice(uninterrupted: Path, tmp_path: Path) -> None:
    kill_at(tmp_path, 4)
    kill_at(tmp_path, 7)
    run(tmp_path)
    assert_same_bits(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_stop(uninterrupted: Path, tmp_path: Path, number: signal.Signals) -> None:
    def train() -> None:
        outcome = run(tmp_path, delay=0.02, save_interval=100)
        os._exit(42 if outcome.stopped else 0)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "log.csv").is_file() or len(read_csv(tmp_path / "log.csv")) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 42
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.removeprefix("step_")) < STEPS
    assert not run(tmp_path).stopped
    assert_same_bits(tmp_path, uninterrupted)


def test_damaged_checkpoint_falls_back(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    newest = tmp_path / "checkpoints" / f"step_{STEPS:08d}"
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    run(tmp_path)
    said = capsys.readouterr().out
    assert f"{file} is damaged" in said
    assert f"falling back to {tmp_path / 'checkpoints' / 'step_00000008'}" in said
    assert_same_bits(tmp_path, uninterrupted)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"damaged_{newest.name}", "step_00000008", "step_00000009"]


def test_older_format_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    """A run of a version that wrote format 1, stopped after 8 updates; to rounding, for its processor was another."""
    old = Path(__file__).parents[1] / "checkpoint" / "format_1"
    shutil.copytree(old, tmp_path / "checkpoints")
    (tmp_path / "best").mkdir()
    assert run(tmp_path, seed=7).step == STEPS
    one, other = final_state(tmp_path), final_state(uninterrupted)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-10, atol=1e-12)


def test_full_disk_ends_the_run_and_loses_nothing(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_pieces(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("janus.checkpoint.sharded.write_pieces", full)
        with pytest.raises(CheckpointError, match=r"step_00000006 could not be written, OSError on rank 0: .*No space"):
            run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    run(tmp_path)
    assert_same_bits(tmp_path, uninterrupted)


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    before = final_state(tmp_path)
    assert run(tmp_path) == Outcome(step=STEPS, stopped=False, best_step=9)
    assert all(torch.equal(value, final_state(tmp_path)[name]) for name, value in before.items())


def test_non_finite_loss_leaves_the_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    before = final_state(tmp_path, 4)
    bad = int(toy_step(6).indices[0])
    with pytest.raises(NonFiniteError, match=f"record-{bad}"):
        run(tmp_path, bad=bad, save_interval=100)
    assert all(torch.equal(value, final_state(tmp_path, 4)[name]) for name, value in before.items())


def test_non_finite_validation_loss_leaves_everything(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    kept = [path for folder in ("best", "last", "checkpoints") for path in (tmp_path / folder).rglob("*.*")]
    before = {path: path.read_bytes() for path in kept}
    with pytest.raises(NonFiniteError, match=r"after step 6 is not finite.* record-102: "):
        run(tmp_path, bad_validation=True, save_interval=6)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("steps", [4, STEPS])
def test_lost_exports_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int) -> None:
    run(tmp_path, steps=steps)
    shutil.rmtree(tmp_path / "best")
    shutil.rmtree(tmp_path / "last")
    assert run(tmp_path).best_step == STEPS
    assert "is gone: the best model is looked for anew" in "".join(capsys.readouterr())
    assert (tmp_path / "best" / "config.json").is_file()
    assert (tmp_path / "last" / "config.json").is_file()


def test_other_training_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, steps=2, settings={"model": {}, "records": {"train": "a", "valid": "b"}})
    run(tmp_path, steps=4, settings={"model": {}, "records": {"train": "a", "valid": "c"}})
    assert "changed setting: records.valid was b, is c" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"other training data: records.train was a, is b"):
        run(tmp_path, settings={"model": {}, "records": {"train": "b", "valid": "c"}})


def test_resume_never_and_from_a_path(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match="holds checkpoints of a run already"):
        run(tmp_path, steps=4, resume="never")
    assert run(tmp_path / "other", resume=str(tmp_path / "checkpoints" / "step_00000004")).step == STEPS
    with pytest.raises(CheckpointError, match="is no directory"):
        run(tmp_path / "third", resume=str(tmp_path / "nothing"))


def test_the_same_command_goes_on_from_its_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(tmp_path / "checkpoints" / "step_00000002")
    run(tmp_path, steps=4)
    run(tmp_path / "other", steps=6, resume=base)
    assert run(tmp_path / "other", steps=8, resume=base).step == 8
    assert "going on from them" in capsys.readouterr().out
    assert read_csv(tmp_path / "other" / "log.csv")[-1]["step"] == 8


def test_weights_alone_are_a_start(tmp_path: Path) -> None:
    """A checkpoint of no updates without averages, as a converter writes it."""
    weights = {f"model/{name}": value for name, value in ToyTask(3).model.state_dict().items()}
    state = {"step": 0, "best_step": None, "best_loss": None, "settings": {"model": {"width": 8}}, "rng": []}
    write_directory(tmp_path / "start", weights.items(), state)
    run(tmp_path / "started", seed=0, resume=str(tmp_path / "start"))
    run(tmp_path / "same", seed=3)
    run(tmp_path / "other", seed=0)
    first = {name: read_csv(tmp_path / name / "log.csv")[0]["valid_loss"] for name in ("started", "same", "other")}
    assert first["started"] == first["same"] != first["other"]  # of the averages, before any update


def test_going_back_is_refused_while_there_is_newer(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match=r"newer checkpoints of the same run, up to .*step_00000004: move"):
        run(tmp_path, resume=str(tmp_path / "checkpoints" / "step_00000002"))


def test_changed_settings_are_told_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, steps=4)
    run(tmp_path, steps=6, settings={"model": {"width": 8}, "optim": {"lr": 2e-2}})
    assert "resuming with a changed setting: optim.lr was 0.01, is 0.02" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"another model: model.width was 8, is 9"):
        run(tmp_path, settings={"model": {"width": 9}})
