"""Experts over ranks: exact under any plan, gathered where they are needed and no longer, with counted traffic."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from janus.checkpoint import read_directory
from janus.comm.collectives import gather_objects
from janus.comm.traffic import PlainAxis, Traffic
from janus.expert_parallel.dispatcher import PlannedTokenDispatcher
from janus.expert_parallel.plan import ExpertPlan, expert_load, fixed_plan, plan_experts
from janus.expert_parallel.traffic import SiteLoad, expert_traffic, token_traffic
from janus.mesh import Launch, Mesh
from janus.sharding import weight_memory
from janus.training.step import train_step
from matris.blocks import moe
from matris.config import Precision
from matris.layouts import parse_layout
from matris.model import MatRIS
from matris.run import run_training
from matris.setup import build_setup
from matris.train_config import TrainConfig
from matris.verify import Row, compare, measure
from tests.parallel.gate import gate_config, run_gate, write_gate_files
from tests.parallel.ranks import run_ranks

FP64 = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_gate_files(path)
    return path


def random_plan(load: np.ndarray, **_: float) -> ExpertPlan:
    """Each expert's copies thrown to ranks at random, some of them to one rank alone."""
    rng = np.random.default_rng(int(load.sum()) + int(load[0].max()))
    chances = rng.dirichlet(np.full(len(load), 0.3), size=load.shape[1])
    share = np.array(
        [rng.multinomial(total, chance) for total, chance in zip(load.sum(axis=0), chances, strict=True)]
    ).T
    filled = [np.flatnonzero(row) for row in share]
    slots = np.full((len(load), max(1, *map(len, filled))), -1)
    for row, experts in zip(slots, filled, strict=True):
        row[: len(experts)] = experts
    kept = np.minimum(share, load)
    return ExpertPlan(slots=slots, tokens=load, kept=kept, taken=share - kept)


# The dispatcher alone -------------------------------------------------------------------------------------------------

KINDS, EXPERTS, TOPK, WIDTH = 5, 6, 2, 3


def through_the_dispatcher(mesh: Mesh) -> list[list[float]]:
    """Errors of values, first and second derivatives, for each plan."""
    rank = mesh.expert.rank
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 0 if rank == 1 else 6 + rank  # one rank has none
    kinds = torch.randint(0, KINDS - 1, (num_tokens,), generator=generator)
    x = torch.randn(num_tokens, WIDTH, dtype=torch.float64, generator=generator)
    common = torch.Generator().manual_seed(99)
    routing = torch.randn(KINDS, EXPERTS, generator=common).topk(TOPK, dim=1).indices
    weight = torch.randn(EXPERTS, WIDTH, dtype=torch.float64, generator=common)
    histogram = np.stack(gather_objects(np.bincount(kinds.numpy(), minlength=KINDS), mesh))
    load = expert_load(histogram, routing.numpy(), EXPERTS)

    def here(x: Tensor, weight: Tensor) -> Tensor:
        scaled = x[:, None] * weight[routing[kinds]]
        return torch.cat([scaled.tanh(), scaled.square()], dim=2).sum(dim=1)

    plans = (
        fixed_plan(load, mesh.expert.size),
        plan_experts(load, token_bytes=1.0, expert_bytes=3.0),
        random_plan(load),
    )
    errors = []
    for plan in plans:

        def there(x: Tensor, weight: Tensor, plan: ExpertPlan = plan) -> Tensor:
            dispatcher = PlannedTokenDispatcher(plan, TOPK, mesh.expert)
            rows, found = dispatcher.dispatch(x, kinds, routing[kinds])
            expert = torch.from_numpy(np.repeat(plan.slots[rank], dispatcher.counts))
            assert bool((routing[found] == expert[:, None]).any(dim=1).all())
            scaled = rows * weight[expert]
            return dispatcher.combine(torch.cat([scaled.tanh(), scaled.square()], dim=1))

        one, other = (derivatives(function, x, weight) for function in (here, there))
        # A rank's weight gradient is that of the tokens that came to it.
        one[3], other[3] = (sum(gather_objects(values[3], mesh)) for values in (one, other))
        errors.append([float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(one, other, strict=True)])
    return errors


def derivatives(function: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Value, dE/dx, and of |dE/dx|^2 the derivatives by x and by the weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    value = function(x, weight)
    (force,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
    second = torch.autograd.grad(force.square().sum(), (x, weight))
    return [value.detach(), force.detach(), *second]


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, {"expert": 2}), (3, {"expert": 3}), (2, {"graph": 2, "expert": 2})]
)
def test_tokens_go_and_come_back_in_every_derivative(world_size: int, layout: dict[str, int]) -> None:
    for errors in run_ranks(world_size, through_the_dispatcher, layout=layout):
        assert np.max(errors) < 1e-12


def a_plan_for_other_tokens(mesh: Mesh) -> str:
    plan = fixed_plan(np.full((2, 4), 3), 2)
    with pytest.raises(ValueError, match="plan each micro-batch anew") as raised:
        PlannedTokenDispatcher(plan, 1, mesh.expert).dispatch(
            torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)
        )
    return str(raised.value)


def test_a_plan_of_another_micro_batch_is_refused() -> None:
    assert run_ranks(2, a_plan_for_other_tokens, layout={"expert": 2})[0].startswith("3 token copies")


# The model ------------------------------------------------------------------------------------------------------------


def under_random_plans(launch: Launch, folder: Path, names: Sequence[str]) -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "plan_experts", random_plan)
        return run_gate(launch, folder, names, [("mixed", "fp64", "experts")])


@pytest.mark.slow
def test_any_plan_gives_the_same(folder: Path) -> None:
    for rows in run_ranks(4, under_random_plans, folder, ["ep4", "ep2xfsdp2xtp2"], with_mesh=False):
        assert not [row for row in rows if not row.passed]


def experts_config(folder: Path, layout: str, **training: Any) -> TrainConfig:
    config = gate_config(folder, "mixed", kind="experts")
    return replace(
        config,
        training=replace(config.training, **training),
        parallel=parse_layout(layout).applied(config.parallel),
    )


def step_of(mesh: Mesh, config: TrainConfig) -> dict[str, Any]:
    """What moves and what lives in one step, in which each rank has one micro-batch."""
    setup = build_setup(config, mesh)
    passes, task, weights = setup.learner.weights.passes, setup.task, setup.learner.weights
    batch = next(iter(setup.train.batches(0)))
    totals = setup.train.totals(batch.indices)
    found: dict[str, Any] = {"pieces": len(batch.micro_batches)}
    if passes is not None:
        with weights.run(training=True):
            loss = task.loss(batch.micro_batches[0], totals, training=True)
            found["live after the force pass"] = passes.live_bytes
            found["most until then"] = passes.peak_bytes
            loss.total.backward(inputs=weights.leaves)
        found["live after the step"] = passes.live_bytes
        kept = [unit for unit in passes.units if passes.keep and not unit.changes]
        found["kept"] = sum(unit.axis.size * unit.shard.nbytes for unit in kept)
    setup.learner.zero_gradients()
    mesh.ledger.clear()
    train_step(task, batch, totals, learner=setup.learner, mesh=mesh)
    found |= {name: dict(getattr(mesh.ledger, name)) for name in ("calls", "bytes", "wire_bytes")}
    found["sites"] = [
        (site.plan, site.token_bytes, site.expert_bytes, site.axis.rank) for site in setup.model.expert_sites()
    ]
    learner = setup.learner
    held = [learner.parameters.values(), (piece.grad for piece in learner.parameters.values())]
    held += [learner.ema.average.values(), [value for value in setup.model.parameters() if not value.requires_grad]]
    moments = [value for state in learner._optimizer_state().values() for value in state.values() if value.ndim]
    found["held"] = sum(value.nbytes for values in (*held, moments) for value in values)
    whole = MatRIS(config.model, precision=Precision.fp64)
    whole.readout.magmom.requires_grad_(True)
    found["counted"] = weight_memory(
        whole,
        whole.sharding_units(),
        shards=mesh.shard.size,
        tensor=1,
        experts=whole.expert_sites(),
        expert_ranks=mesh.expert.size,
        at_home=config.parallel.expert_placement == "fixed",
    )
    gradients = setup.learner.gather_gradients()
    found["idle"] = [
        float(gradients[f"{name}.{part}"][expert].abs().max())
        for name, site in setup.model.named_modules()
        if isinstance(site, moe.RoutedExperts)
        for expert in np.flatnonzero(site.plan.tokens.sum(axis=0) == 0)
        for part in ("inner", "core", "gate")
    ]
    return found


def exchanged(found: dict[str, Any], *, keep: bool, homes: bool) -> Traffic:
    """The all-to-alls of a step, from its plans."""
    traffic = Traffic()
    for plan, token_bytes, expert_bytes, rank in found["sites"]:
        axis, load = PlainAxis(name="expert", size=len(plan.slots)), SiteLoad.of(plan, rank)
        traffic.add(token_traffic(load, axis, token_bytes=token_bytes))
        if not homes:
            policy = "keep" if keep else "regather"
            traffic.add(expert_traffic(load, axis, expert_bytes=expert_bytes, policy=policy))
    return traffic


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("ep2", {"expert": 2}),
        ("ep2-home", {"expert": 2}),
        ("fsdp2-keepxep2", {"shard": 2, "expert": 2}),
    ],
)
def test_traffic_and_memory_of_a_step(folder: Path, layout: str, sizes: dict[str, int]) -> None:
    config = experts_config(folder, layout)
    config = replace(config, data=replace(config.data, max_atoms=None))
    keep, homes = "keep" in layout, "home" in layout
    for found in run_ranks(2, step_of, config, layout=sizes):
        assert found["pieces"] == 1
        traffic = exchanged(found, keep=keep, homes=homes)
        for name in ("calls", "bytes", "wire_bytes"):
            assert found[name]["expert/all_to_all"] == getattr(traffic, name)["expert/all_to_all"], name
        assert found["calls"]["expert/all_gather"] == 1
        assert found["bytes"]["expert/all_gather"] == 2 * 94 * 8  # tokens of edges and atoms by element
        assert found["idle"]
        assert set(found["idle"]) == {0.0}
        if not homes and not keep:
            gathered = [
                max(1, int((plan.slots[rank] >= 0).sum())) * expert_bytes
                for plan, _, expert_bytes, rank in found["sites"]
            ]
            assert found["live after the force pass"] == 0
            assert found["most until then"] <= max(map(sum, pairwise(gathered)))
        assert abs(found["held"] - found["counted"].held) < 100  # padding, which is counted and not held
        if not homes:
            assert found["live after the step"] == found["kept"]


def fp16_step_of(mesh: Mesh, config: TrainConfig) -> list[dict[str, Any]]:
    halved = replace(config, parallel=replace(config.parallel, expert_fp16_wire=True))
    found = []
    for run in (config, halved):
        mesh.ledger.clear()
        measured = measure(run, mesh)
        found.append({"measured": measured, "wire": mesh.ledger.wire_bytes["expert/all_to_all"]})
    return found


def test_fp16_on_the_wire_halves_the_bytes_and_changes_little(folder: Path) -> None:
    config = experts_config(folder, "ep2-home", precision="fp32")
    for full, halved in run_ranks(2, fp16_step_of, config, layout={"expert": 2}):
        assert 0.5 < halved["wire"] / full["wire"] < 0.51  # a byte per token says its kind
        errors = compare(halved["measured"], full["measured"])
        for name in ("energy", "forces", "stress", "energy_gradient", "forces_gradient", "stress_gradient"):
            assert 1e-8 < errors[name] < 2e-3, (name, errors)


def run_of(mesh: Mesh, config: TrainConfig) -> int:
    return run_training(config)


def test_runs_resume_with_the_experts_elsewhere(folder: Path) -> None:
    """The model and the checkpoint of a run that changed its layout are those of one process."""
    alone = folder / "alone"
    assert run_training(experts_config(folder, "dp1", train_iters=4, output=str(alone), save_interval=2)) == 0
    output = str(folder / "moved")

    def part(layout: str, steps: int) -> TrainConfig:
        return experts_config(folder, layout, train_iters=steps, output=output, save_interval=2)

    assert run_ranks(2, run_of, part("ep2", 2), layout={"expert": 2}) == [0, 0]
    assert run_ranks(4, run_of, part("ep2-homextp2", 4), layout={"tensor": 2, "expert": 2}) == [0] * 4
    with open(Path(output) / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(1.0 <= float(row["expert_load_balance"]) <= 2.0 for row in rows if row["loss"])
    assert all(0.0 < float(row["expert_tokens_moved"]) < 1.0 for row in rows if row["loss"])
    assert all(1.0 <= float(row["experts_per_rank"]) <= 8.0 for row in rows if row["loss"])
    ours, theirs = (load_file(Path(run) / "last" / "model.safetensors") for run in (output, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)
    ours, theirs = (read_directory(Path(run) / "checkpoints" / "step_00000004")[0] for run in (output, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)
    tuned = {}
    for layout, sizes in (("dp1", None), ("ep2-home", {"expert": 2}), ("ep2", {"expert": 2})):
        run = replace(
            experts_config(folder, layout, output=str(folder / f"tuned_{layout}")), init_from=str(alone / "last")
        )
        assert run_training(run) == 0 if sizes is None else run_ranks(2, run_of, run, layout=sizes) == [0, 0]
        tuned[layout] = load_file(folder / f"tuned_{layout}" / "last" / "model.safetensors")
    for name, value in tuned["dp1"].items():
        for layout in ("ep2-home", "ep2"):
            torch.testing.assert_close(tuned[layout][name], value, rtol=1e-9, atol=1e-12, msg=name)


def complaint(mesh: Mesh, config: TrainConfig) -> str:
    with pytest.raises(ValueError, match="expert") as raised:
        build_setup(config, mesh)
    return str(raised.value)


def test_layouts_that_the_experts_do_not_fit_are_refused(folder: Path) -> None:
    config = experts_config(folder, "ep2-home")
    odd = replace(config, model=replace(config.model, num_moe_experts=7))
    assert "does not divide model.num_moe_experts (7)" in run_ranks(2, complaint, odd, layout={"expert": 2})[0]
    dense = replace(gate_config(folder, "mixed"), parallel=config.parallel)
    assert "the model has no experts" in run_ranks(2, complaint, dense, layout={"expert": 2})[0]
