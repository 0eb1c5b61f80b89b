"""What a run says."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from janus.telemetry import CsvLog, Progress, RunLog, Stopwatch, find_peak
from janus.telemetry.csv_log import read_csv
from janus.telemetry.peak import Format, known_peak, measured_rate


def test_csv_continues_where_the_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path, ["loss", "valid_loss"])
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3})
    log.write(2, {"valid_loss": float("nan")})
    log.close()
    with path.open("a") as stream:
        stream.write("4,0.1")  # killed while writing
    assert [row["step"] for row in read_csv(path)] == [1, 2, 3, 2]
    log = CsvLog(path, ["loss", "valid_loss", "new"], start_step=2)
    log.write(3, {"new": 7.0})
    log.close()
    assert path.read_text().splitlines()[0] == "step,loss,valid_loss,new"
    assert read_csv(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 2},
        {"step": 3, "new": 7},
    ]
    CsvLog(path, ["loss"]).close()
    assert path.read_text() == "step,loss\n"


def test_records_reach_csv_and_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, ["loss", "valid_loss"])
    log.write(1, {"loss": 1.0, "valid_loss": 2.0})
    log.close()
    assert read_csv(tmp_path / "log.csv") == [{"step": 1, "loss": 1, "valid_loss": 2}]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_record_that_cannot_be_written_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a stream does, without a name

    log = RunLog(tmp_path, ["loss"])
    monkeypatch.setattr(log._csv, "write", full)
    with pytest.raises(OSError, match=f"{tmp_path / 'log.csv'}") as caught:
        log.write(1, {"loss": 1.0})
    assert caught.value.errno == errno.ENOSPC
    log.close()


def test_wandb_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'janus-matris\[wandb\]'"):
        RunLog(tmp_path, ["loss"], wandb_project="p")


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(4, 1, line_interval=2)
    for step in (2, 3, 4):
        rates = progress.step(step, 8, 100, f"loss {step}")
    progress.say("done")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["step 2/4", "loss 2"], ["step 4/4", "loss 4"], ["done"]]
    assert "structures/s" in lines[0]
    assert "ETA 00:00" in lines[1]
    assert rates[1] == pytest.approx(12.5 * rates[0])


def test_the_first_step_is_no_part_of_later_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 100 s, the others one each."""
    clock = Mock()
    monkeypatch.setattr("janus.telemetry.progress.time", clock)
    now = clock.monotonic
    now.return_value = 0.0
    progress = Progress(4, active=False)
    found = []
    for second in (100.0, 101.0, 102.0):
        now.return_value = second
        found.append(progress.step(len(found) + 1, 8, 80, "")[0])
    assert found == [0.08, 8.0, 8.0]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(4, active=False)
    progress.step(1, 8, 100, "loss")
    progress.say("done")
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "products", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "tf32", 378.0),
        ("NVIDIA H200", "fp64", 67.0),
        ("NVIDIA H200 NVL", "fp32", 60.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("AMD Instinct MI250X", "fp32", 47.85),
        ("AMD Instinct MI250X", "tf32", None),
        ("AMD Instinct MI300X", "tf32", 653.7),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "fp32", None),
        ("NVIDIA GH200 480GB", "fp32", None),
        ("NVIDIA GeForce RTX 4090", "fp32", None),
    ],
)
def test_known_gpus(name: str, products: Format, tflops: float | None) -> None:
    peak = known_peak(name, products)
    assert (None if peak is None else peak.flops_per_s) == (None if tflops is None else pytest.approx(1e12 * tflops))
    assert peak is None or name in peak.origin


def test_peak_given_or_measured() -> None:
    device = torch.device("cpu")
    peak = find_peak(device, "fp32", given_tflops=0.25)
    assert peak is not None
    assert peak.flops_per_s == 2.5e11
    assert "as given" in peak.origin
    rate, size = measured_rate(device, "bf16", enough_s=0.0)
    assert rate > 0.0
    assert size == 512
    measured = find_peak(device, "fp64")
    assert measured is not None
    assert "measured on a fp64 product" in measured.origin


def test_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 7.5])
    monkeypatch.setattr("janus.telemetry.stopwatch.time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    watch.stop()
    assert watch.seconds() == watch.seconds() == 2.5
