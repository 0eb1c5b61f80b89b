"""Calls and bytes of collectives by formula, kept as a ledger keeps what it counts, so that both can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol


class SizedAxis(Protocol):
    """An axis of the rank grid, as far as formulas need it; `janus.mesh.Axis` is one."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class PlainAxis:
    """An axis without ranks behind it.

    Attributes:
        name: as the ledger has it.
        size: number of ranks.
    """

    name: str
    size: int


@dataclass
class Traffic:
    """What one rank hands to its collectives, keyed by axis and name; see `janus.comm.ledger.Ledger`.

    Attributes:
        calls: number of calls.
        bytes: payload, that of the tensor that this rank hands in.
        wire_bytes: what this rank has to send at least.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)

    def all_reduce(self, axis: SizedAxis, times: int, num_bytes: float) -> None:
        """So many sums of tensors of so many bytes."""
        self._add(axis, "all_reduce", times, num_bytes, 2 * (axis.size - 1) * num_bytes / axis.size)

    def all_gather(self, axis: SizedAxis, times: int, whole_bytes: float) -> None:
        """Every rank gets the whole of so many bytes, of which each has an equal piece."""
        own = whole_bytes // axis.size
        self._add(axis, "all_gather", times, own, (axis.size - 1) * own)

    def reduce_scatter(self, axis: SizedAxis, times: int, num_bytes: float) -> None:
        """Every rank gets an equal piece of the sum of tensors of so many bytes."""
        self._add(axis, "reduce_scatter", times, num_bytes, (axis.size - 1) * num_bytes / axis.size)

    def all_to_all(self, axis: SizedAxis, times: int, num_bytes: float, *, wire_bytes: float | None = None) -> None:
        """Rows for each rank.

        Args:
            wire_bytes: those for other ranks; by default all.
        """
        self._add(axis, "all_to_all", times, num_bytes, num_bytes if wire_bytes is None else wire_bytes)

    def add(self, other: Traffic, times: int = 1) -> None:
        """Adds what other traffic has, so many times."""
        for mine, others in zip(self._counters(), other._counters(), strict=True):
            for key, value in others.items():
                mine[key] = mine.get(key, 0) + times * value

    def of(self, keys: Collection[str]) -> Traffic:
        """That of some collectives alone."""
        return Traffic(*(Counter({key: each[key] for key in each if key in keys}) for each in self._counters()))

    def _counters(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        return self.calls, self.bytes, self.wire_bytes

    def _add(self, axis: SizedAxis, collective: str, times: int, num_bytes: float, wire_bytes: float) -> None:
        if axis.size > 1 and times:
            key = f"{axis.name}/{collective}"
            values = (times, times * num_bytes, times * wire_bytes)
            for counter, value in zip(self._counters(), values, strict=True):
                counter[key] = counter.get(key, 0) + value  # type: ignore[assignment]  # estimates may be fractions
