"""A polite end: SIGTERM (schedulers, torchrun) and SIGUSR1 (Slurm's --signal) ask the loop to save and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: only remembers, the loop acts between two steps."""
        self.is_set = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catches the stop signals inside of the block. In another thread than the main one nothing is caught."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.set) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
