"""The gate must see a collective that is wrong: each of these mistakes is made on purpose, and must be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from janus.comm import adjoint, collectives
from janus.mesh import Axis, Launch
from janus.sharding import experts, unit
from matris.verify import Row
from tests.parallel.gate import run_gate, write_gate_files
from tests.parallel.ranks import run_ranks

Patch = Callable[[pytest.MonkeyPatch], None]


def reduce_is_its_own_adjoint(patch: pytest.MonkeyPatch) -> None:
    """As in megatron-core's mappings and the first all-reduce that everybody writes."""
    patch.setattr(adjoint._Reduce, "backward", lambda ctx, grad: (adjoint._Reduce.apply(grad, ctx.axis), None))


def copy_forgets_to_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adjoint._Copy, "backward", lambda ctx, grad: (grad, None))


def unrecorded(function: type[torch.autograd.Function]) -> Patch:
    """The adjoint is right, but not recorded: first derivatives are right, second ones miss a part."""
    original = function.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            return original(ctx, *grads)

    return lambda patch: patch.setattr(function, "backward", staticmethod(backward))


def averages(patch: pytest.MonkeyPatch) -> None:
    original = adjoint.all_reduced

    def averaged(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return original(x, axis) / axis.size

    patch.setattr(collectives, "all_reduced", averaged)


def shard_gradients_are_averaged(patch: pytest.MonkeyPatch) -> None:
    original = collectives.start_reduce_scatter
    patch.setattr(unit, "start_reduce_scatter", lambda whole, axis: original(whole / axis.size, axis))


def experts_forget_other_ranks(patch: pytest.MonkeyPatch) -> None:
    """A gathered expert's gradient stays with the rank that has gathered it, which keeps its piece of it."""
    original = experts.start_all_to_all

    def forgetful(rows: torch.Tensor, axis: Axis, **splits: Any) -> Any:
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled() and len(set(splits["send"])) == 1:
            rows = rows * (torch.arange(len(rows)) * axis.size // len(rows) == axis.rank)[:, None]
        return original(rows, axis, **splits)

    patch.setattr(experts, "start_all_to_all", forgetful)


MISTAKES: tuple[tuple[str, Patch, bool], ...] = (
    ("dp2", averages, True),
    ("fsdp2", shard_gradients_are_averaged, True),
    ("tp2", reduce_is_its_own_adjoint, False),
    ("tp2", unrecorded(adjoint._AllGather), True),
    ("tp2", unrecorded(adjoint._ReduceScatter), True),
    ("ep2", unrecorded(adjoint._Wait), True),
    ("ep2", experts_forget_other_ranks, True),
    ("gp2", copy_forgets_to_sum, False),
    ("gp2", unrecorded(adjoint._Wait), True),
)
"""Layout, mistake, and whether energies, forces and stress stay right, so that gradients alone show it."""


def make_mistakes(launch: Launch, folder: Path) -> list[Row]:
    rows = []
    for layout, mistake, _ in MISTAKES:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            kind = "experts" if "ep" in layout else "dense"
            rows += run_gate(launch, folder, [layout], [("small", "fp64", kind)])
    return rows


@pytest.mark.slow
def test_the_gate_sees_every_mistake(tmp_path: Path) -> None:
    write_gate_files(tmp_path)
    for rows in run_ranks(2, make_mistakes, tmp_path, with_mesh=False, timeout=300.0):
        for row, (layout, mistake, hidden) in zip(rows, MISTAKES, strict=True):
            assert not row.passed, (layout, mistake)
            right = {name: error <= row.tolerance for name, error in row.errors.items()}
            assert all(right[name] for name in ("energy", "forces", "stress")) == hidden, (layout, mistake, row.errors)
            gradients = [right[f"{term}_gradient"] for term in ("energy", "forces", "stress", "magmoms")]
            assert not (hidden and all(gradients)), (layout, mistake, row.errors)
