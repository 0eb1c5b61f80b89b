import os
import signal
import subprocess
import sys
import time

import pytest

from janus.data.parallel_map import map_in_order


def own_pid(_: int) -> int:
    return os.getpid()


def double(number: int) -> int:
    if number == 13:
        raise ValueError("13 is not liked")
    return 2 * number


def test_a_single_item_needs_no_process():
    assert list(map_in_order(own_pid, [0], num_workers=2)) == [os.getpid()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_laziness_and_errors(num_workers):
    drawn = []

    def items():
        for number in range(20):
            drawn.append(number)
            yield number

    results = map_in_order(double, items(), num_workers=num_workers, in_flight_per_worker=2)
    assert next(results) == 0
    assert len(drawn) <= 4
    assert [next(results) for _ in range(12)] == [2 * number for number in range(1, 13)]
    with pytest.raises(ValueError, match="13"):
        next(results)


def note_pid(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """They would otherwise wait for work for ever."""
    pids = tmp_path / "pids"
    code = f"""
from janus.data.parallel_map import map_in_order
from tests.janus.data.test_parallel_map import note_pid
if __name__ == "__main__":
    for _ in map_in_order(note_pid, [{str(pids)!r}] * 1000, num_workers=2):
        pass
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        while not pids.exists() or len(set(pids.read_text().split())) < 2:
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    workers = {int(pid) for pid in pids.read_text().split()}
    deadline = time.time() + 10
    while any(_alive(pid) for pid in workers):
        assert time.time() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
