"""Whole runs of tiny models: what they write, how they go on, fine-tuning, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from janus.checkpoint import read_directory
from janus.ops.recompute import recomputing
from janus.telemetry.csv_log import read_csv
from matris.cli import main
from matris.exported import load_model, save_model
from matris.train_config import to_plain
from tests.matris.train.labelled import TINY, settings, write_files

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_files(path)
    return path


def options(folder: Path, output: Path, *words: str, **fields: Any) -> list[str]:
    """Command line of a run of four updates, as a YAML file with options after it."""
    values = to_plain(settings(folder, training={"train_iters": 4, "eval_interval": 2, "log_interval": 1, **fields}))
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return ["train", "--config", str(path), "--training.output", str(output), *words]


def in_process(arguments: Sequence[str], *, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, or in several under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "-m", "matris", *arguments],
        cwd=ROOT,
        # Bits depend on the number of threads.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    output = folder / "finished"
    assert main(options(folder, output, "--data.test", str(folder / "test.xyz"))) == 0
    return output


def test_run_directory(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "best",
        "last",
        "checkpoints",
        "tensorboard",
        "config.yaml",
        "log.csv",
        "metrics.json",
        "learning_curves.png",
        "parity_valid.png",
        "parity_test.png",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["test"]["num_structures"] == 3
    assert metrics["valid"]["energy_mae_meV_per_atom"] > 0
    assert metrics["valid"]["tasks"]["default"]["forces_rmse_meV_per_A"] > 0
    rows = read_csv(finished / "log.csv")
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    best = min((row for row in rows if "valid_loss" in row), key=lambda row: row["valid_loss"])
    assert metrics["step"] == best["step"]
    # Logged with the averaged weights, as the exported model has them.
    assert metrics["valid"]["forces_mae_meV_per_A"] == pytest.approx(best["valid_forces_mae_meV_per_A"], rel=1e-5)
    settings_of_run = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings_of_run["model"]["hidden_size"] == TINY.hidden_size
    model = load_model(finished / "best")
    assert model.hyper == TINY
    assert model.reference_energies[28] != 0.0  # Cu
    assert model.energy_scale != 1.0


def test_evaluation_of_the_exported_model(finished: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "metrics.json"
    words = ["eval", "--model", str(finished / "best"), "--data", str(folder / "test.xyz"), str(folder / "valid.xyz")]
    assert main([*words, "--output", str(output), "--cache-dir", str(folder / "cache"), "--max-atoms", "9"]) == 0
    report = json.loads(output.read_text())
    parts = json.loads((finished / "metrics.json").read_text())
    assert report["num_structures"] == 6
    for name, quantity in (("energy_mae_meV_per_atom", "energy"), ("forces_mae_meV_per_A", "forces")):
        counts = [parts[part]["num_labels"][quantity] for part in ("test", "valid")]
        values = [parts[part][name] for part in ("test", "valid")]
        assert report[name] == pytest.approx(np.average(values, weights=counts), rel=1e-5)
    assert (tmp_path / "new" / "metrics.png").is_file()


def test_dry_run_writes_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "dry"
    assert main(options(folder, output, "--dry-run", "--data.max_atoms", "20")) == 0
    assert not output.exists()
    shown = capsys.readouterr().out
    for text in ("24 structures", "parameters", "6 structures per update", "at most 20 atoms", "4 updates", "Cu"):
        assert text in shown


def weights(output: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_directory(output / "checkpoints" / "step_00000004")
    return tensors


def test_killed_run_goes_on_to_the_same_bits(folder: Path, finished: Path) -> None:
    output = folder / "killed"
    words = options(folder, output, "--data.test", str(folder / "test.xyz"), "--data.num_workers", "1")
    process = in_process(words)
    deadline = time.monotonic() + 60
    while not (output / "checkpoints" / "step_00000002").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert main(words) == 0
    found, expected = weights(output), weights(finished)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_compiled_kernels_change_nothing_but_the_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name in ("torch", "compiled"):
        output = folder / f"kernels_{name}"
        words = options(folder, output, precision="fp64", kernels=name)
        assert main(words) == 0
        assert (", compiled kernels" in capsys.readouterr().out) == (name == "compiled")
        found.append(weights(output))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-11)


def test_recomputation_changes_no_bit(folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for policy, at_least in (("none", None), ("all", 0)):
        used: list[int | None] = []

        def watched(at_least: int | None, used: list = used) -> AbstractContextManager[None]:
            used.append(at_least)
            return recomputing(at_least)

        monkeypatch.setattr("matris.model.recomputing", watched)
        output = folder / policy
        assert main(options(folder, output, recompute=policy)) == 0
        assert used[0] == at_least
        found, expected = weights(output), weights(finished)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_two_ranks_stop_on_a_signal_and_one_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun passes SIGTERM on to its ranks."""
    output = folder / "two_ranks"
    words = options(folder, output, "--training.save_interval", "1000")
    process = in_process([*words, "--training.train_iters", "4000"], ranks=2)
    deadline = time.monotonic() + 90
    while not ((output / "log.csv").is_file() and "\n1," in (output / "log.csv").read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "as asked; the same command continues from there" in shown
    (checkpoint,) = (output / "checkpoints").iterdir()
    _, state = read_directory(checkpoint)
    assert len(state["rng"]) == 2
    assert main([*words, "--training.train_iters", str(state["step"] + 1)]) == 0
    shown = capsys.readouterr().out
    assert f"resuming after step {state['step']}" in shown
    assert "training.train_iters was 4000" in shown


def test_two_ranks_by_slurm_variables_give_the_same_weights(folder: Path, finished: Path) -> None:
    output = folder / "slurm"
    words = options(folder, output)
    variables = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    processes = [in_process(words, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **variables) for rank in (0, 1)]
    shown = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    assert "2 x cpu" in shown[0]
    assert shown[1] == ""
    found = weights(output)
    for name, value in weights(finished).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_fine_tuning_starts_from_the_base_model(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "tuned"
    words = options(folder, output, "--init_from", str(finished / "best"))
    assert main(words) == 0
    assert "predictions on 3 structures are those of" in capsys.readouterr().out
    first = next(row for row in read_csv(output / "log.csv") if row["step"] == 0)
    base = json.loads((finished / "metrics.json").read_text())["valid"]
    for name in ("energy_mae_meV_per_atom", "forces_mae_meV_per_A", "stress_mae_meV_per_A3"):
        assert first[f"valid_{name}"] == pytest.approx(base[name], rel=1e-5)
    model = load_model(output / "best")
    assert torch.equal(model.reference_energies, load_model(finished / "best").reference_energies)


def test_fine_tuning_with_new_references_says_so(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init_from", str(finished / "best"), "--data.reference_energies", "none"]
    assert main(options(folder, folder / "tuned_none", *words)) == 0
    assert "reference energies aside" in capsys.readouterr().out
    assert not load_model(folder / "tuned_none" / "best").reference_energies.any()


def test_fine_tuning_that_starts_elsewhere_is_refused(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import matris.setup

    def load_other(directory: str, **options: Any) -> Any:
        model = load_model(directory, **options)
        model.readout.energy.layers[0].weight.data *= 1.01
        return model

    monkeypatch.setattr(matris.setup, "load_model", load_other)
    assert main(options(folder, folder / "tuned_wrong", "--init_from", str(finished / "best"))) == 2
    assert "differs from its base" in capsys.readouterr().err
    assert not (folder / "tuned_wrong" / "checkpoints").exists()


def test_refused_settings_leave_a_run_alone(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for words, message in (
        (["--training.resume", "never"], "holds checkpoints of a run already"),
        (["--model.num_layers", "2"], "another model: model.num_layers was 1, is 2"),
    ):
        assert main(options(folder, finished, *words)) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train", "nowhere.xyz"], "nowhere.xyz"),
        (["--data.max_atoms", "3"], "exceed the budget"),
        (["--training.precision", "tf32"], "only CUDA GPUs have that format"),
        (["--training.output", "/dev/null/run"], "/dev/null"),
        (["--init_from", "nowhere"], "nowhere"),
        (["--data.forces_key", "nonsense"], "Give its key with --data.forces_key"),
        (["--data.reference_energies", "isolated"], "no isolated atom"),
        (["--optim.lr_warmup_iters", "5"], "do not fit into a run of 4 steps"),
        (["--training.wandb_project", "p"], "pip install 'janus-matris"),
        (["--training.resume", "nowhere"], "nowhere is no directory"),
    ],
)
def test_mistakes_give_one_line_and_no_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(options(folder, tmp_path / "run", *words)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_base_of_other_hyper_parameters_is_refused(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init_from", str(finished / "best"), "--model.num_layers", "2"]
    assert main(options(folder, folder / "other", *words)) == 2
    assert "whose weights fit no others" in capsys.readouterr().err
    # Also where the value asked for is the default.
    words = ["--init_from", str(finished / "best"), "--model.hidden_size", "128"]
    assert main(options(folder, folder / "other", *words)) == 2
    assert "model.hidden_size is 128, the base has 8" in capsys.readouterr().err


def test_ranks_say_a_mistake_once(folder: Path) -> None:
    process = in_process(options(folder, folder / "twice", "--data.max_atoms", "3"), ranks=2)
    shown = process.communicate(timeout=90)[0]
    assert process.returncode != 0
    assert shown.count("training data: 17 of 24 records exceed the budget") == 1


def test_base_that_is_corrupt_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matris.model import MatRIS

    save_model(MatRIS(TINY, seed=0), tmp_path / "base", provenance={})
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(options(folder, folder / "corrupt", "--init_from", str(tmp_path / "base"))) == 2
    assert "corrupt" in capsys.readouterr().err


def test_single_file_is_split_and_learned_in_every_precision(folder: Path) -> None:
    for precision in ("fp64", "bf16-mixed"):
        output = folder / precision
        words = ["--data.valid", "[]", "--data.valid_fraction", "0.25", "--training.precision", precision]
        assert main(options(folder, output, *words)) == 0
        assert json.loads((output / "metrics.json").read_text())["valid"]["num_structures"] == 6
