"""Sharded weights against one process, with a toy energy model: gradients of each term, updates, memory and traffic."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from janus.checkpoint import CheckpointStore
from janus.comm.adjoint import copy
from janus.comm.collectives import gather_objects, on_main_rank
from janus.mesh import Mesh
from janus.optim import AdamWConfig, Schedule
from janus.sharding import Weights, weight_memory
from janus.sharding.memory import COPIES
from janus.sharding.passes import Passes
from janus.training.learner import Learner
from janus.training.step import StepReport, accumulate_gradients, train_step
from janus.training.task import MicroLoss
from matris.blocks.module import FeedForward, MatRISConfig
from tests.parallel.logical import logical_state
from tests.parallel.ranks import run_ranks

STEPS, RECORDS, WIDTH, BLOCKS = 3, 8, 6, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What must not change the result: policy and pieces; and what defines it: frozen, checkpointing, clipping."""

    policy: str = "regather"
    pieces: int = 1
    frozen: bool = False
    checkpointing: bool = False
    clip: float = 0.3


class Block(nn.Module):
    def __init__(self, config: MatRISConfig) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.inner = FeedForward(config, WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(copy(torch.tanh(x) * self.norm, self.inner.config.mesh.tensor))


class ToyEnergy(nn.Module):
    """Energy of each record of points; one trainable parameter lies outside of all units, one is never used."""

    def __init__(self, mesh: Mesh, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MatRISConfig(mesh=mesh, params_dtype=torch.float64, use_cpu_initialization=True)
        config.tensor_model_parallel_size = mesh.tensor.size
        self.embedding = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block(config) for _ in range(BLOCKS))
        self.readout = nn.Sequential(nn.Linear(WIDTH, 5), nn.SiLU(), nn.Linear(5, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.readout.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
        self.register_buffer("shift", torch.tensor(0.1))
        self.double()
        self.checkpointing = case.checkpointing
        if case.frozen:
            self.blocks[1].requires_grad_(False)
            self.readout[0].weight.requires_grad_(False)

    @property
    def units(self) -> tuple[nn.Module, ...]:
        return (self.embedding, *self.blocks, self.readout)

    def forward(self, positions: Tensor) -> Tensor:
        x = self.embedding(positions)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.scale * self.readout(x).sum(dim=(1, 2)) + self.shift


@dataclass(frozen=True, kw_only=True)
class Step:
    step: int
    indices: np.ndarray
    micro_batches: list[Tensor]


class Task:
    num_sums = 1
    columns = ("loss",)

    def __init__(self, model: ToyEnergy, energy: float, forces: float, look: Callable[[str], None]) -> None:
        self.model, self.energy, self.forces, self.look = model, energy, forces, look

    def loss(self, micro_batch: Tensor, totals: float, *, training: bool) -> MicroLoss:
        positions = micro_batch.clone().requires_grad_()
        energy = self.model(positions)
        self.look("forward")
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=training)
        self.look("forces")
        errors = self.energy * (energy - 1.0).square().sum() + self.forces * (gradient - micro_batch).square().sum()
        total = errors / totals
        return MicroLoss(total=total, sums=total.detach()[None], num_edges=0)

    def identifiers(self, micro_batch: Tensor) -> Sequence[str]:
        return ["record"] * len(micro_batch)


def step_of(number: int, mesh: Mesh, pieces: int) -> Step:
    generator = torch.Generator().manual_seed(number)
    records = torch.randn(RECORDS, 4, 3, generator=generator, dtype=torch.float64)
    own = records[mesh.batch.rank :: mesh.batch.size]
    # Graph ranks would share records; none here, so the axes data and shard have them all.
    return Step(step=number, indices=np.arange(RECORDS), micro_batches=list(own.chunk(pieces)))


def learner_of(model: ToyEnergy, mesh: Mesh, case: Case) -> Learner:
    return Learner(
        model,
        AdamWConfig(weight_decay=0.1),
        Schedule(lr=1e-2, num_steps=STEPS),
        ema_decay=0.9,
        clip_grad=case.clip,
        mesh=mesh,
        units=model.units,
        policy=case.policy,  # type: ignore[arg-type]
    )


def measured(mesh: Mesh, case: Case) -> dict[str, Any]:
    """All that must not depend on the layout, then what the last step did with memory and traffic."""
    model = ToyEnergy(mesh, case)
    learner = learner_of(model, mesh, case)
    passes = learner.weights.passes
    live: dict[str, list[int]] = {"forward": [], "forces": []}
    peaks: dict[str, int] = {}

    def look(when: str) -> None:
        if passes is not None:
            settle(passes)
            live[when].append(passes.live_bytes)
            peaks[when], passes.peak_bytes = passes.peak_bytes, 0

    if passes is not None:
        with pytest.raises(RuntimeError, match="weights are sharded"):
            model.sharded_state_dict()
        start = passes._start

        def start_settled(index: int) -> Any:
            if not case.checkpointing:  # which holds what it has computed again
                settle(passes)
            return start(index)

        passes._start = start_settled  # type: ignore[method-assign]
    result: dict[str, Any] = {"parameters": learner.weights.num_parameters}
    for name, energy_weight, forces_weight in (("energy", 1.0, 0.0), ("forces", 0.0, 1.0)):
        learner.zero_gradients()
        alone: Any = Task(model, energy_weight, forces_weight, look)
        accumulate_gradients(alone, step_of(0, mesh, case.pieces).micro_batches, 8.0, learner)
        learner.sum_gradients()
        result[f"{name} gradients"] = {key: value.clone() for key, value in learner.gather_gradients().items()}
    task: Any = Task(model, 0.3, 1.0, look)
    early: list[int] = []  # reduce-scatters started before each early update
    update_early = learner.update_early

    def noted(group: Mapping[str, nn.Parameter]) -> None:
        early.append(mesh.ledger.calls["shard/reduce_scatter"])
        update_early(group)

    learner.update_early = noted  # type: ignore[method-assign]
    reports: list[StepReport] = []
    for number in range(STEPS):
        mesh.ledger.clear()
        early.clear()
        for seen in live.values():
            seen.clear()
        if passes is not None:
            passes.peak_bytes = 0
        reports.append(train_step(task, step_of(number, mesh, case.pieces), 8.0, learner=learner, mesh=mesh))
    result["norms"] = {"norm": torch.tensor([report.grad_norm for report in reports])}
    result["sums"] = {"sums": torch.tensor(np.array([report.sums for report in reports]))}
    result["ledger"] = {key: (mesh.ledger.calls[key], mesh.ledger.bytes[key]) for key in mesh.ledger.calls}
    result["live"] = live
    result["early"] = early
    held = [*learner.weights.leaves, *(leaf.grad for leaf in learner.weights.leaves), *learner.ema.average.values()]
    held += [moment for state in learner._optimizer_state().values() for moment in state.values() if moment.ndim]
    result["held"] = sum(value.nbytes for value in held if value is not None)
    whole = ToyEnergy(Mesh(), case)
    result["counted"] = weight_memory(whole, whole.units, shards=mesh.shard.size, tensor=mesh.tensor.size)
    if passes is not None:
        settle(passes)
        result["left"] = passes.live_bytes
    peaks["backward"] = 0 if passes is None else passes.peak_bytes
    result["peaks"] = peaks
    result["units"] = [] if passes is None else [unit.axis.size * unit.shard.nbytes for unit in passes.units]
    result["state"] = logical_state(learner)
    # A checkpoint is restored.
    with tempfile.TemporaryDirectory() if mesh.is_main else nullcontext() as folder:
        store = CheckpointStore(Path(on_main_rank(lambda: str(folder), mesh)), mesh)
        store.save(STEPS, learner.shards(), {"step": STEPS}, best_step=None)
        store.wait()
        other = learner_of(ToyEnergy(mesh, case), mesh, case)
        other.restore(store.open(store.path(STEPS)))
        gather_objects(None, mesh)  # all have read it
    again = logical_state(other)
    assert again.keys() == result["state"].keys()
    assert all(torch.equal(value, again[key]) for key, value in result["state"].items())
    with other.averaged(), other.weights.run(training=False):
        batch = step_of(9, Mesh(), 1).micro_batches[0].requires_grad_()
        energy = model_energy(other, batch)
        (forces,) = torch.autograd.grad(energy.sum(), batch)
    result["evaluation"] = {"energy": energy.detach(), "forces": forces}
    if other.weights.passes is not None:
        settle(other.weights.passes)
        result["live evaluation"] = other.weights.passes.live_bytes
    result["average"] = {key: value.clone() for key, value in other.gather_average().items()}
    return result


def settle(passes: Passes) -> None:
    """Waits for the threads of gloo, which hold a finished collective's tensors a moment longer than we do, and for
    cycles of Python objects."""
    held = len(passes._resident) + len(passes._coming)
    end = time.monotonic() + 5.0
    while passes.live_bytes and len(passes._storages) > held and time.monotonic() < end:
        time.sleep(0.001)
        gc.collect()


def model_energy(learner: Learner, batch: Tensor) -> Tensor:
    model = learner.model
    assert isinstance(model, ToyEnergy)
    return model(batch)


SAME = ("energy gradients", "forces gradients", "norms", "sums", "state", "average", "evaluation")


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    assert found["parameters"] == expected["parameters"]
    for part in SAME:
        assert found[part].keys() == expected[part].keys(), (what, part)
        largest = max(float(value.abs().max()) for value in expected[part].values())
        for name, value in expected[part].items():
            difference = float((found[part][name] - value).abs().max())
            allowed = 1e-11 * max(float(value.abs().max()), 1e-3 * largest)
            assert difference <= allowed, (what, part, name, difference, allowed)


CASES = (
    Case(),
    Case(policy="keep"),
    Case(pieces=2),
    Case(policy="keep", pieces=2),
    Case(frozen=True),
    Case(policy="keep", frozen=True),
    Case(checkpointing=True),
    Case(checkpointing=True, policy="keep", pieces=2),
    Case(clip=0.0, pieces=2),
    Case(clip=0.0, policy="keep", frozen=True),
    Case(clip=0.0, checkpointing=True),
)


def all_measured(mesh: Mesh) -> list[dict[str, Any]]:
    return [measured(mesh, case) for case in CASES]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return [measured(Mesh(), replace(case, pieces=1, checkpointing=False)) for case in CASES]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"shard": 2}),
        (4, {"shard": 4}),
        (4, {"shard": 2}),
        (4, {"shard": 2, "tensor": 2}),
        (2, {"tensor": 2}),
    ],
    ids=["shard 2", "shard 4", "shard 2 x data 2", "shard 2 x tensor 2", "tensor 2"],
)
def test_sharded_training_is_that_of_one_process(
    alone: list[dict[str, Any]], world_size: int, layout: dict[str, int]
) -> None:
    for results in run_ranks(world_size, all_measured, layout=layout):
        for case, found, expected in zip(CASES, results, alone, strict=True):
            assert_same(found, expected, str(case))
            if layout.get("shard", 1) > 1:
                check_memory_and_traffic(found, case, layout["shard"])
                check_held(found, case, layout["shard"])
                has_replicas = world_size > layout["shard"] * layout.get("tensor", 1)
                check_early_updates(found, case, has_replicas)


def check_memory_and_traffic(found: Mapping[str, Any], case: Case, shards: int) -> None:
    sizes, calls = found["units"], found["ledger"]
    whole = sum(sizes)
    trainable = len(sizes) - int(case.frozen)  # one block is frozen as a whole
    assert calls["shard/reduce_scatter"][0] == trainable * case.pieces
    if case.policy == "keep":
        assert calls["shard/all_gather"] == (len(sizes), whole // shards)
        assert found["peaks"] == {"forward": whole, "forces": 0, "backward": 0} or case.pieces > 1
    elif not case.checkpointing:
        assert calls["shard/all_gather"] == (3 * len(sizes) * case.pieces, 3 * case.pieces * whole // shards)
        assert calls["shard/reduce_scatter"][1] == case.pieces * (whole - (sizes[2] if case.frozen else 0))
        assert found["live"] == {"forward": [0] * case.pieces, "forces": [0] * case.pieces}
        pairs = max(first + second for first, second in pairwise(sizes))
        # With several micro-batches the forward pass of one follows the backward pass of another.
        assert found["peaks"] == {"forward": pairs if case.pieces == 1 else whole, "forces": pairs, "backward": whole}
    if case.policy == "regather":
        assert found["left"] == 0
        assert found["live evaluation"] == 0


def check_held(found: Mapping[str, Any], case: Case, shards: int) -> None:
    """What a rank holds is what was counted from the shapes, up to the padding of the shards."""
    if case.frozen:
        return
    assert abs(found["counted"].held - found["held"]) < COPIES * 8 * shards * len(found["units"])
    gathered = sum(found["units"]) * 2 + max(found["units"])
    assert abs(found["counted"].gathered - gathered) < 2 * 8 * shards * len(found["units"])


def check_early_updates(found: Mapping[str, Any], case: Case, has_replicas: bool) -> None:
    """Each unit is updated while the gradient of the next one is on its way, so one later; the last at the end."""
    started = found["ledger"]["shard/reduce_scatter"][0]
    trainable = started // case.pieces
    if case.clip or has_replicas:
        assert found["early"] == []
    elif case.checkpointing:  # gathers blocks anew, so that their gradients may not be complete
        assert len(found["early"]) == trainable - BLOCKS
    else:
        assert found["early"] == [*range(started - trainable + 2, started + 1), started]


def third_derivative(mesh: Mesh, inside: bool) -> dict[str, Tensor]:
    """Derivative of the squared gradient of the force term: three derivatives, the gathers and their adjoints in each.

    The used-apart scalar of each rank is its part of a sum, like a loss.
    """
    case = Case()
    model = ToyEnergy(mesh, case)
    weights = learner_of(model, mesh, case).weights
    task = Task(model, 0.1, 1.0, lambda when: None)
    leaves = weights.leaves if mesh.shard.size == 1 else [leaf for leaf in weights.leaves if leaf is not model.scale]
    names = [name for name in weights.pieces if name != "scale"]
    if mesh.shard.size == 1:
        leaves = [weights.pieces[name] for name in names]
    with weights.run(training=False) if inside else nullcontext():
        total = task.loss(step_of(0, mesh, 1).micro_batches[0], 8.0, training=True).total
        first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            torch.stack([g.square().sum() for g in first]).sum(), leaves, materialize_grads=True
        )
    if mesh.shard.size == 1:
        return dict(zip(names, second, strict=True))
    assert weights.passes is not None
    found = {"scale": torch.zeros_like(model.scale)}
    for unit, gradient in zip(weights.passes.units, second, strict=True):
        found |= {slot.name: unit.slice(slot, gradient) for slot in unit.slots}
    return {name: value for name, value in weights.gather(found).items() if name != "scale"}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_any_order_of_derivative(inside: bool) -> None:
    """Inside of a run saved weights are gathered again, outside they are kept; both are exact."""
    expected = third_derivative(Mesh(), inside)
    for found in run_ranks(2, third_derivative, inside, layout={"shard": 2}):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def twice(mesh: Mesh) -> str:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Linear(2, 2))
    model[1].weight = layer.weight
    with pytest.raises(ValueError, match="another name as well") as caught:
        Weights(model, mesh)
    return str(caught.value)


def test_shared_parameters_are_refused() -> None:
    assert all("1.weight" in message for message in run_ranks(2, twice, layout={"shard": 2}))
