"""Counts of every collective: deterministic, so tests can gate them exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What one process handed to its collectives, keyed by axis and name (`tensor/all_reduce`, ...).

    Attributes:
        calls: number of calls.
        bytes: payload, that of the tensor that this rank hands in, whatever the algorithm then sends.
        wire_bytes: what this rank has to send at least, by an algorithm that is optimal in bytes: 2 (W - 1) / W of the
            payload for an all-reduce over W ranks, (W - 1) / W for a reduce-scatter, (W - 1) times the own piece for an
            all-gather, the rows for other ranks in an all-to-all.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)

    def record(self, collective: str, num_bytes: int, wire_bytes: float = 0.0) -> None:
        """Adds one call."""
        self.calls[collective] += 1
        self.bytes[collective] += num_bytes
        self.wire_bytes[collective] += wire_bytes  # type: ignore[assignment]  # may be a fraction

    def clear(self) -> None:
        """Starts counting anew."""
        for counter in (self.calls, self.bytes, self.wire_bytes):
            counter.clear()
