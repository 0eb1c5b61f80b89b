"""Running a case, and whether what follows from its faults is right."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from tools.fault_cases import Case, Damage, Refusal, Strike, Torchrun
from tools.fault_hooks import SIGNALS, Act, Moment, Plan, make_read_only, valid_steps
from tools.fault_runs import (
    KEEP_LAST,
    LAYOUTS,
    STEPS,
    History,
    Launched,
    Reference,
    command,
    differences,
    launch,
    write_plan,
)

_HANG_MINUTES = 0.15
_STOPPED = 143
_LOST = (
    r"error: (ranks? [\d, ]+ (died or stopped|has died|has stopped|did not come|failed)|rank \d+: .*did not meet|"
    r"no rank came|the connection)"
)
_FULL = r"error: .*(No space left|File too large|os error 2[78]|code: 2[78])"
_READ_ONLY = r"error: .*(Read-only file system|Permission denied|os error (13|30)|code: (13|30))"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of a case.

    Attributes:
        told: the acts as they were, with the means that this machine allows.
        problems: empty if all is well.
    """

    seed: int
    case: Case
    told: list[str]
    problems: list[str]
    seconds: float


def run_case(seed: int, case: Case, base: Path, folder: Path) -> Result:
    """Runs a case in a process with one thread.

    Args:
        base: with data and references.
        folder: to be made; removed if all is well.
    """
    begin = time.monotonic()
    folder.mkdir(parents=True)
    run = _Run(case=case, base=base, folder=folder)
    try:
        run.all()
    except Exception as error:  # the harness itself, or a file that it should have found
        run.problems.append(f"{type(error).__name__}: {error}")
    finally:
        run.unmount()
    if not run.problems:
        shutil.rmtree(folder)
    return Result(seed=seed, case=case, told=run.told, problems=run.problems, seconds=time.monotonic() - begin)


@dataclass(kw_only=True)
class _Run:
    """A case while it runs.

    Attributes:
        launches: so far.
        passed_over: what was said of damaged files is to be found in the log, unless it was already.
    """

    case: Case
    base: Path
    folder: Path
    told: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    launches: int = 0
    passed_over: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = self.folder / "run"
        self.output.mkdir()
        self.history = History(output=self.output)
        self.layout = LAYOUTS[self.case.layout]
        self.reference = Reference(self.base, self.case.layout)
        if any(isinstance(act, Strike) and act.act == "fill" for act in self.case.acts) and can_mount():
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", self.output], check=True)

    def unmount(self) -> None:
        """All that was mounted below the run."""
        mounts = Path("/proc/self/mounts").read_text() if Path("/proc/self/mounts").exists() else ""
        folders = [line.split()[1] for line in mounts.splitlines()]
        for folder in sorted((name for name in folders if Path(name).is_relative_to(self.output)), reverse=True):
            subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)

    def all(self) -> None:
        for act in self.case.acts:
            if isinstance(act, Strike):
                self._strike(act)
            elif isinstance(act, Damage):
                self._damage(act)
            elif isinstance(act, Refusal):
                self._refusal(act)
            else:
                self._torchrun(act)
        self._undisturbed()

    def _problem(self, text: str) -> None:
        self.problems.append(f"launch {self.launches}: {text}")

    def _launch(
        self,
        plan: Plan,
        *,
        words: Sequence[str] = (),
        layout: str = "",
        delayed: dict[int, signal.Signals] | None = None,
        delay: float = 0.0,
        timeout_minutes: float | None = None,
    ) -> Launched:
        """Of all ranks, with looks at the disk and the log that are the same for all launches."""
        self.launches += 1
        shape = LAYOUTS[layout or self.case.layout]
        options = {} if timeout_minutes is None else {"timeout_minutes": timeout_minutes}
        line = [*command(self.base, self.output, shape, **options), *words]
        plans = [replace(plan, rank=rank) for rank in range(shape.ranks)]
        launched = launch(line, plans, delayed=delayed, delay=delay)
        self._look(launched)
        return launched

    def _look(self, launched: Launched) -> None:
        for problem in (*launched.violations, *self.history.problems()):
            self._problem(problem)
        if "Traceback" in _without_tensorboard(launched.text):
            self._problem(f"a traceback: {_last_line(launched.text)}")
        self.passed_over = [file for file in self.passed_over if not _says_fallback(launched.text, file)]

    def _plan(self) -> Plan:
        return Plan(
            rank=0,
            folder=self.folder / f"launch_{self.launches + 1}",
            output=self.output,
            keep_last=KEEP_LAST,
            breakage=self.case.breakage,
        )

    # Acts ------------------------------------------------------------------------------------------------------------

    def _strike(self, strike: Strike) -> None:
        act = _means(strike.act)
        first = self.launches == 0
        minutes = _HANG_MINUTES if act == "stop" else None
        if strike.place is None:
            ranks = range(self.layout.ranks) if strike.everyone else [strike.rank]
            delay = strike.part * self.reference.seconds
            self.told.append(f"{strike} ({delay:.2f} s)")
            number = SIGNALS[act]
            launched = self._launch(self._plan(), delayed=dict.fromkeys(ranks, number), delay=delay)
        else:
            call = strike.call or 1 + int(strike.part * self.reference.calls(strike.place, strike.rank))
            rank = None if act == "limit" and strike.everyone else strike.rank
            moment = Moment(place=strike.place, call=call, after=strike.after, rank=rank)
            size = self.reference.checkpoint_bytes if act == "fill" else self.reference.largest_file_bytes
            room = int(strike.room * size)
            who = "" if not strike.is_signal else "all ranks " if strike.everyone else f"rank {strike.rank} "
            self.told.append(f"{act} {who}{moment}" + (f", {room} bytes left" if act in ("fill", "limit") else ""))
            plan = replace(self._plan(), moment=moment, act=act, everyone=strike.everyone, room=room)
            launched = self._launch(plan, timeout_minutes=minutes)
        self._repair(act)
        if not launched.fired:
            if first and strike.place is not None:
                self._problem("the moment did not come")
            if any(launched.statuses):
                self._problem(f"nothing happened, and it ended with {launched.statuses}")
            return
        for problem in _strike_problems(replace(strike, act=act), launched, self.output):
            self._problem(problem)

    def _repair(self, act: Act) -> None:
        (self.output / "ballast").unlink(missing_ok=True)
        if act == "bind":
            subprocess.run(["umount", "--lazy", self.output / "checkpoints"], check=False, capture_output=True)
        elif act == "mode" and (self.output / "checkpoints").exists():
            (self.output / "checkpoints").chmod(0o755)

    def _damage(self, damage: Damage) -> None:
        steps = valid_steps(self.output)
        if len(steps) < 2:
            self._problem(f"only {steps} are there to be damaged")
            return
        for step in steps if damage.everything else steps[-1:]:
            path = self.history.path(step)
            self.history.forget(path)
            if damage.how == "remove":
                shutil.rmtree(path)
                self.told.append(f"{path.name} removed")
                continue
            files = sorted(file for file in path.iterdir() if file.name.endswith(damage.kind))
            file = files[int(damage.part * len(files))]
            _hurt(file, damage)
            self.passed_over.append(f"{path.name}/{file.name}")
            self.told.append(f"{damage.how} {path.name}/{file.name}")

    def _refusal(self, refusal: Refusal) -> None:
        why, before = refusal.why, _content(self.output)
        words: list[str] = []
        plan = self._plan()
        if why == "damaged":
            words, message = (
                [str(self.output / "checkpoints" / self.passed_over[0].split("/")[0])],
                (f"checkpoint file .*{re.escape(self.passed_over[0])} (is missing|is damaged|cannot be used)"),
            )
        elif why == "foreign":
            other = Reference(self.base, "one" if self.layout.model == "experts" else "moe")
            words, message = (
                [str(other.output / "checkpoints" / f"step_{STEPS:08d}")],
                (f"checkpoint {re.escape(str(other.output))}.* is of another model: .*model."),
            )
        elif why == "nothing":
            words, message = (
                [str(self.base)],
                rf"checkpoint file {re.escape(str(self.base))}/manifest\.json cannot be used: .+",
            )
        elif why == "all":
            message = "none of the \\d+ checkpoints in .* is valid.*" + re.escape(self.passed_over[0])
        else:
            message = "files cannot be written there"
            if _means("bind") == "bind":
                make_read_only(self.output)
            elif _means("bind") == "mode":
                self.output.chmod(0o555)
            else:
                plan = replace(plan, act="refuse")
        self.told.append(f"{refusal}")
        launched = self._launch(plan, words=[word for path in words for word in ("--training.resume", path)])
        if why == "read-only":
            self.unmount()
            self.output.chmod(0o755)
        if launched.statuses != [2] * len(launched.statuses):
            self._problem(f"must be refused with status 2, and the statuses are {launched.statuses}")
        if not re.search(f"error: .*{message}", launched.text):
            self._problem(f"says no {message!r}, but {_last_line(launched.text)}")
        if _content(self.output) != before:
            self._problem("a refused launch has changed the checkpoints")
        if why == "all":  # what the message says
            shutil.rmtree(self.output / "checkpoints")
            self.passed_over, self.history = [], History(output=self.output)

    def _torchrun(self, act: Torchrun) -> None:
        strike, plan = act.strike, self._plan()
        self.launches += 1
        assert strike.place is not None
        call = 1 + int(strike.part * self.reference.calls(strike.place, strike.rank))
        moment = Moment(place=strike.place, call=call, rank=strike.rank)
        self.told.append(f"torchrun --max-restarts 2, kill {moment}")
        write_plan(replace(plan, moment=moment))
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
        line += ["--module", "tools.fault_runs", str(plan.folder), *command(self.base, self.output, self.layout)]
        root = Path(__file__).resolve().parents[1]
        begin = time.monotonic()
        done = subprocess.run(
            line,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        (plan.folder / "0.log").write_text(done.stdout)
        # torchrun reports a killed rank with a traceback of its own.
        text = "\n".join(line for line in done.stdout.splitlines() if "Traceback" not in line)
        fired = any(plan.folder.glob("fired.*"))
        seconds = time.monotonic() - begin
        self._look(Launched(statuses=[done.returncode], texts=[text], fired=fired, violations=[], seconds=seconds))
        if not fired:
            self._problem("the moment did not come")
        if done.returncode:
            self._problem(f"torchrun ended with {done.returncode}: {_last_line(done.stdout)}")
        if not re.search(rf"error: rank {strike.rank} (died or stopped|has died)", text):
            self._problem("no line says which rank died")
        if not re.search(r"resuming after step \d+ from ", text):
            self._problem("no line says that the run was resumed")
        for problem in differences(self.output, self.reference.output, exact=True):
            self._problem(problem)

    def _undisturbed(self) -> None:
        """The same command again, at the last layout: it must come to the end of an undisturbed run."""
        newest = max(valid_steps(self.output), default=None)
        launched = self._launch(self._plan(), layout=self.case.last_layout)
        if any(launched.statuses):
            self._problem(f"the last launch ended with {launched.statuses}: {_last_line(launched.text)}")
            return
        for file in self.passed_over:
            self._problem(f"no line says that {file} is damaged, why, and what is used in its place")
        if newest is not None and not re.search(
            rf"resuming after step {newest} from .*step_{newest:08d}", launched.text
        ):
            self._problem(f"no line says that the run goes on from step {newest}")
        exact = self.case.last_layout == self.case.layout
        for problem in differences(self.output, Reference(self.base, self.case.last_layout).output, exact=exact):
            self._problem(problem)


def _strike_problems(strike: Strike, launched: Launched, output: Path) -> Iterator[str]:
    """Whether exit statuses and messages fit to what happened."""
    statuses, text = launched.statuses, launched.text
    victims = range(len(statuses)) if strike.everyone else [strike.rank]
    others = [status for rank, status in enumerate(statuses) if rank not in victims]
    ended = f"{strike.act}: the statuses are {statuses}"
    # Ranks that are done, or have not begun, need not be hit.
    loose = strike.place is None or (strike.place == "results" and strike.after)
    if strike.act in ("fill", "limit", "bind", "mode", "refuse"):
        pattern = _FULL if strike.act in ("fill", "limit") else _READ_ONLY
        if any(statuses):
            if statuses != [2] * len(statuses):
                yield f"{ended}, and have to be 2: {_last_line(text)}"
            if not re.search(pattern, text):
                yield f"{strike.act}: no line says the reason: {_last_line(text)}"
            if str(output) not in "".join(re.findall(r"error: .*", text)):
                yield f"{strike.act}: no line says the file: {_last_line(text)}"
        elif strike.act not in ("fill", "limit"):
            yield f"{ended}, and nothing could be written"
        return
    if strike.act in ("term", "usr1") and all(status in (0, _STOPPED) for status in statuses):
        if len(set(statuses)) > 1 and not loose:
            yield f"{ended}, and have to be the same"
        if _STOPPED in statuses and "stopped after step" not in text:
            yield f"{strike.act}: no line says that the run was stopped"
        if strike.place in ("step", "gradients", "update") and strike.call is None and _STOPPED not in statuses:
            last = STEPS
            if f"step {last}/" not in text:
                yield f"{ended}"
        return
    number = -int(SIGNALS[strike.act]) if strike.act != "stop" else -int(signal.SIGKILL)
    hit = [statuses[rank] for rank in victims]
    if not loose and (number not in hit or not set(hit) <= {number, 0, 1, 2}):
        yield f"{ended}, and {number} was to be expected"
    if not loose and 0 in others:
        yield f"{ended}: a rank has ended as if all were well"
    if any(status not in (0, 1, 2, _STOPPED, number) for status in statuses):
        yield ended
    if not loose and any(others) and not re.search(_LOST, text):
        yield f"{strike.act}: no line says which rank was lost: {_last_line(text)}"


def _hurt(file: Path, damage: Damage) -> None:
    content = bytearray(file.read_bytes())
    if damage.how == "delete":
        file.unlink()
        return
    if damage.how == "flip":
        # The header of a safetensors file is not read: the manifest says where everything is.
        begin = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
        content[begin + int(damage.part * (len(content) - begin))] ^= 0x10
    else:
        del content[int(damage.part * len(content)) if damage.how == "truncate" else 0 :]
    file.write_bytes(content)


def _says_fallback(text: str, file: str) -> bool:
    """Whether a line names the file, a reason and what is used in its place."""
    pattern = rf"checkpoint file .*{re.escape(file)} (is missing|is damaged|cannot be).*falling back to .*step_\d+"
    return re.search(pattern, text) is not None


def _content(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted((output / "checkpoints").glob("step_*/*"))
    }


def _without_tensorboard(text: str) -> str:
    """Its thread prints what it also hands on."""
    return re.sub(r"Exception in thread .*\n(.*tensorboard.*\n| +.*\n|Traceback.*\n)+\w+Error.*\n", "", text)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def _means(act: Act) -> Act:
    """What this machine allows: without mounts a full disk is a limit on the size of files, which needs no rights."""
    if act == "fill" and not can_mount():
        return "limit"
    if act == "bind" and not can_mount():
        return "mode" if os.geteuid() else "refuse"
    return act


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
        except OSError:
            return False
        if done.returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True
