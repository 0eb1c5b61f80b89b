"""The innermost functions of a step, value and derivatives, under choices of `training.kernels`: time and bytes.

    python -m tools.bench.kernels --kernels torch compiled native --output kernels.json

Times are medians of calls in turn (A B C, A B C, ...) in one process, beside a copy of one tensor as the control. The
bytes are what a kernel cannot avoid, each input read and each result written once (docs/decisions/derivatives.md);
over the time they give a bandwidth, to compare with the control's. `torch` is the plain form that the others stand for,
which tests compare with autograd's; where there is no kernel of a kind, it runs in its place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

from janus.ops import attention, expansion, gated_norm, segment, silu  # noqa: E402
from janus.ops.fused import Kernels, using_kernels  # noqa: E402
from janus.ops.rowwise import map_rows  # noqa: E402
from janus.training.memory import keep_freed_memory  # noqa: E402
from tools.bench.report import BenchHelp, add_output, at_least, run, write_report  # noqa: E402

LAYER, RMS = ({"eps": 1e-5, "center": center} for center in (True, False))
Call = Callable[[], Any]
_FREQUENCIES = 7


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=BenchHelp)
    parser.add_argument("--rows", type=at_least(1), default=19584, help="edges or angles")
    parser.add_argument("--nodes", type=at_least(1), default=1024, help="of which rows are gathered")
    parser.add_argument("--width", type=at_least(1), default=128, help="channels")
    kernels = ("torch", "compiled", "native", "triton")
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=["torch"], help="to compare")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where they run")
    parser.add_argument("--calls", type=at_least(1), default=20, help="timed calls of each")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    add_output(parser)
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    for kernels in options.kernels:
        try:
            with using_kernels(kernels, torch.device(options.device)):
                pass  # refused here, before any work
        except ValueError as error:
            parser.error(f"--kernels {kernels}: {error}")
    report = measure(options)
    print(_table(report))
    write_report(options.output, report)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of all functions with all kernels."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results, copies = {}, []
    control = torch.randn(options.rows, options.width, device=device)
    for name, (call, tensors) in _functions(options, device).items():
        times: dict[str, list[float]] = {kernels: [] for kernels in options.kernels}
        for turn in range(options.calls + 2):
            copies.append(_time(control.clone, device))
            for kernels in options.kernels:
                with using_kernels(kernels, device):
                    second = _time(call, device)
                if turn > 1:  # the first calls compile and compare
                    times[kernels].append(second)
        moved = tensors * control.nbytes
        results[name] = {
            "bytes": moved,
            "median_s": {kernels: statistics.median(seconds) for kernels, seconds in times.items()},
            "spread_s": {kernels: max(seconds) - min(seconds) for kernels, seconds in times.items()},
        }
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{name: getattr(options, name) for name in ("threads", "rows", "nodes", "width", "kernels")},
        "copy_bytes_per_s": 2 * control.nbytes / statistics.median(copies),
        "functions": results,
    }


def _time(call: Call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _functions(options: argparse.Namespace, device: torch.device) -> dict[str, tuple[Call, float]]:
    """Calls, with the (rows, width) tensors that each reads and writes."""
    rows, nodes, width = options.rows, options.nodes, options.width

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def by_rows(function: Callable, tensors: list[Tensor], num_summed: int = 0, **settings: Any) -> Call:
        return lambda: map_rows(lambda *parts: function(*parts, **settings), tuple(tensors), num_summed)

    def normed(function: Callable, others: int, num_summed: int, norm: dict[str, Any] = LAYER, **settings: Any) -> Call:
        affine = rand(2, width), rand(2, width) if norm is LAYER else None

        def call(core: Tensor, gate: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            return function(core, gate, *affine, *parts, **norm, **settings)

        halves = rand(rows, 2 * width).split(width, dim=1)
        return by_rows(call, [*halves, *(rand(rows, width) for _ in range(others))], num_summed)

    index = [torch.randint(nodes, (rows,), device=device).sort()[0], torch.randint(nodes, (rows,), device=device)]
    gathered = [rand(rows, width), rand(nodes, width), rand(nodes, width), None, *index]
    halves = [rand(rows, 2 * width), rand(rows, width), rand(rows, width), rand(rows, 2 * width)]

    def sums(function: Callable, order: int, cap: float | None) -> Call:
        u, v_u = (None, None) if cap is None else (rand(rows, 1).abs(), rand(rows, 1))
        tensors = [rand(rows, 2 * width), rand(rows, width), u]
        tensors += [rand(rows, 2 * width), rand(rows, width), v_u] if order == 2 else []
        of_nodes = [rand(nodes, width) for _ in range(4)] if order else [nodes, nodes]
        return lambda: function(*tensors, *index, *of_nodes, cap=cap)

    # Lengths of edges, cosines of angles, with so many frequencies as models have.
    waves, positive = rand(_FREQUENCIES), rand(rows).abs() + 0.5
    radial = {"cutoff": 6.0, "exponent": 8}
    cosines, series = rand(rows).tanh(), 2 * _FREQUENCIES + 1
    of_wave, of_series, along = rand(rows, _FREQUENCIES), rand(rows, series), rand(rows)
    fixed = {"of_frequencies": False}

    return {
        "gated layer norm, value": (normed(gated_norm._value, 0, 0), 3),
        "gated layer norm, first derivative": (normed(gated_norm._first_derivative, 1, 0, affine=False), 5),
        "gated layer norm, second derivative": (normed(gated_norm._second_derivative, 3, 2), 8),
        "gated RMS norm, value": (normed(gated_norm._value, 0, 0, RMS), 3),
        "gated RMS norm, first derivative": (normed(gated_norm._first_derivative, 1, 0, RMS, affine=False), 5),
        "gated RMS norm, second derivative": (normed(gated_norm._second_derivative, 3, 2, RMS), 8),
        "attention sums, value": (sums(attention._sums, 0, 10.0), 3),
        "attention sums, first derivative": (sums(attention._sums_first_derivative, 1, 10.0), 6),
        "attention sums, second derivative": (sums(attention._sums_second_derivative, 2, 10.0), 9),
        "attention sums without cap and envelope, value": (sums(attention._sums, 0, None), 3),
        "attention sums without cap and envelope, first": (sums(attention._sums_first_derivative, 1, None), 6),
        "attention sums without cap and envelope, second": (sums(attention._sums_second_derivative, 2, None), 9),
        "SiLU of halves, value": (lambda: silu._value(halves[0], parts=2), 4),
        "SiLU of halves, first derivative": (lambda: silu._first_derivative(*halves[:3]), 6),
        "SiLU of halves, second derivative": (by_rows(silu._second_derivative, halves), 10),
        "gathered sum of own rows and two kinds of nodes": (lambda: segment._gathered_sum(*gathered), 2),
        "segment sum": (lambda: segment._sum_rows(gathered[0], index[1], nodes), 1),
        "Bessel expansion, value": (
            lambda: expansion._bessel_value(positive, waves, **radial),
            (1 + _FREQUENCIES) / width,
        ),
        "Bessel expansion, first derivative": (
            lambda: expansion._bessel_first_derivative(positive, waves, of_wave, **radial, **fixed),
            (2 + _FREQUENCIES) / width,
        ),
        "Bessel expansion, second derivative": (
            lambda: expansion._bessel_second_derivative(positive, waves, of_wave, along, **radial, **fixed),
            (3 + 2 * _FREQUENCIES) / width,
        ),
        "Fourier series, value": (lambda: expansion._fourier_value(cosines, waves), (1 + series) / width),
        "Fourier series, first derivative": (
            lambda: expansion._fourier_first_derivative(cosines, waves, of_series, **fixed),
            (2 + series) / width,
        ),
        "Fourier series, second derivative": (
            lambda: expansion._fourier_second_derivative(cosines, waves, of_series, along, **fixed),
            (3 + 2 * series) / width,
        ),
    }


def _table(report: dict[str, Any]) -> str:
    kernels: list[Kernels] = report["kernels"]
    lines = [
        f"{report['rows']} rows of {report['width']}, fp32, {report['device']}, {report['threads']} threads; a copy "
        f"moves {report['copy_bytes_per_s'] / 1e9:.0f} GB/s",
        f"| function | MB | {' | '.join(f'{name}, ms' for name in kernels)} | {kernels[0]} / {kernels[-1]} | GB/s |",
        "|---" * (len(kernels) + 4) + "|",
    ]
    for name, facts in report["functions"].items():
        seconds = facts["median_s"]
        shown = " | ".join(f"{1e3 * seconds[kind]:.2f}" for kind in kernels)
        ratio = seconds[kernels[0]] / seconds[kernels[-1]]
        bandwidth = facts["bytes"] / seconds[kernels[-1]] / 1e9
        lines.append(f"| {name} | {facts['bytes'] / 1e6:.3g} | {shown} | {ratio:.1f} x | {bandwidth:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
