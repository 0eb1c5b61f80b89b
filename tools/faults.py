"""Real, tiny trainings that are killed, stopped, damaged and starved at chosen and at random moments, and go on.

    python -m tools.faults --jobs 2            # make faults: all cases
    python -m tools.faults --seed 17           # one of them again

Each case starts `janus-matris train` on one or two ranks (fp64, a few seconds), lets one or more faults happen to it,
gives the same command again, and compares the end with an undisturbed run: weights, moments and moving average bit by
bit (1e-10 where the last launch has another layout), exported models, log and errors. After every launch each
checkpoint must be valid, and those that `keep_last`, `keep_every` and the best step keep must be there; while a rank
runs, it looks at them before every operation on files. Exit statuses and messages must be those of the fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the import of torch: ranks are forked
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # likewise; the command line sets it, and is too late here
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of the locks of ranks that were killed

from tools.fault_cases import Case, case_of
from tools.fault_hooks import BREAKAGES
from tools.fault_runs import Reference, write_data
from tools.fault_trials import Result, can_mount, run_case

NUM_CASES = 132
_PRELOADED = ["matris.run", "matris.cli.train", "matplotlib.pyplot", "tools.fault_trials"]


def run_cases(cases: Mapping[int, Case], base: Path, *, jobs: int = 1) -> Iterator[Result]:
    """Runs cases, each in a process that ranks can be forked from, and yields the results as they come.

    Args:
        cases: by seed.
        base: empty folder; references and what is left of failed cases.

    Raises:
        RuntimeError: an undisturbed run is not as it should be.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    write_data(base)
    layouts = {name for case in cases.values() for name in (case.layout, case.last_layout)}
    if any("foreign" in str(act) for case in cases.values() for act in case.acts):
        layouts |= {"one", "moe"}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        # One after the other: the first prepares the data.
        for name in sorted(layouts):
            if problems := pool.submit(Reference(base, name).run).result():
                raise RuntimeError(f"the undisturbed run {name}: {'; '.join(problems)}")
        futures = [pool.submit(run_case, seed, case, base, base / "cases" / str(seed)) for seed, case in cases.items()]
        for future in as_completed(futures):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=NUM_CASES, help=f"how many, by default {NUM_CASES}")
    parser.add_argument("--seed", type=int, nargs="+", help="these alone")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--breakage", choices=tuple(BREAKAGES), default="", help="break the product; cases must fail")
    options = parser.parse_args()
    seeds = options.seed or range(options.cases)
    begin = time.monotonic()
    print(f"full disk: {'a small tmpfs' if can_mount() else 'a limit on the size of files'}; ", end="")
    means = "bind mounts" if can_mount() else "permission bits" if os.geteuid() else "injected errors"
    print(f"read-only: {means}", flush=True)
    with _folder() as base:
        results = []
        cases = {seed: replace(case_of(seed), breakage=options.breakage) for seed in seeds}
        for result in run_cases(cases, base, jobs=options.jobs):
            results.append(result)
            _show(result, base)
        print(_summary(results))
    failed = sorted(result.seed for result in results if result.problems)
    print(f"{len(results)} cases, {len(failed)} failed, {(time.monotonic() - begin) / 60.0:.1f} min", flush=True)
    if failed:
        print(f"again: python -m tools.faults --seed {' '.join(map(str, failed))}")
    return 1 if failed else 0


@contextmanager
def _folder() -> Iterator[Path]:
    """Kept where something is left of a failed case."""
    base = Path(tempfile.mkdtemp(prefix="janus_faults_"))
    try:
        yield base
    finally:
        if any((base / "cases").glob("*")):
            print(f"kept: {base / 'cases'}")
        else:
            shutil.rmtree(base)


def _show(result: Result, base: Path) -> None:
    case = result.case
    layout = case.layout if case.layout == case.last_layout else f"{case.layout} -> {case.last_layout}"
    state = "FAILED" if result.problems else "ok"
    print(
        f"{result.seed:4d}  {case.family:<18}  {layout:<18}  {'; '.join(result.told)}  {state} {result.seconds:.0f} s"
    )
    for problem in result.problems:
        print(f"      {problem}")
    if result.problems:
        print(f"      {base / 'cases' / str(result.seed)}")
    sys.stdout.flush()


def _summary(results: Iterable[Result]) -> str:
    rows: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        rows[result.case.family].append(result)
    lines = ["", f"{'fault':<20}{'cases':>6}{'failed':>8}{'seconds':>9}"]
    for family, group in sorted(rows.items()):
        failed, seconds = sum(bool(result.problems) for result in group), sum(result.seconds for result in group)
        lines.append(f"{family:<20}{len(group):>6}{failed:>8}{seconds:>9.0f}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
