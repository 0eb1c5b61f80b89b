"""A resumed run whose best model was lost or damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from janus.checkpoint import read_directory, write_directory
from matris.cli import main
from matris.exported import check_model
from matris.train_config import to_plain
from tests.matris.train.labelled import settings, write_files


def command(folder: Path, output: Path, num_steps: int) -> list[str]:
    rhythm = {"train_iters": num_steps, "eval_interval": 2, "output": str(output)}
    path = folder / f"{output.name}_{num_steps}.yaml"
    path.write_text(yaml.safe_dump(to_plain(settings(folder, training=rhythm))))
    return ["train", "--config", str(path)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after four steps, of which the second had the best model; no later one will be as good."""
    folder = tmp_path_factory.mktemp("best")
    write_files(folder)
    run = folder / "stopped"
    assert main(command(folder, run, 4)) == 0
    last = run / "checkpoints" / "step_00000004"
    tensors, state = read_directory(last)
    shutil.rmtree(last)
    write_directory(last, tensors.items(), {**state, "best_step": 2, "best_loss": 0.0})
    return run


def go_on(stopped: Path, name: str, change: Callable[[Path], None]) -> Path:
    """Two steps more of a copy whose `best/` was changed."""
    run = stopped.with_name(name)
    shutil.copytree(stopped, run)
    change(run / "best")
    assert main(command(stopped.parent, run, 6)) == 0
    return run


def damage(best: Path) -> None:
    file = best / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def after(run: Path, step: int) -> dict[str, Tensor]:
    return read_directory(run / "checkpoints" / f"step_{step:08d}")[0]


def assert_best_is_of_step_2(run: Path) -> None:
    assert check_model(run / "best")["provenance"]["step"] == 2
    found = load_file(run / "best" / "model.safetensors")
    averages = {name: value for name, value in after(run, 2).items() if name.startswith("ema/")}
    assert averages
    for name, value in averages.items():
        assert torch.equal(found[name.removeprefix("ema/")], value), name


def test_it_is_made_again_and_the_run_is_the_same(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untouched = go_on(stopped, "untouched", lambda best: None)
    assert "made again" not in capsys.readouterr().out
    for name, change, message in (
        ("lost", shutil.rmtree, "best of step 2 is gone; made again from"),
        ("damaged", damage, "is corrupt"),
    ):
        run = go_on(stopped, name, change)
        shown = capsys.readouterr().out
        assert message in shown
        assert "made again from" in shown
        assert (run / "best.damaged").exists() == (name == "damaged")
        assert_best_is_of_step_2(run)
        found, expected = after(run, 6), after(untouched, 6)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_without_its_checkpoint_the_best_is_looked_for_anew(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(best: Path) -> None:
        damage(best)
        shutil.rmtree(best.parent / "checkpoints" / "step_00000002")

    run = go_on(stopped, "anew", change)
    shown = capsys.readouterr()
    assert "it cannot be made again" in shown.out
    assert "is gone: the best model is looked for anew, from step 4 on" in "".join(shown)
    assert check_model(run / "best")["provenance"]["step"] in (4, 6)


@pytest.mark.slow
def test_two_ranks_that_share_the_weights(stopped: Path) -> None:
    run = stopped.with_name("sharded")
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "best")
    words = [*command(stopped.parent, run, 6), "--parallel.fully_sharded_size", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "matris"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environ, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made again from") == 1
    assert_best_is_of_step_2(run)
