"""Some of the cases of `make faults`, and products that are broken on purpose, which the cases must notice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.fault_cases import Case, Damage, Refusal, Strike, case_of
from tools.fault_hooks import BREAKAGES, PLACES
from tools.faults import NUM_CASES, run_cases

_INTERRUPTED = Strike(act="kill", place="step", call=8, everyone=True)
CASES = {
    "kill in a save": Case(
        family="",
        acts=(Strike(act="kill", place="finish", call=3), Strike(act="term", place="shard", call=1, rank=1)),
        layout="fsdp2",
        last_layout="fsdp2",
    ),
    "kill in a resume, other layout": Case(
        family="",
        acts=(_INTERRUPTED, Strike(act="kill", place="restore", call=1, after=True, everyone=True)),
        layout="moe-ep2",
        last_layout="moe",
    ),
    "damaged": Case(
        family="",
        acts=(_INTERRUPTED, Damage(how="flip", kind="safetensors", part=0.7), Refusal(why="damaged")),
        layout="one",
        last_layout="dp2",
    ),
    "foreign, all damaged": Case(
        family="",
        acts=(Refusal(why="foreign"), _INTERRUPTED, Damage(how="truncate", everything=True), Refusal(why="all")),
        layout="one",
        last_layout="one",
    ),
    "full disk": Case(
        family="", acts=(Strike(act="limit", place="shard", call=3, room=0.5),), layout="one", last_layout="one"
    ),
    "read-only": Case(family="", acts=(Strike(act="bind", place="save", call=3),), layout="dp2", last_layout="dp2"),
    "hanging": Case(
        family="", acts=(Strike(act="stop", place="shard", call=2, rank=1),), layout="fsdp2", last_layout="fsdp2"
    ),
    "started again by torchrun": next(
        case for seed in range(NUM_CASES) if (case := case_of(seed)).family == "torchrun"
    ),
}
NOTICED = {
    "renames before the last file": (
        "was not made by one rename",
        (Strike(act="kill", place="files in checkpoints", call=7),),
    ),
    "removes the old before the new": ("must be there", ()),
    "forgets the average": ("tensors differ, such as ema/", (_INTERRUPTED,)),
    "hides a failed save": ("nothing could be written", (Strike(act="refuse", place="save", call=3),)),
    "skips the checks": ("no line says that .* is damaged", (_INTERRUPTED, CASES["damaged"].acts[1])),
}
"""By breakage: what is to be said, and what has to happen for it."""


def problems_of(cases: dict[str, Case], base: Path) -> dict[str, list[str]]:
    """Of many cases in one test: a fixture for several would be made again by each process that runs some of them."""
    names = list(cases)
    found = run_cases(dict(enumerate(cases.values())), base, jobs=2)
    return {names[result.seed]: result.problems for result in found}


@pytest.mark.slow
def test_runs_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    assert problems_of(CASES, tmp_path) == {name: [] for name in CASES}


@pytest.mark.slow
def test_broken_products_are_noticed(tmp_path: Path) -> None:
    assert NOTICED.keys() == set(BREAKAGES)
    cases = {
        name: Case(family="", acts=acts, layout="one", last_layout="one", breakage=name)
        for name, (_, acts) in NOTICED.items()
    }
    problems = problems_of(cases, tmp_path)
    noticed = {name: any(re.search(NOTICED[name][0], problem) for problem in problems[name]) for name in NOTICED}
    assert all(noticed.values()), {name: problems[name] for name in NOTICED if not noticed[name]}


@pytest.mark.parametrize("name", PLACES)
def test_the_product_has_the_places(name: str) -> None:
    owner, function = PLACES[name].find()
    assert callable(getattr(owner, function))


def test_a_seed_is_always_the_same_case() -> None:
    assert NUM_CASES >= 100
    assert [case_of(seed) for seed in range(NUM_CASES)] == [case_of(seed) for seed in range(NUM_CASES)]
    assert len({str(case_of(seed)) for seed in range(NUM_CASES)}) > 0.9 * NUM_CASES
