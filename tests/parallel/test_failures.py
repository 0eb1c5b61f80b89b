"""A rank that dies, stops, loops or fails: the others end within the timeout, and one of them says who and when."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from janus.comm.local import find_port
from janus.comm.watch import Clock, Status, _Judge
from janus.training.step import StepReport
from tests.matris.train.labelled import write_files
from tests.parallel.ranks import _CONTEXT

TIMEOUT = 8.0
"""Seconds that a rank may wait for the others in these tests."""
PATIENCE = 120.0
"""Seconds until all must have ended, also on a machine that is busy with other things."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halt() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loop() -> None:
    while True:
        sum(range(1000))


def fail() -> None:
    raise RuntimeError("out of something")


def begin(rank: int, world_size: int, port: int, folder: Path) -> None:
    """As if a launcher had started this rank; what it says goes to a file."""
    sys.stderr = open(folder / f"{rank}.err", "w", buffering=1)  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)


def train(
    rank: int, world_size: int, port: int, folder: Path, victim: int, act: Callable[[], None], layout: dict[str, int]
) -> None:
    """`janus-matris train`; the victim acts in its third step."""
    begin(rank, world_size, port, folder)
    from janus.training import trainer
    from matris.cli import main

    step = trainer.train_step

    def with_act(*arguments: Any, **options: Any) -> StepReport:
        (folder / f"{rank}.ready").touch()
        if rank == victim and arguments[1].step == 2:
            act()
        return step(*arguments, **options)

    trainer.train_step = with_act
    words = f"train --data.train {folder}/train.xyz --data.cache_dir {folder}/cache --training.output {folder}/run "
    words += "--training.train_iters 6 --training.device cpu --model.num_layers 1 --model.hidden_size 8 "
    words += f"--parallel.distributed_timeout_minutes {PATIENCE / 60.0} "
    words += " ".join(f"--parallel.{name} {size}" for name, size in layout.items())
    sys.exit(main(words.split()))


def run(
    rank: int, world_size: int, port: int, folder: Path, victim: int, act: Callable[[], None], layout: dict[str, int]
) -> None:
    """A rank: steps of a toy model; the victim acts in its third. Ends as the command line does."""
    begin(rank, world_size, port, folder)
    steps(rank, folder, victim, act, layout)


def run_adopted(
    rank: int, world_size: int, port: int, folder: Path, victim: int, act: Callable[[], None], layout: dict[str, int]
) -> None:
    """The same inside of a process group that somebody else has made, who would wait for long, without a launcher."""
    begin(rank, world_size, port, folder)
    if rank == 0:
        print("made", file=sys.stderr)
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=10.0 * PATIENCE))
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    if layout.pop("early", 0):
        (folder / f"{rank}.ready").touch()
        if rank == victim:
            act()
    steps(rank, folder, victim, act, layout)


def steps(rank: int, folder: Path, victim: int, act: Callable[[], None], layout: dict[str, int]) -> None:
    """The steps of the two above."""
    import torch

    from janus.comm.collectives import gather_objects, sum_gradients
    from janus.mesh import ElsewhereError, open_mesh

    torch.set_num_threads(1)
    try:
        with open_mesh("cpu", timeout_minutes=TIMEOUT / 60.0, **layout) as mesh:
            parameter = torch.nn.Parameter(torch.ones(3))
            gather_objects(rank, mesh)
            (folder / f"{rank}.ready").touch()
            for step in range(1, 6):
                mesh.watch.step = step
                if rank == victim and step == 3:
                    act()
                parameter.grad = None
                sum_gradients([parameter], mesh.replicas)
                gather_objects(step, mesh)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ElsewhereError:
        sys.exit(2)


def outcome(
    folder: Path,
    world_size: int,
    victim: int,
    act: Callable[[], None],
    layout: dict[str, int] | None = None,
    target: Callable[..., None] = run,
) -> tuple[list[int | None], list[str], float]:
    """Exit status of every rank (None for the victim), what each wrote, and the seconds from the third step on."""
    port = find_port()
    processes = [
        _CONTEXT.Process(target=target, args=(rank, world_size, port, folder, victim, act, layout or {}))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        begin = time.monotonic()
        while not all((folder / f"{rank}.ready").exists() for rank in range(world_size)):
            assert time.monotonic() < begin + PATIENCE
            time.sleep(0.05)
        begin = time.monotonic()
        for rank, process in enumerate(processes):
            if rank != victim:
                process.join(max(0.1, begin + PATIENCE - time.monotonic()))
        statuses = [process.exitcode for process in processes]
        seconds = time.monotonic() - begin
    finally:
        for process in processes:
            process.kill()
            process.join()
    texts = [(folder / f"{rank}.err").read_text() for rank in range(world_size)]
    # Rank 0 says at the start where it waits for the others.
    return statuses, ["".join(text.splitlines(keepends=True)[rank == 0 :]) for rank, text in enumerate(texts)], seconds


@pytest.mark.parametrize(("act", "victim"), [(die, 0), (die, 1), (halt, 0), (halt, 1), (loop, 1)])
def test_a_lost_rank_ends_all_others(tmp_path: Path, act: Callable[[], None], victim: int) -> None:
    statuses, texts, seconds = outcome(tmp_path, 3, victim, act)
    others = [rank for rank in range(3) if rank != victim]
    assert all(statuses[rank] not in (None, 0) for rank in others), (statuses, texts)
    assert seconds < PATIENCE
    # One message, from the first that is left.
    assert [bool(texts[rank]) for rank in others] == [True, False], texts
    message = texts[others[0]]
    assert message.startswith("error: "), message
    assert message.count("\n") == 1
    assert "in step 3" in message
    assert f"rank {victim} " in message
    if act is loop:
        assert "test_failures.py" in message  # where it is
        assert "(loop)" in message


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    statuses, texts, _ = outcome(tmp_path, 3, 1, fail)
    assert all(status not in (None, 0) for status in statuses)
    assert texts[0] == "error: rank 1 failed in step 3: RuntimeError: out of something\n"
    assert texts[2] == ""


@pytest.mark.parametrize(("act", "victim"), [(die, 0), (die, 1), (halt, 1)])
def test_a_lost_rank_of_a_group_that_existed(tmp_path: Path, act: Callable[[], None], victim: int) -> None:
    statuses, texts, seconds = outcome(tmp_path, 2, victim, act, target=run_adopted)
    assert statuses[1 - victim] not in (None, 0)
    assert seconds < PATIENCE
    assert texts[1 - victim].count("\n") == 1
    assert texts[1 - victim].startswith(f"error: rank {victim} ")
    assert "in step 3" in texts[1 - victim]


def test_a_rank_that_dies_before_the_mesh_is_open(tmp_path: Path) -> None:
    statuses, texts, seconds = outcome(tmp_path, 2, 1, die, {"early": 1}, target=run_adopted)
    assert statuses[0] not in (None, 0)
    assert seconds < PATIENCE
    assert re.match("error: (the connection to another rank broke|rank 1 died or stopped before the first)", texts[0])
    assert texts[0].count("\n") == 1


def test_a_rank_of_a_layout_with_several_axes(tmp_path: Path) -> None:
    statuses, texts, _ = outcome(tmp_path, 4, 3, die, {"tensor": 2})
    assert all(status not in (None, 0) for status in statuses[:3])
    assert "rank 3 died or stopped in step 3" in texts[0]


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    write_files(tmp_path)
    layout = {"tensor_model_parallel_size": 2}
    statuses, texts, _ = outcome(tmp_path, 2, 1, die, layout, target=train)
    assert statuses[0] == 2
    lines = texts[0].splitlines()
    assert lines[-1].startswith("janus-matris train: error: rank 1 died or stopped in step 3: no sign of life for")
    assert "Traceback" not in texts[0]


def judge(world_size: int = 4) -> _Judge:
    return _Judge(world_size, timeout=60.0, lost_after=30.0, quick=3.0)


def test_healthy_ranks_are_left_alone() -> None:
    """Also where one waits for long, as long as it is not too long, or all are busy for long."""
    watched = judge()
    for beat in range(400):
        statuses = {
            rank: Status(beat=beat, step=1, calls=7, idle=float(beat), waiting=rank == 1 and beat < 60)
            for rank in range(4)
        }
        assert watched.decide(statuses, float(beat)) is None


def test_silence_is_noticed_late_without_an_alarm_and_soon_with_one() -> None:
    for alarm, limit in (("", 30.0), ("broken", 3.0)):
        watched = judge()
        now = 0.0
        while True:
            now += 0.5
            beats = {rank: int(now * 2) if rank != 2 else 1 for rank in range(4)}
            statuses = {rank: Status(beat=beats[rank], step=9, alarm=alarm if rank == 0 else "") for rank in range(4)}
            verdict = watched.decide(statuses, now)
            if verdict is not None:
                break
        assert limit < now <= limit + 2.0
        assert verdict.message.startswith("rank 2 died or stopped in step 9")
        assert verdict.speaker == 0


def test_who_is_behind_where_nobody_seems_to_wait() -> None:
    """As on GPUs, whose collectives return at once; after a timeout the counts decide."""
    watched = judge()
    statuses = {
        rank: Status(beat=1, step=5, calls=40 - 3 * (rank == 0), idle=70.0, place="a.py:1 (f)") for rank in range(4)
    }
    assert watched.decide(statuses, 0.0) is None
    statuses = {rank: Status(**{**vars(status), "beat": 2, "alarm": "timeout"}) for rank, status in statuses.items()}
    statuses[0] = Status(beat=2, step=5, calls=37, idle=70.0, place="a.py:1 (f)")
    verdict = watched.decide(statuses, 1.0)
    assert verdict is not None
    assert verdict.message.startswith(
        "no rank came to a common collective for 60 s; behind the others is rank 0 in step 5"
    )
    assert verdict.speaker == 0


def test_the_clock_stands_still_while_the_process_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 3.0, 400.0, 401.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    clock = Clock(longest=2.5)
    assert [clock.now() for _ in range(4)] == [1.0, 3.0, 5.5, 6.5]


def test_a_broken_connection_between_living_ranks() -> None:
    watched = judge()
    verdicts = [
        watched.decide(
            {
                **{rank: Status(beat=beat, step=2) for rank in range(3)},
                3: Status(beat=beat, step=2, alarm="broken", place="step.py:7 (sum)", reason="gloo/pair.cc: closed"),
            },
            beat,
        )
        for beat in range(1, 10)
    ]
    assert verdicts[0] is None
    assert verdicts[-1] is not None
    assert "all ranks are alive" in verdicts[-1].message
    assert "Rank 3 was at step.py:7 (sum): gloo/pair.cc: closed" in verdicts[-1].message
