"""Seeded cases: which faults hit which run, one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tools.fault_hooks import SIGNALS, Act
from tools.fault_runs import LAYOUTS

Hurt = Literal["truncate", "flip", "empty", "delete", "remove"]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A launch in which something happens.

    Attributes:
        act: what.
        place: where, see `PLACES`; None for some time or other.
        part: which of the times that an undisturbed run comes there, or of its duration; 0..1.
        call: the same, as a number.
        after: when the function returns.
        rank: who.
        everyone: whether a signal goes to all ranks, or a limit holds for all.
        room: as in `Plan`, as a part of a checkpoint.
    """

    act: Act
    place: str | None = None
    part: float = 0.0
    call: int | None = None
    after: bool = False
    rank: int = 0
    everyone: bool = False
    room: float = 0.0

    @property
    def is_signal(self) -> bool:
        return self.act in SIGNALS

    def __str__(self) -> str:
        who = ("all ranks" if self.everyone else f"rank {self.rank}") if self.is_signal else "disk"
        if self.place is None:
            return f"{self.act} {who} after {self.part:.2f} of the time"
        which = f"{self.call}" if self.call is not None else f"at {self.part:.2f}"
        return f"{self.act} {who} {'after' if self.after else 'before'} {self.place} {which}"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The newest checkpoint, or all of them, are damaged while nothing runs.

    Attributes:
        how: to one file, or `remove` the whole directory.
        part: which file, and where; 0..1.
        kind: ending of the file's name, empty for any.
        everything: all checkpoints.
    """

    how: Hurt
    part: float = 0.0
    kind: str = ""
    everything: bool = False

    def __str__(self) -> str:
        what = "every checkpoint" if self.everything else "the newest"
        return f"{self.how} {what}" + (f", {self.kind or 'any file'} {self.part:.2f}" if self.how != "remove" else "")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A launch that has to be refused with status 2 and a reason, and to change nothing.

    Attributes:
        why: `damaged`: the newest checkpoint, which is damaged, is asked for; `foreign`: the checkpoint of another
            model; `nothing`: a directory without a checkpoint; `all`: all checkpoints are damaged; `read-only`: nothing
            can be written to the run's directory.
    """

    why: Literal["damaged", "foreign", "nothing", "all", "read-only"]

    def __str__(self) -> str:
        return f"refusal ({self.why})"


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """A launch under torchrun, which starts it again by itself.

    Attributes:
        strike: of rank 0 or 1.
    """

    strike: Strike

    def __str__(self) -> str:
        return f"torchrun --max-restarts, {self.strike}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run with faults, which then goes on without.

    Attributes:
        family: what it is about.
        acts: in this order.
        layout, last_layout: of the launches with faults, and of the last one.
        breakage: see `BREAKAGES`.
    """

    family: str
    acts: tuple[Strike | Damage | Refusal | Torchrun, ...]
    layout: str
    last_layout: str
    breakage: str = ""


# Making cases --------------------------------------------------------------------------------------------------------

_MAIN_ONLY = ("finish", "flush", "removal", "export", "files in checkpoints", "files in best", "files in last")
_SAVING = ("save", "shard", "finish", "flush", "removal", "files in checkpoints")
_COMPUTING = ("step", "gradients", "update", "evaluation", "evaluation batch")
_INTERRUPTED = Strike(act="kill", place="step", call=8, everyone=True)
"""Leaves at least two checkpoints: the one of step 4 is waited for in step 6."""


def case_of(seed: int) -> Case:
    """Always the same for the same seed; the families take turns."""
    name = _TURNS[seed % len(_TURNS)]
    return _FAMILIES[name](random.Random(seed))


def _layout(rng: random.Random, *names: str) -> str:
    return rng.choice(names or ("one", "dp2", "dp2", "fsdp2", "fsdp2", "tp2", "moe", "moe-ep2", "moe-ep2"))


def _strike(rng: random.Random, act: Act, places: Sequence[str], layout: str, *, everyone: bool = False) -> Strike:
    place = rng.choice(places)
    ranks = 1 if place in _MAIN_ONLY else LAYOUTS[layout].ranks
    after = rng.random() < 0.5 and not place.startswith("files")
    return Strike(act=act, place=place, part=rng.random(), after=after, rank=rng.randrange(ranks), everyone=everyone)


def _same(family: str, layout: str, *acts: Strike | Damage | Refusal | Torchrun) -> Case:
    return Case(family=family, acts=acts, layout=layout, last_layout=layout)


def _signal_at(act: Act, family: str, places: Sequence[str]) -> Callable[[random.Random], Case]:
    def case(rng: random.Random) -> Case:
        layout = _layout(rng)
        number: Act = "usr1" if act == "term" and rng.random() < 0.25 else act
        return _same(family, layout, _strike(rng, number, places, layout, everyone=rng.random() < 0.5))

    return case


def _signal_some_time(act: Act, family: str) -> Callable[[random.Random], Case]:
    def case(rng: random.Random) -> Case:
        layout = _layout(rng)
        rank = rng.randrange(LAYOUTS[layout].ranks)
        return _same(family, layout, Strike(act=act, part=rng.random(), rank=rank, everyone=rng.random() < 0.5))

    return case


def _in_resume(rng: random.Random) -> Case:
    layout = _layout(rng)
    act: Act = rng.choice(("kill", "kill", "term"))
    place = rng.choice(("search", "restore"))
    rank = rng.randrange(LAYOUTS[layout].ranks)
    again = Strike(act=act, place=place, call=1, after=rng.random() < 0.5, rank=rank, everyone=rng.random() < 0.5)
    return _same("signal in resume", layout, _INTERRUPTED, again)


def _twice(rng: random.Random) -> Case:
    layout = _layout(rng)
    first = _strike(rng, "kill", _SAVING, layout, everyone=True)
    second = _strike(rng, rng.choice(("kill", "term")), (*_SAVING, *_COMPUTING), layout)
    return _same("two signals", layout, first, second)


def _damage(rng: random.Random) -> Damage:
    how: Hurt = rng.choice(("truncate", "flip", "empty", "delete"))
    return Damage(how=how, part=rng.random(), kind=rng.choice(("", "", "safetensors", "json")))


def _damaged(rng: random.Random) -> Case:
    return _same("damaged newest", _layout(rng), _INTERRUPTED, _damage(rng))


def _shard_deleted(rng: random.Random) -> Case:
    layout = _layout(rng, "dp2", "fsdp2", "tp2", "moe-ep2")
    damage = Damage(how="delete", kind="safetensors", part=rng.random())
    return _same("shard deleted", layout, _INTERRUPTED, damage)


def _removed(rng: random.Random) -> Case:
    return _same("newest removed", _layout(rng), _INTERRUPTED, Damage(how="remove"))


def _damaged_and_killed(rng: random.Random) -> Case:
    """A kill after the save of step 6 has begun, damage, a kill while another is written, another layout at the end."""
    layout = _layout(rng)
    second = _strike(rng, "kill", ("search", "shard", "files in checkpoints"), layout, everyone=True)
    same_model = [name for name, other in LAYOUTS.items() if other.model == LAYOUTS[layout].model]
    acts = (_INTERRUPTED, _damage(rng), replace(second, part=0.5 * second.part))
    return Case(family="damage and kill", acts=acts, layout=layout, last_layout=rng.choice(same_model))


def _other_layout(rng: random.Random) -> Case:
    layout = _layout(rng)
    act: Act = rng.choice(("kill", "term"))
    strike = _strike(rng, act, (*_SAVING, *_COMPUTING), layout, everyone=True)
    others = [name for name, other in LAYOUTS.items() if other.model == LAYOUTS[layout].model and name != layout]
    return Case(family="other layout", acts=(strike,), layout=layout, last_layout=rng.choice(others))


def _full(rng: random.Random) -> Case:
    layout = _layout(rng)
    act: Act = rng.choice(("fill", "fill", "limit"))
    place, part = rng.choice(("save", "shard", "step", "finish")), rng.random()
    if act == "fill":
        return _same("full disk", layout, Strike(act=act, place=place, part=part, room=rng.uniform(0.0, 1.1)))
    rank = 0 if place in _MAIN_ONLY else rng.randrange(LAYOUTS[layout].ranks)
    strike = Strike(act=act, place=place, part=part, rank=rank, everyone=rng.random() < 0.5)
    return _same("full disk", layout, replace(strike, room=rng.uniform(0.2, 0.9)))


def _read_only(rng: random.Random) -> Case:
    act: Act = rng.choice(("bind", "bind", "refuse"))
    place = rng.choice(("save", "step", "shard"))
    return _same("read-only", _layout(rng), Strike(act=act, place=place, part=rng.uniform(0.4, 1.0)))


def _hang(rng: random.Random) -> Case:
    layout = _layout(rng, "dp2", "fsdp2", "tp2", "moe-ep2")
    if rng.random() < 0.25:
        place = rng.choice(("search", "restore"))
        strike = Strike(act="stop", place=place, call=1, after=rng.random() < 0.5, rank=rng.randrange(2))
        return _same("hanging rank", layout, _INTERRUPTED, strike)
    return _same("hanging rank", layout, _strike(rng, "stop", (*_COMPUTING, "save", "shard", "export"), layout))


def _refused(why: Literal["damaged", "foreign", "nothing", "all", "read-only"]) -> Callable[[random.Random], Case]:
    def case(rng: random.Random) -> Case:
        layout = _layout(rng)
        before: tuple[Strike | Damage, ...] = ()
        if why in ("damaged", "all"):
            before = (_INTERRUPTED, replace(_damage(rng), everything=why == "all"))
        elif why == "read-only" and rng.random() < 0.5:
            before = (_INTERRUPTED,)
        return _same("refusal", layout, *before, Refusal(why=why))

    return case


def _torchrun(rng: random.Random) -> Case:
    strike = Strike(act="kill", place=rng.choice(("step", "shard")), part=rng.uniform(0.5, 1.0), rank=rng.randrange(2))
    return _same("torchrun", _layout(rng, "dp2", "fsdp2"), Torchrun(strike=strike))


_FAMILIES: dict[str, Callable[[random.Random], Case]] = {
    "kill in a save": _signal_at("kill", "kill in a save", _SAVING),
    "kill at a file": _signal_at("kill", "kill at a file", ("files in checkpoints",)),
    "kill in a step": _signal_at("kill", "kill in a step", ("step", "gradients", "update")),
    "kill in evaluation": _signal_at("kill", "kill in evaluation", ("evaluation", "evaluation batch")),
    "kill in an export": _signal_at("kill", "kill in an export", ("export", "files in best", "files in last")),
    "kill at the end": _signal_at("kill", "kill at the end", ("results",)),
    "kill some time": _signal_some_time("kill", "kill some time"),
    "term in a save": _signal_at("term", "term in a save", _SAVING),
    "term in a step": _signal_at("term", "term in a step", ("step", "gradients", "update")),
    "term elsewhere": _signal_at(
        "term", "term elsewhere", ("evaluation", "evaluation batch", "export", "files in best")
    ),
    "term some time": _signal_some_time("term", "term some time"),
    "signal in resume": _in_resume,
    "two signals": _twice,
    "damaged newest": _damaged,
    "shard deleted": _shard_deleted,
    "newest removed": _removed,
    "damage and kill": _damaged_and_killed,
    "other layout": _other_layout,
    "full disk": _full,
    "read-only": _read_only,
    "hanging rank": _hang,
    "asked for damaged": _refused("damaged"),
    "foreign": _refused("foreign"),
    "no checkpoint": _refused("nothing"),
    "all damaged": _refused("all"),
    "read-only at start": _refused("read-only"),
    "torchrun": _torchrun,
}
_TWICE_AS_OFTEN = ("kill in a save", "kill at a file", "damaged newest", "full disk", "kill some time", "other layout")
_TURNS = (*_FAMILIES, *_TWICE_AS_OFTEN)
