"""The step on one of 1024 and of 16384 ranks: calls and bytes of every collective are closed formulas of the batch.

torch's fake process group answers every collective at once and without data, so one process runs the code of any rank.
The numbers that it computes mean nothing; what it hands to its collectives is what a real rank would.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import ase.build
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ase.calculators.singlepoint import SinglePointCalculator

from janus.graph_parallel.halo import HaloPlan
from janus.mesh import Axis, Mesh, open_mesh
from janus.optim import AdamWConfig, Schedule
from janus.training.learner import Learner
from janus.training.step import accumulate_gradients
from matris.config import LossConfig, ModelConfig, NormType, RadialBasis
from matris.data.dataset import Collate, MicroBatch
from matris.data.labels import LabelKeys, read_labels
from matris.data.records import Sample
from matris.graph.batch import GraphBatch, LabelTotals
from matris.graph.structure import Structure
from matris.model import MatRIS
from matris.task import MatRISTask
from tests.parallel import ranks  # noqa: F401  # says what the server of all processes imports first

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    pairwise_cutoff=4.0,
    three_body_cutoff=3.0,
    num_radial=3,
    num_angular=3,
    readout_hidden_sizes=(8,),
)
CONFIGS = {
    "layer norm": SMALL,
    "rms norm": replace(SMALL, num_layers=1, norm_type=NormType.rms, ffn_bias=True, enveloped_edge_update=False),
}
FP32, FP64 = 4, 8
MICRO_BATCHES = 2


@dataclass(kw_only=True)
class Traffic:
    """What a ledger holds."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, axis: Axis, collective: str, times: int, num_bytes: int, wire_bytes: float) -> None:
        if axis.size > 1 and times:
            key = f"{axis.name}/{collective}"
            self.calls[key] += times
            self.bytes[key] += times * num_bytes
            self.wire_bytes[key] += times * wire_bytes  # type: ignore[assignment]

    def all_reduce(self, axis: Axis, times: int, num_bytes: int) -> None:
        self.add(axis, "all_reduce", times, num_bytes, 2 * (axis.size - 1) * num_bytes / axis.size)

    def all_gather(self, axis: Axis, times: int, whole_bytes: int) -> None:
        own = whole_bytes // axis.size
        self.add(axis, "all_gather", times, own, (axis.size - 1) * own)

    def reduce_scatter(self, axis: Axis, times: int, num_bytes: int) -> None:
        self.add(axis, "reduce_scatter", times, num_bytes, (axis.size - 1) * num_bytes / axis.size)

    def all_to_all(self, axis: Axis, times: int, num_bytes: int) -> None:
        self.add(axis, "all_to_all", times, num_bytes, num_bytes)


@dataclass(kw_only=True)
class Expected:
    """Traffic of forward pass, force pass and second backward pass, operation by operation.

    An operation runs once in the forward pass. If it depends on the positions, its adjoint runs in the force pass, and
    the derivative of that, the operation itself, in the second backward. If it depends on a weight, its adjoint runs in
    the second backward once more.
    """

    mesh: Mesh
    traffic: Traffic = field(default_factory=Traffic)

    def copy(self, axis: Axis, num_bytes: int, *, positions: bool = True, weights: bool = True) -> None:
        self.traffic.all_reduce(axis, positions + weights, num_bytes)

    def reduce(self, axis: Axis, num_bytes: int) -> None:
        self.traffic.all_reduce(axis, 2, num_bytes)

    def gather(self, num_bytes: int) -> None:
        self.traffic.all_gather(self.mesh.tensor, 2, num_bytes)

    def all_gather(self, num_bytes: int) -> None:
        self.traffic.all_gather(self.mesh.tensor, 2, num_bytes)
        self.traffic.reduce_scatter(self.mesh.tensor, 2, num_bytes)

    def reduce_scatter(self, num_bytes: int) -> None:
        self.all_gather(num_bytes)  # likewise

    def borrow(self, plan: HaloPlan | None, row_bytes: int, *, positions: bool = True, weights: bool = True) -> None:
        if plan is not None:
            axis = self.mesh.graph
            self.traffic.all_to_all(axis, 1 + positions, plan.gather_bytes(row_bytes))
            self.traffic.all_to_all(axis, positions + weights, plan.reduce_bytes(row_bytes))

    def give_back(self, plan: HaloPlan | None, row_bytes: int) -> None:
        self.borrow(plan, row_bytes)  # its adjoint; with positions and weights before it both run twice


def of_model(hyper: ModelConfig, graph: GraphBatch, mesh: Mesh) -> Traffic:
    """Of the three passes of a micro-batch, the weights' own traffic aside."""
    expected = Expected(mesh=mesh)
    atoms, edges = graph.atom_halo, graph.edge_halo
    num_atoms, num_edges, num_angles = graph.num_atoms, graph.num_edges, graph.num_angles
    owned = graph.num_undirected if edges is None else edges.num_owned
    local = graph.num_undirected if edges is None else edges.num_local
    row = FP32 * hyper.hidden_size
    part = row // mesh.tensor.size
    learns_basis = hyper.learnable_basis and hyper.radial_basis is RadialBasis.bessel

    def gated(rows: int) -> None:
        """Two layers whose output is scattered, and two numbers per row for each mean of the norm."""
        for _half in ("core", "gate"):
            expected.reduce_scatter(rows * row)
        for _mean in range(2 if hyper.norm_type is NormType.layer else 1):
            expected.reduce(mesh.tensor, 2 * rows * FP32)
            expected.copy(mesh.tensor, 2 * rows * FP32)

    def attention(
        nodes: tuple[int, HaloPlan | None],
        features: tuple[int, HaloPlan | None],
        num_messages: int,
        *,
        targets_return: bool,
        nodes_move: bool,
    ) -> None:
        for (count, plan), moves in ((nodes, nodes_move), (features, True)):
            expected.copy(mesh.tensor, count * row, positions=moves)
            expected.borrow(plan, row, positions=moves)
        gated(num_messages)
        for _end in ("target", "source") if targets_return else ("source",):
            expected.give_back(nodes[1], part)
            expected.give_back(nodes[1], part)
        for _end in ("target", "source"):
            expected.all_gather(nodes[0] * row)
        gated(nodes[0])
        expected.gather(nodes[0] * row)
        if features[1] is not None:
            expected.give_back(features[1], part)
        expected.gather(features[0] * row)

    # Geometry: positions and strain, which no weight comes before.
    expected.borrow(atoms, 3 * FP64, weights=False)
    expected.copy(mesh.graph, 9 * graph.num_structures * FP64, weights=False)
    expected.copy(mesh.tensor, local * FP32, weights=False)
    expected.copy(mesh.tensor, num_angles * FP32, weights=False)
    for _basis in ("pair", "line"):
        expected.copy(mesh.tensor, local * hyper.num_radial * FP32, weights=learns_basis)
    for block in range(hyper.num_layers):
        is_last = block == hyper.num_layers - 1
        attention((owned, edges), (num_angles, None), num_angles, targets_return=True, nodes_move=True)
        # In the first block the atoms' features are those of their elements.
        attention((num_atoms, atoms), (owned, edges), num_edges, targets_return=False, nodes_move=block > 0)
        # Line refinement
        for count in (owned, num_angles, num_atoms):
            expected.copy(mesh.tensor, count * row)
        expected.borrow(edges, row)
        gated(num_angles)
        expected.give_back(edges, part)
        for count in (owned,) if is_last else (owned, num_angles):
            expected.all_gather(count * row)
            expected.reduce(mesh.tensor, count * row)
        # Atom refinement
        for count, plan in ((num_atoms, atoms), (owned, edges)):
            expected.copy(mesh.tensor, count * row)
            expected.borrow(plan, row)
        gated(num_edges)
        for count in (num_atoms,) if is_last else (num_atoms, num_edges):
            expected.all_gather(count * row)
            expected.reduce(mesh.tensor, count * row)
        if not is_last:
            expected.give_back(edges, row)
    # Sums of interaction and reference energies, whose gradient is a constant.
    for _energy in ("interaction", "reference"):
        expected.traffic.all_reduce(mesh.graph, 1, graph.num_structures * FP64)
    return expected.traffic


def of_weights(learner: Learner, mesh: Mesh, policy: str) -> Traffic:
    """Of the weights and their gradients, over all micro-batches of a step."""
    traffic = Traffic()
    passes = learner.weights.passes
    units = () if passes is None else passes.units
    for unit in units:
        # The atoms' embedding does not depend on the positions: the force pass does not see it.
        gathers = 2 if unit.module is learner.model.atom_embedding else 3
        num_bytes = FP32 * unit.num_held() * unit.axis.size
        traffic.all_gather(mesh.shard, 1 if policy == "keep" else MICRO_BATCHES * gathers, num_bytes)
        traffic.reduce_scatter(mesh.shard, MICRO_BATCHES, num_bytes)
        traffic.all_reduce(mesh.shard_replicas, 1, num_bytes // mesh.shard.size)
    sharded = {name for unit in units for name in unit.pieces}
    whole = sum(piece.nbytes for name, piece in learner.parameters.items() if name not in sharded)
    traffic.all_reduce(mesh.replicas, bool(whole), whole)
    traffic.all_reduce(mesh.tensor, 1, 3 * FP64)  # the gradient's norm
    traffic.all_reduce(mesh.shard, 1, FP64)
    return traffic


def micro_batch(mesh: Mesh) -> MicroBatch:
    samples = []
    for seed, atoms in enumerate((ase.build.bulk("Si", cubic=True), ase.build.bulk("NaCl", "rocksalt", a=5.6))):
        atoms.rattle(0.1, seed=seed)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((len(atoms), 3)), stress=np.full(6, 0.01))
        structure, labels = Structure.from_atoms(atoms), read_labels(atoms, LabelKeys()).labels
        samples.append(Sample(identifier=f"{seed}", structure=structure, labels=labels, task="default"))
    collate = Collate(
        pairwise_cutoff=SMALL.pairwise_cutoff,
        three_body_cutoff=SMALL.three_body_cutoff,
        task_names=("default",),
        num_parts=mesh.graph.size,
        part=mesh.graph.rank,
    )
    return collate(samples)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Traffic found and expected, and seconds to open the mesh and to run the step."""

    found: Traffic
    expected: Traffic
    seconds: tuple[float, float]


def step(rank: int, world_size: int, layout: Mapping[str, int], name: str, policy: str) -> Measured:
    """One rank of many, in a process that is no rank of anything else."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("error", message=".*an autograd kernel was not registered.*")
    torch.set_num_threads(1)
    start = time.monotonic()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with open_mesh("cpu", watched=False, **layout) as mesh:  # the other ranks do not exist
            return measured(mesh, CONFIGS[name], policy, start)
    finally:
        dist.destroy_process_group()


def measured(mesh: Mesh, hyper: ModelConfig, policy: str, start: float) -> Measured:
    """The step without its update, whose numbers would mean nothing."""
    opened = time.monotonic()
    model = MatRIS(hyper, seed=1, mesh=mesh)
    learner = Learner(
        model,
        AdamWConfig(),
        Schedule(lr=1e-3, num_steps=1),
        ema_decay=0.0,
        clip_grad=1.0,
        mesh=mesh,
        units=model.sharding_units(),
        policy=policy,  # type: ignore[arg-type]
    )
    batch = micro_batch(mesh)
    totals = LabelTotals(
        energy_structures=2.0, forces_structures=2.0, forces_atoms=10.0, stress_structures=2.0, magmoms_atoms=0.0
    )
    task = MatRISTask(model, LossConfig(), ("default",))
    mesh.ledger.clear()
    accumulate_gradients(task, [batch] * MICRO_BATCHES, totals, learner)
    learner.sum_gradients()
    learner.clip()
    ledger = mesh.ledger
    found = Traffic(calls=ledger.calls, bytes=ledger.bytes, wire_bytes=ledger.wire_bytes)
    expected, of_batch = of_weights(learner, mesh, policy), of_model(hyper, batch.graph, mesh)
    for counter in ("calls", "bytes", "wire_bytes"):
        for key, value in getattr(of_batch, counter).items():
            getattr(expected, counter)[key] += MICRO_BATCHES * value
    return Measured(found=found, expected=expected, seconds=(opened - start, time.monotonic() - opened))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as executor:
        yield executor


def check(
    pool: ProcessPoolExecutor,
    rank: int,
    world_size: int,
    layout: Mapping[str, int],
    name: str,
    policy: str = "regather",
) -> None:
    result = pool.submit(step, rank, world_size, layout, name, policy).result(timeout=120.0)
    print(f"rank {rank} of {world_size}: mesh {result.seconds[0]:.1f} s, step {result.seconds[1]:.1f} s")
    assert {key.split("/")[0] for key in result.found.calls} >= set(layout)
    assert dict(result.found.calls) == dict(result.expected.calls)
    assert dict(result.found.bytes) == dict(result.expected.bytes)
    assert dict(result.found.wire_bytes) == pytest.approx(dict(result.expected.wire_bytes), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 517])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 8},
        {"graph": 4},
        {"shard": 16},
        {"shard": 1024},
        {"graph": 4, "tensor": 2},
        {"shard": 8, "graph": 2, "tensor": 4},
    ],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()) or "data",
)
def test_ranks_of_1024(pool: ProcessPoolExecutor, layout: dict[str, int], name: str, rank: int) -> None:
    check(pool, rank, 1024, layout, name)


@pytest.mark.parametrize("rank", [0, 9733])
@pytest.mark.parametrize("policy", ["regather", "keep"])
def test_ranks_of_16384(pool: ProcessPoolExecutor, rank: int, policy: str) -> None:
    check(pool, rank, 16384, {"shard": 64, "graph": 4, "tensor": 8}, "layer norm", policy)
