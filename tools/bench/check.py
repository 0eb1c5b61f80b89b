"""Whether a training step costs more than it did: counts exactly, times as ratios with a margin.

    python -m tools.bench.check                 # make bench-check: compares with tools/bench/baseline.json
    python -m tools.bench.check --update        # makes this machine's numbers the baseline

Small models, dense and with experts, some with native kernels or full recomputation, take steps of energies, forces,
stress and the second backward pass, fp32, on one CPU thread. Counted are FLOPs of matrix products, operations of torch,
and bytes: taken from the allocator in all, at most at once, and after the force pass. A time is the least of some steps
over the least of a control, a matrix product of fixed size and a copy, which run before and after each. Counts depend
on torch's version, times on the processor and on what else runs: what cannot be compared with the baseline, for another
version or processor or because the control is as slow or as uneven as where others run, is said and not compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk
from torch.profiler import ProfilerActivity, profile

from janus.ops.fused import Kernels, using_kernels
from matris.config import ModelConfig
from matris.graph.batch import GraphBatch, collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS, Prediction
from matris.writable import writable_file
from tools.bench.products import count_flops
from tools.bench.report import BenchHelp, at_least, machine, run, versions, write_report

BASELINE = Path(__file__).resolve().parent / "baseline.json"
_DENSE = ModelConfig(
    num_layers=3, hidden_size=64, readout_hidden_sizes=(64,), pairwise_cutoff=5.0, three_body_cutoff=4.0
)
_EXPERTS = replace(_DENSE, num_elements=118, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=64)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What takes a step.

    Attributes:
        config: of the model.
        cells: of rock salt along each axis, 8 atoms each.
        kernels, recompute: as in `training`.
    """

    config: ModelConfig = _DENSE
    cells: int = 2
    kernels: Kernels = "torch"
    recompute: str = "selective"


CASES = {
    "dense, 8 atoms": Case(cells=1),
    "dense, 64 atoms": Case(),
    "experts, 64 atoms": Case(config=_EXPERTS),
    "dense, 64 atoms, native": Case(kernels="native"),
    "experts, 64 atoms, native": Case(config=_EXPERTS, kernels="native"),
    "dense, 64 atoms, full": Case(recompute="full"),
}
"""By name."""
_PEAK = "bytes_at_most"
_PEAK_MARGIN = 0.01
"""The profiler's clock does not tell the order of all events."""
_CONTROL = 768
"""Rows of the square matrices of the control."""
_COPIED = 4 * 1024**2
"""Numbers that it copies: about as long as the product takes, for steps are bound by both."""
_EVEN, _ALIKE = 1.15, 1.25
"""What the control's median may be over its least time, and its least time over that of the baseline."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="JSON file to compare with")
    parser.add_argument("--update", action="store_true", help="write it anew")
    parser.add_argument(
        "--margin", type=_share, default=0.15, help="by how much a time ratio may grow, as a share of it"
    )
    parser.add_argument("--rounds", type=at_least(0), default=7, help="timed steps of each case; 0 times nothing")
    options = parser.parse_args(words)
    if options.update and not options.rounds:
        parser.error("--rounds 0 with --update would write a baseline without times: leave --rounds out")
    if not options.update:
        baseline = _baseline(options.baseline)
    else:
        try:
            writable_file(str(options.baseline))
        except argparse.ArgumentTypeError as error:
            parser.error(f"--baseline {error}")
    found = measure(options.rounds)
    if options.update:
        write_report(options.baseline, found)
        print(f"written: {options.baseline}")
        return 0
    worse, lines = compare(found, baseline, options.margin)
    print("\n".join(lines))
    return 1 if worse else 0


def measure(rounds: int) -> dict[str, Any]:
    """Counts and time ratios of all cases, with what they depend on."""
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    for name, case in CASES.items():
        step, forces = _step(case)
        with using_kernels(case.kernels, torch.device("cpu")):
            step()  # what is made once
            cases[name] = {"counts": _counts(step, forces)} | (_times(step, rounds) if rounds else {})
    return {"machine": machine(), "versions": versions(), "cases": cases}


def compare(found: dict[str, Any], baseline: dict[str, Any], margin: float) -> tuple[bool, list[str]]:
    """Whether anything is worse or other, and a line about each number."""
    lines, worse = [], False
    # The part after + names the build, with CUDA or without, on which counts of a processor do not depend.
    torch_here, torch_before = (report["versions"]["torch"].partition("+")[0] for report in (found, baseline))
    processor, processor_before = (report["machine"]["processor"] for report in (found, baseline))
    same_torch, same_processor = torch_here == torch_before, processor == processor_before
    if not same_torch:
        lines.append(f"counts are not compared: the baseline is of torch {torch_before}, here is {torch_here}")
    if not same_processor:
        lines.append(f"times are not compared: the baseline is of {processor_before}, here is {processor}")
    for name in baseline["cases"].keys() - found["cases"].keys():
        lines.append(f"{name}: in the baseline, and not measured; write it anew with --update")
        worse = True
    for name, case in found["cases"].items():
        before = baseline["cases"].get(name)
        if before is None:
            lines.append(f"{name}: not in the baseline; write it anew with --update")
            worse = True
            continue
        for key, value in case["counts"].items() if same_torch else ():
            then = before["counts"].get(key, 0)
            is_other = abs(value - then) > (_PEAK_MARGIN * then if key == _PEAK else 0)
            worse |= is_other
            told = f"  WAS {then}: --update if that is meant" if is_other else ""
            lines.append(f"{name}: {key} {value}{told}")
        if same_processor and {"step_over_control"} <= case.keys() & before.keys():
            if unrest := _unrest(case, before):
                lines.append(f"{name}: times are not compared: {unrest}")
                continue
            now, then = case["step_over_control"], before["step_over_control"]
            is_slower = now > then * (1.0 + margin)
            worse |= is_slower
            lines.append(f"{name}: step over control {now:.3g}, was {then:.3g}{'  SLOWER' if is_slower else ''}")
    if worse:
        lines.append("something is worse or other than in the baseline")
    elif not (same_torch or same_processor):
        lines.append("NOTHING WAS COMPARED: write a baseline of this machine with --update, then compare with it")
        worse = True
    else:
        lines.append("nothing is worse")
    return worse, lines


def _step(case: Case) -> tuple[Callable[[], None], Callable[[], Prediction]]:
    """A step without an update, and its part up to the force pass."""
    model, batch = MatRIS(case.config, seed=0), _batch(case.config, case.cells)
    model.set_recompute(case.recompute)

    def forces() -> Prediction:
        return model(batch, create_graph=True)

    def step() -> None:
        prediction = forces()
        assert prediction.forces is not None
        assert prediction.stress is not None
        loss = prediction.energy.sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        model.zero_grad()
        loss.backward()

    return step, forces


def _batch(config: ModelConfig, cells: int) -> GraphBatch:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=0)
    graph = build_graph(
        Structure(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc),
        pairwise_cutoff=config.pairwise_cutoff,
        three_body_cutoff=config.three_body_cutoff,
    )
    return collate_graphs([graph])


def _counts(step: Callable[[], None], forces: Callable[[], Prediction]) -> dict[str, int]:
    flops = count_flops(step)
    gc.collect()
    gc.disable()  # what it frees, and when, is no property of the step
    try:
        changes, operations = _profiled(step)
        kept = sum(_profiled(forces)[0])
    finally:
        gc.enable()
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return {
        "flops": flops,
        "operations": operations,
        "bytes_allocated": sum(change for change in changes if change > 0),
        _PEAK: peak,
        "bytes_after_force_pass": kept,
    }


def _profiled(function: Callable[[], Any]) -> tuple[list[int], int]:
    """Changes of the bytes that are held, in the order in which they happen, and the number of operations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()  # lives on
    events = profiled.profiler.kineto_results.events()
    del result
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda pair: pair[0]
    )
    return [change for _, change in changes], sum(event.name().startswith("aten::") for event in events)


def _times(step: Callable[[], None], rounds: int) -> dict[str, float]:
    left, right = torch.ones(_CONTROL, _CONTROL), torch.ones(_CONTROL, _CONTROL)
    rows = torch.ones(_COPIED)

    def control() -> None:
        _ = left @ right, rows.clone()

    control()
    steps, controls = [], []
    for _ in range(rounds):
        controls.append(_seconds(control))
        steps.append(_seconds(step))
        controls.append(_seconds(control))
    return {
        "step_over_control": min(steps) / min(controls),
        "control_s": min(controls),
        "control_median_over_least": statistics.median(controls) / min(controls),
    }


def _unrest(case: dict[str, Any], before: dict[str, Any]) -> str | None:
    """Why times of the two cannot be compared; None if they can."""
    uneven, other = case["control_median_over_least"], case["control_s"] / before["control_s"]
    if uneven > _EVEN:
        return f"the control took {uneven:.2g} times its least time, so something else runs here"
    if not 1.0 / _ALIKE < other < _ALIKE:
        return f"the control takes {other:.2g} times what it took for the baseline: another processor, or a busy one"
    return None


def _share(word: str) -> float:
    value = float(word)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word}: a share from 0 is needed, as 0.15")
    return value


def _baseline(path: Path) -> dict[str, Any]:
    """Raises ValueError: it is none."""
    if not path.is_file():
        raise ValueError(f"--baseline {path} does not exist: make it with --update")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--baseline {path} is no JSON ({error}): make it with --update") from None
    if not isinstance(found, dict) or not {"machine", "versions", "cases"} <= found.keys():
        raise ValueError(f"--baseline {path} is no report of this program: make it with --update")
    return found


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(run(main))
