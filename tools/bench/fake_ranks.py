"""The training step of one rank of very many: what it hands to its collectives and holds, beside what formulas say.

torch's fake process group answers every collective at once and without data, so one process runs the code of any rank.
The numbers that it computes mean nothing; what it hands to its collectives is what a real rank would.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ase.build
import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from janus.comm.traffic import Traffic
from janus.mesh import Mesh, open_mesh
from janus.sharding.memory import WeightMemory, WeightSizes, weight_memory
from janus.sharding.traffic import UnitSize, WeightAxes, weight_traffic
from janus.training.learner import Learner
from janus.training.step import accumulate_gradients
from matris.config import LossConfig, ModelConfig
from matris.data.dataset import Collate, MicroBatch
from matris.data.labels import LabelKeys, read_labels
from matris.data.records import Sample
from matris.graph.batch import GraphBatch, LabelTotals
from matris.graph.structure import Structure
from matris.model import MatRIS
from matris.task import MatRISTask
from matris.traffic import RankRows, feature_traffic
from tools.bench.learner import learner_of

FP32 = 4
MICRO_BATCHES = 2


def by_formula(hyper: ModelConfig, mesh: Mesh, policy: str, batch: GraphBatch, *, micro_batches: int) -> Traffic:
    """Of a step with so many micro-batches like `batch`."""
    traffic = _of_weights(hyper, mesh, policy, micro_batches)
    of_batch = feature_traffic(hyper, RankRows.of(batch), graph=mesh.graph, tensor=mesh.tensor)
    traffic.add(of_batch, micro_batches)
    return traffic


def _of_weights(hyper: ModelConfig, mesh: Mesh, policy: str, micro_batches: int) -> Traffic:
    """Of the weights and their gradients, from the shapes of the whole model."""
    whole = _whole(hyper)
    modules = whole.sharding_units() if mesh.shard.size > 1 else ()
    sizes = WeightSizes.of(whole, modules, tensor=mesh.tensor.size)
    return weight_traffic(
        [
            # The atoms' embedding does not depend on the positions: the force pass does not see it.
            UnitSize.of(size, mesh.shard.size, itemsize=FP32, in_force_pass=module is not whole.atom_embedding)
            for module, size in zip(modules, sizes.units, strict=True)
        ],
        WeightAxes(
            shard=mesh.shard,
            tensor=mesh.tensor,
            replicas=mesh.replicas,
            shard_replicas=mesh.shard_replicas,
            expert=mesh.expert,
            expert_replicas=mesh.expert_replicas,
        ),
        whole_bytes=sizes.everywhere,
        policy=policy,  # type: ignore[arg-type]
        micro_batches=micro_batches,
    )


def examples() -> list[Atoms]:
    """Silicon and rock salt."""
    frames = [ase.build.bulk("Si", cubic=True), ase.build.bulk("NaCl", "rocksalt", a=5.6)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=seed)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((len(atoms), 3)), stress=np.full(6, 0.01))
    return frames


def task_and_learner(hyper: ModelConfig, mesh: Mesh, policy: str) -> tuple[MatRISTask, Learner]:
    """Of a rank, with a model that learns energies, forces and stress."""
    model = MatRIS(hyper, seed=1, mesh=mesh)
    learner = learner_of(model, policy=policy)  # type: ignore[arg-type]
    return MatRISTask(model, LossConfig(), ("default",)), learner


def micro_batch(frames: Sequence[Atoms], hyper: ModelConfig, *, num_parts: int, part: int) -> MicroBatch:
    """Structures with labels, as a rank of a graph axis has them."""
    samples = []
    for number, atoms in enumerate(frames):
        structure, labels = Structure.from_atoms(atoms), read_labels(atoms, LabelKeys()).labels
        samples.append(Sample(identifier=f"{number}", structure=structure, labels=labels, task="default"))
    collate = Collate(
        pairwise_cutoff=hyper.pairwise_cutoff,
        three_body_cutoff=hyper.three_body_cutoff,
        task_names=("default",),
        num_parts=num_parts,
        part=part,
    )
    return collate(samples)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Traffic and memory of weights, found and expected, and seconds to open the mesh and to run the step.

    Attributes:
        held, expected_held: bytes of weights, gradients, moments and average after the step.
        gathered, expected_gathered: most bytes of whole weights beside that, with gradients of the same size and one
            that is on its way.
        padding: of one tensor like the weights: shards are equally long. Frozen weights count as padding, too, for
            formulas take all that is sharded as trained.
    """

    found: Traffic
    expected: Traffic
    held: int
    expected_held: int
    gathered: int
    expected_gathered: int
    padding: int
    seconds: tuple[float, float]


def step_of_rank(
    rank: int, world_size: int, layout: Mapping[str, int], hyper: ModelConfig, policy: str = "regather"
) -> Measured:
    """One rank of many, in a process that is no rank of anything else.

    Args:
        layout: sizes of the axes, as `open_mesh` takes them; experts are on all ranks.
        policy: of sharded weights.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("error", message=".*an autograd kernel was not registered.*")
    torch.set_num_threads(1)
    start = time.monotonic()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with open_mesh("cpu", watched=False, **layout) as mesh:  # the other ranks do not exist
            return measured(mesh, hyper, policy, start)
    finally:
        dist.destroy_process_group()


def measured(mesh: Mesh, hyper: ModelConfig, policy: str, start: float) -> Measured:
    """A step."""
    opened = time.monotonic()
    task, learner = task_and_learner(hyper, mesh, policy)
    batch = micro_batch(examples(), hyper, num_parts=mesh.graph.size, part=mesh.graph.rank)
    totals = LabelTotals(
        energy_structures=2.0, forces_structures=2.0, forces_atoms=10.0, stress_structures=2.0, magmoms_atoms=0.0
    )
    mesh.ledger.clear()
    accumulate_gradients(task, [batch] * MICRO_BATCHES, totals, learner)
    learner.sum_gradients()
    learner.clip()
    ledger, passes = mesh.ledger, learner.weights.passes
    units = [] if passes is None else [unit.axis.size * unit.shard.nbytes for unit in passes.units]
    frozen = sum(
        weight.nbytes
        for weight in _whole(hyper).parameters()
        if weight.dtype == torch.float32 and not weight.requires_grad
    )
    found = Traffic(calls=Counter(ledger.calls), bytes=Counter(ledger.bytes), wire_bytes=Counter(ledger.wire_bytes))
    learner.update()
    memory = _memory_of_weights(hyper, mesh)
    return Measured(
        found=found,
        expected=by_formula(hyper, mesh, policy, batch.graph, micro_batches=MICRO_BATCHES),
        held=_held_bytes(learner),
        expected_held=memory.held,
        gathered=0 if passes is None else 2 * passes.peak_bytes + max(units),
        expected_gathered=memory.gathered,
        padding=FP32 * len(units) + frozen // mesh.shard.size if units else 0,
        seconds=(opened - start, time.monotonic() - opened),
    )


def _held_bytes(learner: Learner) -> int:
    """Of weights, gradients, average and moments on this rank, after an update."""
    weights = {*learner.weights.leaves, *learner.model.parameters()}
    held = [*weights, *(weight.grad for weight in weights), *learner.ema.average.values()]
    for kind, tensors in learner.held().items():
        held += tensors.values() if kind.startswith("optimizer/") else ()
    return sum(value.nbytes for value in held if value is not None)


def _memory_of_weights(hyper: ModelConfig, mesh: Mesh) -> WeightMemory:
    whole = _whole(hyper)
    return weight_memory(whole, whole.sharding_units(), shards=mesh.shard.size, tensor=mesh.tensor.size)


def _whole(hyper: ModelConfig) -> MatRIS:
    """Shapes alone."""
    with torch.device("meta"):
        model = MatRIS(hyper)
        model.readout.magmom.requires_grad_(False)
    return model
