"""Time that a device spends between two points of a program, without waiting for the device at either."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Runs from its creation to `stop`. On CUDA both points are events, which the device passes when it gets there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._mark()
        self._end: float | torch.cuda.Event | None = None

    def stop(self) -> None:
        """The second point."""
        self._end = self._mark()

    def seconds(self) -> float:
        """Waits on CUDA until the device has passed the second point."""
        if isinstance(self._begin, torch.cuda.Event):
            assert isinstance(self._end, torch.cuda.Event), "stop comes first"
            self._end.synchronize()
            return self._begin.elapsed_time(self._end) / 1e3
        assert isinstance(self._end, float), "stop comes first"
        return self._end - self._begin

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
