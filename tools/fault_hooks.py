"""Inside a rank under test: a fault at a chosen moment, and an eye on the checkpoints at every moment.

Nothing of this is in the product. Functions of it are wrapped by name (`PLACES`, the one table to change when they get
other names), and Python's audit events tell of every file operation below the run's directory before it happens.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Act = Literal["kill", "term", "usr1", "stop", "fill", "limit", "bind", "mode", "refuse"]
"""`kill`, `term`, `usr1`, `stop`: SIGKILL and so on. A full disk: `fill` the small file system that the run is on, or
`limit` the size of files. Read-only checkpoints: a `bind` mount, the `mode` of the directory, or an error in place of
each operation (`refuse`)."""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A function of the product.

    Attributes:
        module, name: where it is looked up when it is called; a method with its class.
        options: only calls with these count.
    """

    module: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def find(self) -> tuple[Any, str]:
        """Module or class, and the function's name in it."""
        owner: Any = importlib.import_module(self.module)
        *path, last = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, last


PLACES = {
    "step": Place(module="janus.training.trainer", name="train_step"),
    "gradients": Place(module="matris.task", name="MatRISTask.loss", options=(("training", True),)),
    "update": Place(module="janus.training.learner", name="Learner.update"),
    "evaluation": Place(module="janus.training.trainer", name="evaluate"),
    "evaluation batch": Place(module="matris.task", name="MatRISTask.loss", options=(("training", False),)),
    "save": Place(module="janus.checkpoint.store", name="CheckpointStore.save"),
    "shard": Place(module="janus.checkpoint.sharded", name="write_pieces"),
    "finish": Place(module="janus.checkpoint.sharded", name="finish"),
    "flush": Place(module="janus.checkpoint.directory", name="flush"),
    "removal": Place(module="janus.checkpoint.store", name="remove"),
    "search": Place(module="janus.checkpoint.store", name="CheckpointStore.latest"),
    "restore": Place(module="janus.training.learner", name="Learner.restore"),
    "export": Place(module="matris.task", name="save_model"),
    "results": Place(module="matris.run", name="_finish"),
}
"""`shard` to `removal` run in the thread that writes; `finish` and `removal` on rank 0 alone, like exports."""

AREAS = ("checkpoints", "best", "last")
"""Parts of a run's directory; `files in checkpoints` and so on are places as well: operations on files there."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The `call`-th time, from 1, that a rank comes to a place, or leaves it.

    Attributes:
        rank: None for each rank at its own call.
    """

    place: str
    call: int
    after: bool = False
    rank: int | None = 0

    def __str__(self) -> str:
        where = "" if self.rank is None else f" of rank {self.rank}"
        return f"{'after' if self.after else 'before'} {self.place} {self.call}{where}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank does beside training.

    Attributes:
        rank: its own.
        folder: of the launch: `pids`, and what is found out there.
        output: run directory.
        keep_last: checkpoints that must never be missing again once they were there.
        moment: when to act; None: never, but `refuse`, then for the whole directory.
        act: what to do.
        everyone: whether a signal goes to all ranks.
        room: bytes that a full disk still has, or that a file may have.
        breakage: a way in which the product is broken on purpose, see `BREAKAGES`.
    """

    rank: int
    folder: Path
    output: Path
    keep_last: int
    moment: Moment | None = None
    act: Act = "kill"
    everyone: bool = False
    room: int = 0
    breakage: str = ""


class Hooks:
    """Everything that is installed in a rank. It lasts as long as the process.

    Attributes:
        calls: how often each place was reached.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.calls: Counter[str] = Counter()
        self._refusing = plan.act == "refuse" and plan.moment is None
        self._watching = threading.local()
        self._newest, self._most = -1, 0
        if plan.breakage:
            BREAKAGES[plan.breakage]()
        for name, place in PLACES.items():
            self._wrap(name, place)
        sys.addaudithook(self._audit)

    def write_calls(self) -> None:
        """For those who choose moments."""
        (self.plan.folder / f"calls.{self.plan.rank}.json").write_text(json.dumps(self.calls))

    def _wrap(self, name: str, place: Place) -> None:
        owner, last = place.find()
        original = getattr(owner, last)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if any(options.get(option) != value for option, value in place.options):
                return original(*arguments, **options)
            self.calls[name] += 1
            call = self.calls[name]
            self._reached(name, call, after=False)
            result = original(*arguments, **options)
            self._reached(name, call, after=True)
            return result

        setattr(owner, last, wrapped)

    def _reached(self, place: str, call: int, *, after: bool) -> None:
        moment = self.plan.moment
        if moment is None or (moment.place, moment.call, moment.after) != (place, call, after):
            return
        fired = self.plan.folder / f"fired.{self.plan.rank}"
        if moment.rank in (None, self.plan.rank) and not fired.exists():  # once, also where a launcher starts it again
            fired.touch()
            self._act()

    # Acts ------------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        act, checkpoints = self.plan.act, self.plan.output / "checkpoints"
        if act in SIGNALS:
            others = [pid for pid in self._pids() if pid != os.getpid()] if self.plan.everyone else []
            for pid in (*others, os.getpid()):
                os.kill(pid, SIGNALS[act])
        elif act == "fill":
            fill(self.plan.output / "ballast", self.plan.room)
        elif act == "limit":
            # Python ignores SIGXFSZ, so that a write beyond this fails like one on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.plan.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif act == "bind":
            make_read_only(checkpoints)
        elif act == "mode":
            checkpoints.chmod(stat.S_IRUSR | stat.S_IXUSR)
        else:
            self._refusing = True

    def _pids(self) -> list[int]:
        """Of all ranks, as soon as they all exist."""
        file = self.plan.folder / "pids"
        while not file.exists():
            time.sleep(0.01)
        return [int(word) for word in file.read_text().split()]

    # Files -----------------------------------------------------------------------------------------------------------

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self._watching, "busy", False):
            return
        path = _changed_path(event, arguments)
        if path is None or not path.is_relative_to(self.plan.output):
            return
        if self._refusing and self.plan.moment is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        parts = path.relative_to(self.plan.output).parts
        area = parts[0].removeprefix(".").partition(".")[0] if parts else ""
        if area not in AREAS:
            return
        self._watching.busy = True  # what follows looks at files itself
        try:
            place = f"files in {area}"
            self.calls[place] += 1
            if area == "checkpoints":
                self._watch(f"{event} {path}")
            self._reached(place, self.calls[place], after=False)
            if self._refusing and area == "checkpoints":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        finally:
            self._watching.busy = False

    def _watch(self, what: str) -> None:
        """Says it if there are fewer valid checkpoints than there must be, or older ones than there were."""
        valid = valid_steps(self.plan.output)
        least = min(self._most, self.plan.keep_last)
        if len(valid) < least or (valid and valid[-1] < self._newest) or (not valid and self._newest >= 0):
            with (self.plan.folder / f"violations.{self.plan.rank}").open("a") as stream:
                stream.write(f"before {what}: the valid checkpoints are {valid}, and at least {least} up to step ")
                stream.write(f"{self._newest} must be there\n")
        self._newest, self._most = max([self._newest, *valid]), max(self._most, len(valid))


def valid_steps(output: Path) -> list[int]:
    """Steps of a run with a valid checkpoint, ascending."""
    from janus.checkpoint import CheckpointError, verify_directory

    found = []
    for path in sorted((output / "checkpoints").glob("step_*")):
        try:
            verify_directory(path)
        except CheckpointError:
            continue
        found.append(int(path.name.removeprefix("step_")))
    return found


def fill(ballast: Path, room: int) -> None:
    """Fills a file system with a file until it has so many bytes left."""
    state = os.statvfs(ballast.parent)
    with ballast.open("wb") as stream:
        stream.write(bytes(max(0, state.f_bavail * state.f_frsize - room)))


def make_read_only(folder: Path) -> None:
    """Mounts a folder over itself, for reading."""
    subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)


def _changed_path(event: str, arguments: tuple[Any, ...]) -> Path | None:
    """What an audit event is about to change; None for all others."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
    elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"):
        path = arguments[0]
        folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    else:
        return None
    return Path(os.path.abspath(os.fsdecode(path))) if isinstance(path, str | bytes | os.PathLike) else None


# Products that are broken on purpose, which the cases must notice ----------------------------------------------------


def _renames_before_the_last_file() -> None:
    """The checkpoint appears, and only then its manifest."""
    from janus.checkpoint import directory, manifest

    def write(self: manifest.Manifest, staging: Path) -> None:
        final = staging.with_name(staging.name.removeprefix(directory.WRITING))
        staging.rename(final)
        original(self, final)
        final.rename(staging)

    original = manifest.Manifest.write
    setattr(manifest.Manifest, "write", write)  # noqa: B010


def _removes_the_old_before_the_new() -> None:
    from janus.checkpoint import CheckpointStore
    from janus.checkpoint.store import remove

    def save(self: CheckpointStore, *arguments: Any, **options: Any) -> Any:
        self.wait()
        if self.mesh.is_main:
            for step in self.steps()[:-1]:
                remove(self.path(step))
        return original(self, *arguments, **options)

    original = CheckpointStore.save
    setattr(CheckpointStore, "save", save)  # noqa: B010


def _forgets_the_average() -> None:
    """A resumed run begins its moving average anew."""
    from janus.training.learner import Learner

    def restore(self: Learner, *arguments: Any) -> None:
        original(self, *arguments)
        self.ema.restart()

    original = Learner.restore
    setattr(Learner, "restore", restore)  # noqa: B010


def _hides_a_failed_save() -> None:
    """The run goes on as if the checkpoint were there."""
    from janus.checkpoint import CheckpointStore

    def save(self: CheckpointStore, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self._thread is not None:
            self._thread.join()
        self._failure = None

    original = CheckpointStore.save
    setattr(CheckpointStore, "save", save)  # noqa: B010


def _skips_the_checks() -> None:
    """Damage is not looked for in files of the right size."""
    from janus.checkpoint import directory, manifest

    def read_manifest(path: Path) -> manifest.Manifest:
        found = original(path)
        tensors = {
            name: replace(tensor, pieces=tuple(replace(piece, crc32=None) for piece in tensor.pieces))
            for name, tensor in found.tensors.items()
        }
        return replace(found, tensors=tensors)

    original = directory.read_manifest
    setattr(directory, "read_manifest", read_manifest)  # noqa: B010


BREAKAGES: dict[str, Callable[[], None]] = {
    "renames before the last file": _renames_before_the_last_file,
    "removes the old before the new": _removes_the_old_before_the_new,
    "forgets the average": _forgets_the_average,
    "hides a failed save": _hides_a_failed_save,
    "skips the checks": _skips_the_checks,
}
