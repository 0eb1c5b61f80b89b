"""Plans for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from janus.machine import Band
from matris.plan_job import NOT_MODELLED, Job, Prediction, StepTime


def job_lines(job: Job) -> list[str]:
    """What is planned, and on what."""
    size, machine = job.workload, job.machine
    return [
        f"machine            {machine.name}",
        *(f"                   {source}" for source in machine.sources),
        f"ranks              {job.ranks}, {job.devices_per_node} to a node",
        f"structures         {size.atoms:,.0f} atoms, {size.edges:,.0f} directed edges, {size.angles:,.0f} angles each",
        f"update             {job.global_batch:,} structures, {job.precision.value}",
    ]


def prediction_lines(prediction: Prediction) -> list[str]:
    """All of one layout."""
    memory, low, high = prediction.memory, prediction.pessimistic, prediction.optimistic
    together = prediction.layout.graph * prediction.layout.tensor
    lines = [
        f"layout             {prediction.layout.name}",
        f"micro-batches      {prediction.micro_batches} of {prediction.micro_batch} structures for "
        f"{f'each {together} ranks together' if together > 1 else 'each rank'}, recompute {prediction.recompute}",
        f"memory per rank    {_GB(memory.total)} of {_GB(memory.available)} GB that may be used: "
        f"{_GB(memory.weights)} weights, gradients and optimizer, "
        f"{_GB(memory.gathered + memory.experts)} gathered or waiting, "
        f"{_GB(memory.activations)} activations",
        f"FLOPs per rank     {prediction.flops / 1e12:.4g} TFLOP of matrix products in a step",
        "sent per rank      GB in a step, at least:",
        *(
            f"  {key:<30} {_GB(value):>9}   in {prediction.traffic.calls[key]:,} calls"
            for key, value in sorted(prediction.traffic.wire_bytes.items())
        ),
        "time of a step     s, pessimistic .. optimistic:",
    ]
    for name, meaning in (
        ("computation", "computation"),
        ("update", "update"),
        ("communication", "communication, not hidden"),
        ("hidden", "communication behind it"),
        ("step", "step"),
    ):
        lines.append(f"  {meaning:<30} {getattr(low, name):>9.4g} .. {getattr(high, name):.4g}")
    return [
        *lines,
        f"efficiency         {_percent(prediction.efficiency)} of a replica that need not communicate",
        f"throughput         {_span(prediction.structures_per_s)} structures/s",
        f"MFU                {_percent(prediction.mfu)}",
    ]


def search_lines(best: Sequence[Prediction], possible: int, dropped: Mapping[str, int]) -> list[str]:
    """The best layouts, how many were predicted, and why others were not."""
    rows = [
        (
            str(place),
            prediction.layout.name,
            f"{prediction.micro_batches} x {prediction.micro_batch}",
            prediction.recompute,
            _GB(prediction.memory.total),
            _GB(sum(prediction.traffic.wire_bytes.values())),
            f"{prediction.pessimistic.step:.4g} .. {prediction.optimistic.step:.4g}",
            _percent(prediction.efficiency),
            _percent(prediction.mfu),
        )
        for place, prediction in enumerate(best, start=1)
    ]
    head = ("", "layout", "micro-batches", "recompute", "GB", "GB sent", "s per step", "efficiency", "MFU")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    reasons = [f"  {reason:<55} {count:>8,}" for reason, count in dropped.items()]
    others = "not:" if reasons else "there are no others"
    return [*(line.rstrip() for line in table), "", f"predicted {possible:,} layouts; {others}", *reasons]


def missing_lines() -> list[str]:
    """What predictions leave out."""
    return ["not modelled:", *(f"  {entry}" for entry in NOT_MODELLED)]


def to_json(job: Job, predictions: Sequence[Prediction], dropped: Mapping[str, int]) -> dict[str, Any]:
    """JSON-ready; bytes, seconds and FLOPs.

    Args:
        dropped: layouts that a search did not predict, by reason.
    """
    machine = job.machine
    return {
        "job": {
            "model": job.hyper.to_dict(),
            "machine": {"name": machine.name, "sources": list(machine.sources)},
            "ranks": job.ranks,
            "devices_per_node": job.devices_per_node,
            "structure": asdict(job.workload),
            "global_batch_size": job.global_batch,
            "precision": job.precision.value,
            "imbalance": job.imbalance,
        },
        "predictions": [prediction_json(prediction) for prediction in predictions],
        "dropped": dict(dropped),
        "not_modelled": list(NOT_MODELLED),
    }


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """JSON-ready."""

    def of_time(time: StepTime) -> dict[str, float]:
        return {f"{name}_s": value for name, value in asdict(time).items()}

    return {
        "layout": prediction.layout.name,
        "axes": {name: getattr(prediction.layout, name) for name in ("data", "shard", "graph", "tensor", "expert")},
        "micro_batch": prediction.micro_batch,
        "micro_batches": prediction.micro_batches,
        "recompute": prediction.recompute,
        "memory_bytes": asdict(prediction.memory) | {"total": prediction.memory.total},
        "flops": prediction.flops,
        "calls": dict(prediction.traffic.calls),
        "wire_bytes": dict(prediction.traffic.wire_bytes),
        "pessimistic": of_time(prediction.pessimistic),
        "optimistic": of_time(prediction.optimistic),
        "efficiency": asdict(prediction.efficiency),
        "structures_per_s": asdict(prediction.structures_per_s),
        "mfu": asdict(prediction.mfu),
    }


def _GB(num_bytes: float) -> str:  # noqa: N802  # the unit
    return f"{num_bytes / 1e9:.4g}"


def _span(band: Band) -> str:
    return f"{band.low:.4g} .. {band.high:.4g}"


def _percent(band: Band) -> str:
    return f"{100 * band.low:.1f} .. {100 * band.high:.1f} %"
