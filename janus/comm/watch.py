"""Who is still alive, and where: a thread per rank that beats into a store of its own, so that a lost rank has a name.

A collective that breaks or waits for too long does not say whose fault that is. Here every rank writes a few times per
timeout what it does; rank 0 hosts the store, reads all, and gives the verdict that ends every rank: those whose main
thread has an error from its collective raise it, those that still wait (or loop) are ended by the thread itself. If
rank 0 is the one that is lost, the others notice by its store. Nothing here takes part in a step: no collective, and
no lock that the main thread holds.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from traceback import walk_tb
from types import FrameType

import torch.distributed as dist

from janus.comm.ledger import Ledger

LOST_AFTER = 120.0
"""Seconds without a beat, at most, after which a rank counts as dead or stopped; beats need the interpreter alone."""
_QUICK = 3.0
"""Seconds without a beat that are enough where a connection has broken."""
_EXIT_STATUS = 1


class LostRanksError(ConnectionError):
    """Other ranks died, hang or failed; the message names them."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What one rank does.

    Attributes:
        beat: grows with every report.
        step: update it works on, from 1; 0 before the first.
        calls: collectives it has started.
        idle: seconds since the last of them, or since its step changed.
        waiting: whether it is inside a collective.
        place: where its main thread is.
        alarm: `broken` or `timeout`, where a collective has raised.
        reason: what it raised.
        failed: its own error; empty without one.
        left: whether it has finished.
    """

    beat: int = 0
    step: int = 0
    calls: int = 0
    idle: float = 0.0
    waiting: bool = False
    place: str = ""
    alarm: str = ""
    reason: str = ""
    failed: str = ""
    left: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the run ends, and which rank says so to the user."""

    message: str
    speaker: int


class Clock:
    """Seconds, but for those that this process was suspended (Ctrl-Z, a scheduler): nobody was silent meanwhile.

    Args:
        longest: seconds that one reading may add to the one before; threads read it more often than that.
    """

    def __init__(self, longest: float) -> None:
        self._longest, self._lock = longest, threading.Lock()
        self._last, self._total = time.monotonic(), 0.0

    def now(self) -> float:
        """Reads it."""
        with self._lock:
            before, self._last = self._last, time.monotonic()
            self._total += min(self._last - before, self._longest)
            return self._total


class Watch:
    """Knows this rank's step, and after `start` the state of all ranks.

    Attributes:
        step: the update that this rank works on, from 1, told by the training loop; 0 before the first.
    """

    def __init__(self) -> None:
        self.step = 0
        self._thread: threading.Thread | None = None
        self._started = False

    def start(
        self,
        rank: int,
        world_size: int,
        address: str,
        timeout: float,
        ledger: Ledger,
        share: Callable[[str], str],
    ) -> None:
        """Begins to watch; all ranks call it.

        Args:
            address: where this rank is reached; that of rank 0 counts.
            timeout: seconds that a rank may wait for others.
            ledger: counts this rank's collectives.
            share: gives rank 0's text to all ranks.
        """
        self._rank, self._world_size, self._timeout, self._ledger = rank, world_size, timeout, ledger
        self._lost_after = min(timeout, LOST_AFTER)
        self._interval = min(max(self._lost_after / 12.0, 0.25), 2.0) * max(1.0, world_size / 2048)
        self._quick = max(_QUICK, 3.0 * self._interval)
        self._patience = 2.0 * self._interval + 1.0
        limit = timedelta(seconds=self._lost_after)
        host = None
        if rank == 0:
            host = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        address, _, port = share(f"{address} {host.port if host else ''}").partition(" ")
        self._store = host or dist.TCPStore(address, int(port), is_master=False, timeout=limit)
        self._judge = _Judge(world_size, timeout=timeout, lost_after=self._lost_after, quick=self._quick)
        self._beat, self._alarm, self._reason, self._place, self._failed, self._left = 0, "", "", "", "", False
        self._clock = Clock(longest=5.0 * self._interval)
        self._progress, self._moved = (0, 0), self._clock.now()
        self._answered = self._moved
        self._verdict: Verdict | None = None
        self._known, self._taken = threading.Event(), threading.Event()
        self._hurry, self._stopped = threading.Event(), threading.Event()
        self._publish()
        self._started = True
        self._thread = threading.Thread(target=self._run, name="janus-watch", daemon=True)
        self._thread.start()
        if rank:
            threading.Thread(target=self._guard, name="janus-guard", daemon=True).start()

    def explain(self, error: BaseException) -> LostRanksError | None:
        """What lies behind the error of a collective. Called on the rank that met it; takes seconds.

        Returns:
            The error to raise on the rank that tells the user; None on all others.
        """
        reason = " ".join(str(error).split())
        if self._thread is None:
            return LostRanksError(f"the connection to another rank broke while the ranks met: {reason}")
        self._place, self._reason = _collective_of(error), reason[:500]
        self._alarm = "timeout" if "imed out" in reason else "broken"
        if self._known.wait(3.0 * self._quick + 4.0 * self._interval) and self._verdict is not None:
            self._taken.set()
            if self._rank == 0:  # the others must have read it before the store ends with this process
                time.sleep(self._patience)
            return LostRanksError(self._verdict.message) if self._verdict.speaker == self._rank else None
        self._taken.set()
        return LostRanksError(f"rank {self._rank} lost its connection to another rank {_when(self.step)}: {reason}")

    def stop(self, failed: BaseException | None = None) -> None:
        """Ends the watch of this rank: it has finished, or failed for a reason of its own, which the others are told.

        Rank 0 stays for the others, since its store is what they look at.
        """
        if self._thread is None:
            return
        if not self._alarm:
            self._failed = f"{type(failed).__name__}: {' '.join(str(failed).split())}"[:500] if failed else ""
            self._left = failed is None
            self._hurry.set()
            deadline = time.monotonic() + (self._timeout if self._left else self._patience)
            while self._rank == 0 and time.monotonic() < deadline and not self._known.is_set():
                if self._judge.others_ended():
                    break
                self._known.wait(0.05)
        self._stopped.set()
        self._hurry.set()
        self._thread.join(self._patience)
        self._thread = None

    def outlive_main_rank(self) -> None:
        """Waits until rank 0 has ended, a few seconds at most: a launcher ends all ranks when the first one does, and
        rank 0 has something to say before. After `stop`."""
        deadline = time.monotonic() + self._patience if self._started else 0.0
        try:
            while time.monotonic() < deadline:
                self._store.check(["verdict"])
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            return  # its store is gone

    # The thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopped = False
        while not stopped:
            if self._hurry.wait(self._interval):
                self._stopped.wait(0.05)
            stopped = self._stopped.is_set()
            try:
                self._publish()
                self._verdict = self._judged() if self._rank == 0 else self._told()
            except (dist.DistError, RuntimeError):
                if stopped or self._left:
                    return
                self._verdict = Verdict(message=f"rank 0 has died; the others end {_when(self.step)}", speaker=1)
            self._answered = self._clock.now()
            if self._verdict is not None and not stopped:
                self._end(self._verdict)
                return

    def _guard(self) -> None:
        """A store whose host is stopped lets the thread that asks it wait for ever, so this one looks at the clock."""
        while not self._known.is_set() and not self._stopped.wait(self._interval):
            silence = self._clock.now() - self._answered
            if silence > self._lost_after:
                self._verdict = Verdict(
                    message=f"rank 0 has stopped: no sign of life for {silence:.0f} s; the others end "
                    f"{_when(self.step)}",
                    speaker=1,
                )
                self._end(self._verdict)

    def _publish(self) -> None:
        """Writes this rank's status."""
        progress = (self.step, sum(self._ledger.calls.values()))
        if progress != self._progress:
            self._progress, self._moved = progress, self._clock.now()
        self._beat += 1
        waiting, place = _where()
        status = Status(
            beat=self._beat,
            step=self.step,
            calls=progress[1],
            idle=self._clock.now() - self._moved,
            waiting=waiting or bool(self._alarm),
            place=self._place or place,
            alarm=self._alarm,
            reason=self._reason,
            failed=self._failed,
            left=self._left,
        )
        self._store.set(f"{self._rank}", json.dumps(asdict(status)))

    def _judged(self) -> Verdict | None:
        """On rank 0: reads all, and tells all if the run has to end."""
        keys = [f"{rank}" for rank in range(self._world_size)]
        if not self._judge.complete:
            keys = [key for key in keys if self._store.check([key])]
        texts = self._store.multi_get(keys)
        statuses = {int(key): Status(**json.loads(text)) for key, text in zip(keys, texts, strict=True)}
        verdict = self._judge.decide(statuses, self._clock.now())
        if verdict is not None:
            self._store.set("verdict", json.dumps(asdict(verdict)))
        return verdict

    def _told(self) -> Verdict | None:
        """On the other ranks: what rank 0 has decided, or that it has failed."""
        if self._store.check(["verdict"]):
            return Verdict(**json.loads(self._store.get("verdict")))
        main = Status(**json.loads(self._store.get("0")))
        # Rank 0 has told the user itself.
        return Verdict(message=f"rank 0 failed: {main.failed}", speaker=0) if main.failed else None

    def _end(self, verdict: Verdict) -> None:
        """Leaves the end to the main thread where it has an error to raise; else this process ends here and now."""
        self._known.set()
        # So long rank 0 stays for the others, too.
        if self._taken.wait(self._patience) or self._stopped.is_set():
            if self._stopped.wait(10.0):  # its way out may wait for the lost rank as well
                return
        elif verdict.speaker == self._rank:
            print(f"error: {verdict.message}", file=sys.stderr, flush=True)
        os._exit(_EXIT_STATUS)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether it may be the fault of another rank: gloo raises plain RuntimeErrors that name its source files."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in text for name in ("gloo/", "Gloo", "NCCL"))
    )


class _Judge:
    """From the reports of all ranks to a verdict. Pure but for what it remembers of earlier reports.

    Attributes:
        complete: whether every rank has reported.
    """

    def __init__(self, world_size: int, *, timeout: float, lost_after: float, quick: float) -> None:
        self._world_size, self._timeout, self._lost_after, self._quick = world_size, timeout, lost_after, quick
        self._statuses: dict[int, Status] = {}
        self._seen: dict[int, float] = {}
        self._alarmed: float | None = None

    @property
    def complete(self) -> bool:
        return len(self._statuses) == self._world_size

    def others_ended(self) -> bool:
        """Whether all ranks but 0 have finished or failed."""
        others = (self._statuses.get(rank, Status()) for rank in range(1, self._world_size))
        return all(status.left or status.failed for status in others)

    def decide(self, statuses: Mapping[int, Status], now: float) -> Verdict | None:
        """The verdict, once there is one.

        Args:
            statuses: by rank.
            now: seconds.
        """
        for rank in range(self._world_size):
            status = statuses.get(rank, Status())
            if rank not in self._seen or status.beat != self._statuses.get(rank, Status()).beat:
                self._seen[rank] = now
        self._statuses = dict(statuses)
        present = {rank: statuses.get(rank, Status()) for rank in range(self._world_size)}
        active = {rank: status for rank, status in present.items() if not status.left}
        alarms = {status.alarm for status in active.values() if status.alarm}
        if self._alarmed is None and (alarms or any(status.failed for status in active.values())):
            self._alarmed = now
        if failed := [rank for rank, status in active.items() if status.failed]:
            # A rank that fails says so itself, and so do all others if they have the same error.
            if now - (self._alarmed or now) < self._quick and len(failed) < len(active):
                return None
            texts = "; ".join(
                f"rank {rank} failed {_when(active[rank].step)}: {active[rank].failed}" for rank in failed
            )
            return self._verdict(failed, texts)
        limit = self._lost_after
        if self._alarmed is not None and "broken" in alarms:
            limit = min(limit, self._quick)
        silent = [rank for rank, status in active.items() if now - self._seen[rank] > limit]
        if silent:
            ages = max(now - self._seen[rank] for rank in silent)
            steps = _when(
                max(status.step for status in active.values())
            )  # its own last report may be of an earlier one
            return self._verdict(
                silent,
                f"{_ranks(silent)} died or stopped {steps}: no sign of life for {ages:.0f} s; the other ranks end",
            )
        return self._hang(active, "timeout" in alarms) or self._unexplained(active, now)

    def _hang(self, active: Mapping[int, Status], timed_out: bool) -> Verdict | None:
        """Ranks that are alive, but do not come to a collective that others have waited in for too long."""
        waiting = [rank for rank, status in active.items() if status.waiting and status.idle > self._timeout]
        if not (timed_out or waiting):
            return None
        busy = [rank for rank, status in active.items() if not status.waiting and status.idle > 0.5 * self._timeout]
        behind = busy if 0 < len(busy) < len(active) else _fewest(active)
        if not behind:
            return None
        texts = ", ".join(f"rank {rank} {_when(active[rank].step)} at {active[rank].place}" for rank in behind[:8])
        more = f" and {len(behind) - 8} more" if len(behind) > 8 else ""
        if behind is not busy:
            other = next(rank for rank in active if rank not in behind)
            return self._verdict(
                (),
                f"no rank came to a common collective for {self._timeout:.0f} s; behind the others {_are(behind)} "
                f"{texts}{more}, while for example rank {other} is {_when(active[other].step)} at "
                f"{active[other].place}; all ranks end",
            )
        return self._verdict(
            behind,
            f"{_ranks(behind)} did not come to a collective that others waited in for {self._timeout:.0f} s: {texts}"
            f"{more}; all ranks end. If that work takes so long, set parallel.distributed_timeout_minutes higher",
        )

    def _unexplained(self, active: Mapping[int, Status], now: float) -> Verdict | None:
        """A collective broke, and all ranks are alive for long enough after it."""
        if self._alarmed is None or now - self._alarmed < 2.0 * self._quick:
            return None
        broken = [rank for rank, status in active.items() if status.alarm]
        if not broken:
            return None
        when = _when(max(active[rank].step for rank in broken))
        first = active[broken[0]]
        return Verdict(
            message=f"the connection of {_ranks(broken)} to others broke {when}, but all ranks are alive: look at the "
            f"network between them. Rank {broken[0]} was at {first.place}: {first.reason}",
            speaker=min(active),
        )

    def _verdict(self, culprits: Sequence[int], message: str) -> Verdict:
        return Verdict(message=message, speaker=min(set(range(self._world_size)) - set(culprits), default=0))


def _fewest(active: Mapping[int, Status]) -> list[int]:
    """Ranks behind the others in steps and collectives; where collectives are asynchronous, all seem to be busy."""
    least = min((status.step, status.calls) for status in active.values())
    behind = [rank for rank, status in active.items() if (status.step, status.calls) == least]
    return behind if len(behind) < len(active) else []


def _when(step: int) -> str:
    return f"in step {step}" if step else "before the first step"


def _are(ranks: Sequence[int]) -> str:
    return "are" if len(ranks) > 1 else "is"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _where() -> tuple[bool, str]:
    """Whether any thread is inside a collective, and where the main thread is."""
    frames = sys._current_frames()
    own = threading.get_ident()
    waiting = any(_is_collective(frame) for thread, frame in frames.items() if thread != own)
    main = frames.get(threading.main_thread().ident or 0)
    if main is None:
        return waiting, "an unknown place"
    return waiting, _place(main, main.f_lineno)


def _collective_of(error: BaseException) -> str:
    """Which line of ours the error of a collective came through."""
    lines = [(frame, line) for frame, line in walk_tb(error.__traceback__) if "/torch/" not in _file_of(frame)]
    return _place(*lines[-1]) if lines else ""


def _file_of(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace(os.sep, "/")


def _place(frame: FrameType, line: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} ({frame.f_code.co_name})"


def _is_collective(frame: FrameType) -> bool:
    """Whether the innermost function of a thread is one of torch's collectives, or one of ours that calls them."""
    file = _file_of(frame)
    return "/torch/distributed/" in file or ("/janus/comm/" in file and not file.endswith("/watch.py"))
