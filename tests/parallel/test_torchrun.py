"""`janus-matris train` under torchrun: what a user sees of a rank that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from janus.mesh import Launch, _store_of_attempt
from tests.matris.train.labelled import write_files

PATIENCE = 180.0
"""Seconds for the start, and for the end, also on a machine that is busy with other things."""


@contextmanager
def torchrun(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command with two ranks on CPUs; all that it prints goes to `output`, and nothing of it outlives the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen([*command, "--module", "matris", *words], stdout=output, stderr=output, env=environ)
    try:
        yield process
    finally:
        for pid in ranks_of(process.pid) if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def ranks_of(pid: int) -> list[int]:
    """Its child processes; torchrun's are the ranks, in order."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("listens", [False, True], ids=["nothing listens there", "another listens there"])
def test_a_restarted_launch_does_not_meet_where_the_one_before_it_met(listens: bool) -> None:
    """The launcher's store is the same for both, and still says where that was."""
    limit = timedelta(seconds=PATIENCE)
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before.set("janus/store_of_attempt", "another")
    launcher.set("janus/store_of_attempt", f"{before.port if listens else 1} word")
    launch = Launch(launcher="torchrun", world_size=2, port=launcher.port, outlives_ranks=True)
    with ThreadPoolExecutor(2) as pool:
        last = pool.submit(_store_of_attempt, replace(launch, rank=1), limit)
        first = pool.submit(_store_of_attempt, launch, limit)
        first.result().set("from", "rank 0")
        assert last.result().get("from") == b"rank 0"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank by Linux's /proc")
def test_a_killed_rank_is_named_under_torchrun(tmp_path: Path) -> None:
    write_files(tmp_path)
    words = (
        f"train --data.train {tmp_path}/train.xyz --data.cache_dir {tmp_path}/cache --training.output {tmp_path}/run "
    )
    words += (
        "--training.train_iters 100000 --training.device cpu --training.log_interval 1 --training.eval_interval 1000 "
    )
    words += "--model.num_layers 1 --model.hidden_size 8 --data.global_batch_size 4 "
    words += "--parallel.distributed_timeout_minutes 0.5"
    with torchrun(tmp_path, *words.split()) as process:
        begin = time.monotonic()
        while not (steps := shown_steps(tmp_path)):
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < begin + PATIENCE, (tmp_path / "output").read_text()
            time.sleep(0.1)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
    text = (tmp_path / "output").read_text()
    named = re.findall(r"^janus-matris train: error: rank 1 died or stopped in step (\d+): no sign of life", text, re.M)
    assert len(named) == 1, text
    assert int(named[0]) >= max(steps)


def shown_steps(folder: Path) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", (folder / "output").read_text(), re.M)]
