"""Plans: what they add up, which layouts they allow, and that the search finds the best of these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import torch

from janus.machine import Band, load_machine
from janus.sharding import weight_memory
from matris.cli import main
from matris.config import ModelConfig, Precision
from matris.cost import Counts, Derivatives, step_flops
from matris.data.demo import make_demo
from matris.graph.partition import cut_report
from matris.layouts import Layout, parse_layout
from matris.memory import step_memory
from matris.model import MatRIS
from matris.plan import Planner
from matris.plan_job import NOT_MODELLED, POLICIES, Job, NoPlanError, Prediction
from matris.plan_search import SLOWER, candidates, divisors, search
from matris.presets import PRESETS
from matris.setup import check_ranks
from matris.train_config import ParallelConfig
from matris.workload import Workload
from tests.matris.structures import batch_of

TINY = PRESETS["moe-tiny"]
CRYSTAL = Workload(atoms=64.0, edges=4480.0, angles=50000.0)


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "hyper": TINY,
        "machine": load_machine("h100"),
        "ranks": 8,
        "devices_per_node": 4,
        "workload": CRYSTAL,
        "global_batch": 16,
    }
    return Job(**values | changes)


def small_memory(gigabytes: float) -> Any:
    return replace(load_machine("h100"), memory_GB=gigabytes)


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("atoms", "num_structures", "parts"),
    [
        (ase.build.bulk("Cu", cubic=True) * (8, 8, 8), 1, 4),
        (ase.build.bulk("Cu", cubic=True) * (6, 6, 6), 1, 8),
        (ase.build.bulk("Cu", cubic=True) * (3, 3, 3), 5, 4),
        (ase.build.molecule("C60"), 21, 4),
    ],
    ids=["crystal", "small parts", "crystals", "molecules"],
)
def test_borrowed_rows_are_about_those_of_a_real_cut(atoms: Any, num_structures: int, parts: int) -> None:
    """An estimate: within a factor of 2.5 of the mean over parts, for parts of structures and structures of parts."""
    cutoff = 4.0
    config = ModelConfig(pairwise_cutoff=cutoff, three_body_cutoff=3.2)
    batch = batch_of(*[atoms] * num_structures, config=config)
    report = cut_report(batch, num_parts=parts, partitioner="morton")
    sizes = Workload(
        atoms=batch.num_atoms / num_structures,
        edges=batch.num_edges / num_structures,
        angles=batch.num_angles / num_structures,
    )
    rows = sizes.rows(num_structures, parts=parts, cutoff=cutoff)
    assert rows.atoms == pytest.approx(batch.num_atoms / parts)
    assert rows.undirected == pytest.approx(batch.num_undirected / parts)
    assert rows.atom_halo is not None
    assert rows.edge_halo is not None
    assert 1 / 2.5 < rows.atom_halo.borrowed / (report.atoms.sum() / parts) < 2.5
    assert 1 / 2.5 < rows.edge_halo.borrowed / (report.edges.sum() / parts) < 2.5


def test_a_structure_needs_an_atom_and_angles_need_edges() -> None:
    with pytest.raises(ValueError, match="0.5 atoms: give a mean number of at least 1"):
        Workload(atoms=0.5, edges=1.0, angles=1.0)
    with pytest.raises(ValueError, match="5 angles and no edges"):
        Workload(atoms=1.0, edges=0.0, angles=5.0)


# Predictions ----------------------------------------------------------------------------------------------------------


def test_one_rank_sends_nothing_and_computes_what_the_formulas_say() -> None:
    found = Planner(job(ranks=1, global_batch=3, recompute="none")).predict(Layout())
    assert not found.traffic.calls
    assert found.efficiency == Band(low=1.0, high=1.0)
    assert (found.micro_batch, found.micro_batches) == (3, 1)
    counts = Counts(structures=3, atoms=192, edges=13440, undirected=6720, angles=150000)
    assert found.flops == step_flops(TINY, counts, Derivatives()).step
    assert found.memory.activations == step_memory(TINY, counts, recompute_bytes=None)
    assert found.pessimistic.step > found.optimistic.step > found.flops / 67e12
    assert found.mfu.high == pytest.approx(found.flops / 67e12 / found.optimistic.step)


@pytest.mark.parametrize("name", ["dp8", "fsdp4", "fsdp8xep2", "ep4-home", "fsdp2xtp2xep2", "gp2xtp2"])
def test_memory_of_weights_is_that_of_the_counter(name: str) -> None:
    layout = parse_layout(name)
    with torch.device("meta"):
        model = MatRIS(TINY)
    memory = weight_memory(
        model,
        model.sharding_units(),
        shards=layout.shard,
        tensor=layout.tensor,
        experts=model.expert_sites(),
        expert_ranks=layout.expert,
        at_home=layout.placement == "fixed",
    )
    prediction = Planner(job()).predict(layout)
    found = prediction.memory
    assert prediction.recompute != "full"
    assert (found.weights, found.gathered) == (memory.held, memory.gathered + memory.waiting)
    assert found.experts >= memory.gathered_experts  # all of them, where tokens stay
    assert (found.experts == 0) == (memory.gathered_experts == 0)


def test_traffic_of_axes() -> None:
    planner = Planner(job(micro_batch=1))
    keys = {
        "dp8": {"replicas"},
        "fsdp8": {"shard", "replicas"},  # frequencies of the bases are in no unit
        "fsdp4": {"shard", "shard_replicas", "replicas"},
        "gp2": {"graph", "replicas"},
        "tp2": {"tensor", "replicas"},
        "ep2-home": {"expert", "expert_replicas", "replicas"},
    }
    for name, axes in keys.items():
        assert {key.split("/")[0] for key in planner.predict(parse_layout(name)).traffic.calls} == axes, name
    shard, kept = (planner.predict(parse_layout(name)) for name in ("fsdp8", "fsdp8-keep"))
    assert shard.micro_batches == 2
    units = len(planner.model.sharding_units())
    assert shard.traffic.calls["shard/all_gather"] == 2 * (3 * units - 1)
    assert kept.traffic.calls["shard/all_gather"] == units
    assert shard.traffic.calls["shard/reduce_scatter"] == 2 * units


def test_time_grows_with_imbalance_and_distance() -> None:
    even = Planner(job()).predict(parse_layout("fsdp8"))
    uneven = Planner(job(imbalance=1.1)).predict(parse_layout("fsdp8"))
    apart = Planner(job(devices_per_node=1)).predict(parse_layout("fsdp8"))
    assert uneven.pessimistic.computation == pytest.approx(1.1 * even.pessimistic.computation)
    assert uneven.efficiency.low < even.efficiency.low
    assert apart.pessimistic.hidden > even.pessimistic.hidden
    assert apart.pessimistic.step > even.pessimistic.step
    assert apart.traffic == even.traffic


def test_all_wait_for_the_rank_with_one_structure_more() -> None:
    even, uneven = (Planner(job(global_batch=size)).predict(parse_layout("dp8")) for size in (16, 12))
    assert uneven.pessimistic.step == even.pessimistic.step
    assert uneven.flops == pytest.approx(0.75 * even.flops)
    assert uneven.efficiency.high < 0.76


def test_the_least_recomputation_that_fits() -> None:
    hyper = PRESETS["l"]
    needed = {
        policy: Planner(job(hyper=hyper, ranks=1, global_batch=1, recompute=policy)).predict(Layout()).memory.total
        for policy in POLICIES
    }
    assert needed["none"] > needed["selective"] > needed["full"]
    assert needed["none"] > needed["selective"]
    for policy in ("none", "selective", "full"):
        machine = small_memory(1.001 * needed[policy] / 1e9 / 0.9)
        found = Planner(job(hyper=hyper, ranks=1, global_batch=1, machine=machine)).predict(Layout())
        assert found.recompute == policy
    machine = small_memory(0.5 * needed["full"] / 1e9)
    with pytest.raises(NoPlanError, match="one needs .* GB on each rank .* with recompute full") as raised:
        Planner(job(hyper=hyper, ranks=1, global_batch=1, machine=machine)).predict(Layout())
    assert raised.value.kind == "does not fit the memory"


def test_micro_batches_fill_the_memory() -> None:
    one = Planner(job(ranks=1, global_batch=1, recompute="none")).predict(Layout()).memory
    room = one.weights + 5.5 * one.activations
    found = Planner(job(ranks=1, recompute="none", machine=small_memory(room / 0.9e9))).predict(Layout())
    assert (found.micro_batch, found.micro_batches) == (4, 4)  # 16 structures in as many as with 5 at once, but even
    assert found.memory.total <= found.memory.available


def test_a_smaller_last_micro_batch_sends_less() -> None:
    """3 + 3 + 1 structures: tokens and features of 7, weights of 3 micro-batches."""

    def planned(structures: int, micro_batch: int) -> Prediction:
        wanted = job(ranks=2, global_batch=structures, micro_batch=micro_batch, recompute="none")
        return Planner(wanted).predict(parse_layout("gp2"))

    three, one, found = planned(3, 3), planned(1, 1), planned(7, 3)
    assert (found.micro_batch, found.micro_batches) == (3, 3)
    halo = [key for key in found.traffic.bytes if key.startswith("graph/") and "all_to_all" in key]
    assert halo
    for key in halo:
        assert found.traffic.bytes[key] == 2 * three.traffic.bytes[key] + one.traffic.bytes[key]
    assert found.flops == pytest.approx(2 * three.flops + one.flops)


@pytest.mark.parametrize(
    ("changes", "layout", "kind", "message"),
    [
        ({}, "fsdp3", "the ranks do not divide", "8 ranks do not divide into shard 3"),
        ({"ranks": 12}, "tp3", "the model does not divide", "tensor_model_parallel_size is 3"),
        ({}, "tp8", "the model does not divide", "4 attention heads do not divide into 8"),
        ({"hyper": PRESETS["s"]}, "ep2", "the model does not divide", "the model has no experts"),
        ({"global_batch": 4}, "dp8", "fewer structures than ranks for them", "4 structures per update for 8 ranks"),
        (
            {"workload": Workload(atoms=1.0, edges=0.0, angles=0.0), "global_batch": 2},
            "gp8",
            "more graph ranks than atoms",
            "8 ranks share 2 atoms",
        ),
        (
            {"micro_batch": 5, "global_batch": 32},
            "dp8",
            "fewer structures than a micro-batch",
            "the micro-batch is 5 structures, but a rank has 4 of the global batch of 32",
        ),
        ({"recompute": "full"}, "ep2", "recompute full with sharded experts", "experts at home"),
    ],
)
def test_layouts_that_cannot_be(changes: dict[str, Any], layout: str, kind: str, message: str) -> None:
    with pytest.raises(NoPlanError, match=message) as raised:
        Planner(job(**changes)).predict(parse_layout(layout))
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": Precision.fp64}, "precision is fp64: plans are made for fp32, tf32, bf16-mixed"),
        ({"imbalance": 0.9}, "imbalance is 0.9"),
        ({"global_batch": 0}, "global_batch is 0: it must be at least 1"),
        ({"machine": load_machine("cpu2"), "precision": Precision.tf32}, "no rate of tf32 products"),
    ],
)
def test_jobs_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


# Search ---------------------------------------------------------------------------------------------------------------


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(9) == [1, 3, 9]
    assert divisors(1) == [1]


@pytest.mark.parametrize("changes", [{}, {"machine": small_memory(1.5)}, {"hyper": PRESETS["s"], "global_batch": 4}])
def test_the_search_finds_what_trying_all_finds(changes: dict[str, Any]) -> None:
    task = job(**changes)
    planner, tried, layouts = Planner(task), {}, list(candidates(task))
    for layout in layouts:
        try:
            tried[layout] = planner.predict(layout)
        except NoPlanError:
            continue
    in_order = sorted(tried.values(), key=lambda found: found.pessimistic.step + found.optimistic.step)
    found = search(task, keep=3)
    assert [entry.pessimistic.step for entry in found.best] == [entry.pessimistic.step for entry in in_order[:3]]
    assert found.possible + sum(found.dropped.values()) == len(layouts) == len(set(layouts))
    assert found.possible + found.dropped.get(SLOWER, 0) >= len(tried) >= found.possible
    for prediction in found.best:
        parallel = prediction.layout.applied(ParallelConfig())
        check_ranks(task.hyper, parallel)
        parallel.refuse_idle()
        assert prediction.layout.num_ranks == task.ranks
        assert prediction.memory.total <= prediction.memory.available
        assert parse_layout(prediction.layout.name) == prediction.layout


def test_a_search_without_result_says_why() -> None:
    with pytest.raises(NoPlanError, match=r"none of \d+ layouts is possible \(.*does not fit the memory: \d+"):
        search(job(machine=small_memory(0.01)), keep=3)


# Command line ---------------------------------------------------------------------------------------------------------


def plan(*words: str) -> int:
    return main(["plan", "--preset", "moe-tiny", "--nodes", "2", *words])


def test_a_search_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    assert plan("--gpus-per-node", "4", "--machine", "h200", "--search", "--best", "3", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    facts = json.loads(output.read_text())
    assert len(facts["predictions"]) == 3
    assert facts["job"]["ranks"] == 8
    best = facts["predictions"][0]
    assert np.prod([best["axes"][name] for name in ("data", "shard", "graph", "tensor")]) == 8
    assert best["pessimistic"]["step_s"] >= best["optimistic"]["step_s"] > 0.0
    for words in ("NVIDIA H200", "assumed, not measured", best["layout"], "not modelled:", "the ranks do not divide"):
        assert words in shown
    assert all(entry in shown for entry in NOT_MODELLED)


def test_one_layout_and_sizes_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_demo(tmp_path, num=10)
    assert plan("--layout", "fsdp4xgp2", "--data", str(files.train), "--precision", "tf32", "--micro_batch", "2") == 0
    shown = capsys.readouterr().out
    assert "layout             dp2xfsdp4xgp2" in shown
    assert "shard/all_gather" in shown
    assert "110 atoms" not in shown


def test_the_settings_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {train: [none.xyz], global_batch_size: 24}\nmodel: {num_layers: 2, hidden_size: 32}\n"
        "training: {train_iters: 1, precision: tf32, recompute: all}\nparallel: {fully_sharded_size: 4}\n"
    )
    assert main(["plan", "--config", str(config), "--nodes", "1"]) == 0
    shown = capsys.readouterr().out
    assert "24 structures, tf32" in shown
    assert "layout             dp2xfsdp4" in shown
    assert "recompute all" in shown
    config.write_text(config.read_text().replace("recompute: all", "compile: blocks"))
    assert main(["plan", "--config", str(config), "--nodes", "1"]) == 2
    assert "training.compile is blocks: neither is predicted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a layout"),
        (("--search", "--layout", "fsdp2"), "leave out --layout"),
        (("--search", "--nodes", "0"), "--nodes is 0"),
        (("--layout", "fsdp2", "--best", "3"), "--best is of a search"),
        (("--search", "--data", "x.h5", "--atoms", "5"), "--data has sizes of its own"),
    ],
)
def test_options_that_do_not_fit(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search", "--machine", "h1"), "machine 'h1' is not known"),
        (("--search", "--gpus_per_node", "9"), "--gpus_per_node is 9, but a node of"),
        (("--layout", "fsdp5"), "16 ranks do not divide"),
        (("--layout", "xy"), "layout 'xy'"),
        (("--layout", "dp2xfsdp4"), "has 8 ranks, but there are 16: leave out dp"),
    ],
)
def test_values_that_do_not_fit(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 2
    assert message in capsys.readouterr().err
