"""Counts of every collective: deterministic, so tests can gate them exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Calls and payload bytes per collective of one process, keyed by its name (`all_reduce`, ...).

    Bytes are those of the tensor that this rank hands in, whatever the algorithm then sends over the wire.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def record(self, collective: str, num_bytes: int) -> None:
        """Adds one call."""
        self.calls[collective] += 1
        self.bytes[collective] += num_bytes

    def clear(self) -> None:
        """Starts counting anew."""
        self.calls.clear()
        self.bytes.clear()
