"""Measures what no layout of ranks may change, and compares it with one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from janus.comm.collectives import broadcast_object, gather_objects
from janus.mesh import ElsewhereError, Launch, Mesh, open_mesh
from janus.ops.fused import using_kernels
from janus.training.step import accumulate_gradients, train_step
from matris.config import LossConfig
from matris.data.dataset import MicroBatch
from matris.layouts import Layout
from matris.setup import Setup, build_setup
from matris.task import MatRISTask
from matris.train_config import TrainConfig

NUM_STEPS = 3
TOLERANCES = {"fp64": 1e-10, "fp32": 1e-4}
"""Largest relative error of a layout, by precision."""
_TERMS = ("energy", "forces", "stress", "magmoms")
FLOOR = 1e-2
"""Part of the largest value of all names, to which at least an error is relative. Where terms cancel to nothing, as
they may in anyone's data, what is left is rounding of the size of the terms. The tests, whose data are chosen, use
less."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What no layout may change, by name of structure, parameter or step; float64 on the CPU, the same on all ranks.

    Attributes:
        energy, forces, stress, magmoms: of each structure of the first batch, eV, eV/A, eV/A^3, muB.
        energy_gradient, forces_gradient, stress_gradient, magmoms_gradient: of each parameter, of that term of the loss
            alone; empty where the loss has no such term.
        norm: of the gradient before clipping, of each step.
        loss: all sums of the loss and the errors, of each step.
        weights, average: parameters and their moving average after the last step.
    """

    energy: dict[str, Tensor]
    forces: dict[str, Tensor]
    stress: dict[str, Tensor]
    magmoms: dict[str, Tensor]
    energy_gradient: dict[str, Tensor]
    forces_gradient: dict[str, Tensor]
    stress_gradient: dict[str, Tensor]
    magmoms_gradient: dict[str, Tensor]
    norm: dict[str, Tensor]
    loss: dict[str, Tensor]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a layout compares.

    Attributes:
        layout: of how many ranks and which.
        errors: largest relative error by field of `Measurement`; those that are empty are left out.
        tolerance: what is allowed.
        unchecked: fields whose error says nothing, see `find_unchecked`.
    """

    layout: Layout
    errors: dict[str, float]
    tolerance: float
    unchecked: frozenset[str] = frozenset()

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())


def verify(config: TrainConfig, layouts: Sequence[Layout], launch: Launch, *, floor: float = FLOOR) -> Iterator[Row]:
    """Compares each layout with one process; the ranks must have been joined, and all of them call it.

    Rank 0 computes alone first, with the kernels of torch and nothing compiled, while the others wait; the layouts run
    as the settings say.

    Args:
        floor: see `largest_error`.
    """
    device = config.training.device
    tolerance = TOLERANCES[config.training.precision]
    alone = replace(
        config, parallel=Layout().applied(config.parallel), training=replace(config.training, compile="none")
    )
    reference: Measurement | None = None
    for layout in layouts:
        with open_mesh(
            device,
            shard=layout.shard,
            graph=layout.graph,
            tensor=layout.tensor,
            expert=layout.expert,
            timeout_minutes=config.parallel.distributed_timeout_minutes,
            launch=launch,
        ) as mesh:
            if reference is None:
                with using_kernels("torch", mesh.device):
                    reference = _on_first_rank(alone, mesh)
            with using_kernels(config.training.kernels, mesh.device):
                found = measure(replace(config, parallel=layout.applied(config.parallel)), mesh)
            yield Row(
                layout=layout,
                errors=compare(found, reference, floor),
                tolerance=tolerance,
                unchecked=find_unchecked(found, reference),
            )


def _on_first_rank(config: TrainConfig, mesh: Mesh) -> Measurement:
    """What rank 0 computes without the others, on all ranks."""
    result: Measurement | ValueError | OSError | None = None
    if mesh.is_main:
        try:
            result = measure(config, Mesh(device=mesh.device))
        except (ValueError, OSError) as error:
            result = error
    result = broadcast_object(result, mesh)
    if isinstance(result, ValueError | OSError):
        raise result if mesh.is_main else ElsewhereError("rank 0 failed")
    assert result is not None
    return result


def measure(config: TrainConfig, mesh: Mesh) -> Measurement:
    """Predictions and gradients of the first batch, then some updates. All ranks of the mesh call it."""
    setup = build_setup(config, mesh)
    predictions = _predictions(setup, mesh)
    gradients = {term: _gradient(setup, term) for term in _TERMS}
    norm, loss = {}, {}
    for batch in setup.train.batches(0):
        mesh.watch.step = batch.step + 1
        totals = setup.train.totals(batch.indices)
        report = train_step(setup.task, batch, totals, learner=setup.learner, mesh=mesh)
        norm[f"step {batch.step}"] = torch.tensor([report.grad_norm], dtype=torch.float64)
        loss[f"step {batch.step}"] = torch.from_numpy(report.sums[: setup.task.num_common_sums])
    return Measurement(
        **predictions,
        **{f"{term}_gradient": gradient for term, gradient in gradients.items()},
        norm=norm,
        loss=loss,
        weights=_plain(setup.learner.gather_parameters()),
        average=_plain(setup.learner.gather_average()),
    )


def compare(found: Measurement, expected: Measurement, floor: float = FLOOR) -> dict[str, float]:
    """Largest relative error of each quantity; infinite where something is missing or not a number."""
    return {
        entry.name: largest_error(getattr(found, entry.name), getattr(expected, entry.name), floor)
        for entry in fields(Measurement)
        if getattr(expected, entry.name) or getattr(found, entry.name)
    }


def find_unchecked(found: Measurement, expected: Measurement) -> frozenset[str]:
    """Quantities that are zero or undefined throughout, on both sides: nothing in them can be wrong.

    So are gradients of a term without labels in the data, or the stress of molecules.
    """
    return frozenset(
        entry.name
        for entry in fields(Measurement)
        if not any(
            value.nan_to_num().any() for side in (found, expected) for value in getattr(side, entry.name).values()
        )
    )


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = FLOOR) -> float:
    """Largest difference of two tensors of a name, relative to the largest value of the expected one.

    Args:
        floor: part of the largest value of all names, to which at least an error is relative.
    """
    if found.keys() != expected.keys():
        return math.inf
    sizes = {name: float(value.nan_to_num().abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    smallest = floor * max(sizes.values(), default=0.0)
    worst = 0.0
    for name, value in expected.items():
        other = found[name]
        if other.shape != value.shape or not torch.equal(other.isnan(), value.isnan()):
            return math.inf
        difference = (other - value).nan_to_num(posinf=math.inf, neginf=-math.inf).abs()
        if difference.numel() and float(difference.max()) > 0.0:
            worst = max(worst, float(difference.max()) / max(sizes[name], smallest, 1e-300))
    return worst


def _predictions(setup: Setup, mesh: Mesh) -> dict[str, dict[str, Tensor]]:
    """Energy, forces, stress and magnetic moments of every structure, from the ranks that have its atoms."""
    batch = next(iter(setup.train.batches(0)))
    parts = [part for micro_batch in batch.micro_batches for part in _parts(setup, micro_batch.to(mesh.device))]
    gathered: dict[str, list[_Part]] = {}
    for name, part in (entry for parts_of_rank in gather_objects(parts, mesh) for entry in parts_of_rank):
        gathered.setdefault(name, []).append(part)
    result: dict[str, dict[str, Tensor]] = {term: {} for term in _TERMS}
    for name, parts_of_structure in gathered.items():
        first = parts_of_structure[0]
        result["energy"][name] = torch.from_numpy(first.energy)
        result["stress"][name] = torch.from_numpy(first.stress)
        # Several tensor ranks have the same atoms, and graph ranks different ones: by position, each once.
        positions, rows = np.unique(
            np.concatenate([part.positions for part in parts_of_structure]), axis=0, return_index=True
        )
        assert len(positions) == first.num_atoms, "every atom has an owner, and no two are at one place"
        result["forces"][name] = torch.from_numpy(np.concatenate([part.forces for part in parts_of_structure])[rows])
        if first.magmoms is not None:
            magmoms = np.concatenate([part.magmoms for part in parts_of_structure if part.magmoms is not None])
            result["magmoms"][name] = torch.from_numpy(magmoms[rows])
    return result


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one rank knows of a structure: all of it, or its own n of the atoms.

    Attributes:
        num_atoms: of the whole structure.
        energy: (); stress: (3, 3); positions, forces: (n, 3); magmoms: (n,) or None.
    """

    num_atoms: int
    energy: np.ndarray
    stress: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    magmoms: np.ndarray | None


def _parts(setup: Setup, micro_batch: MicroBatch) -> Iterator[tuple[str, _Part]]:
    graph = micro_batch.graph
    with setup.learner.weights.run(training=False):
        prediction = setup.model(graph)
    for index, name in enumerate(micro_batch.identifiers):
        atoms = graph.structure_index == index
        assert prediction.forces is not None
        assert prediction.stress is not None
        yield (
            name,
            _Part(
                num_atoms=int(graph.atoms_per_structure[index]),
                energy=_array(prediction.energy[index]),
                stress=_array(prediction.stress[index]),
                positions=_array(graph.positions[atoms]),
                forces=_array(prediction.forces[atoms]),
                magmoms=None if prediction.magmoms is None else _array(prediction.magmoms[atoms]),
            ),
        )


def _gradient(setup: Setup, term: str) -> dict[str, Tensor]:
    """Gradient of one term of the loss of the first batch; empty where the loss has no such term."""
    weights = setup.task.loss_config
    if getattr(weights, f"{term}_weight") == 0.0:
        return {}
    task = MatRISTask(setup.model, only(term, weights), setup.task.task_names, setup.task.task_weights)
    batch = next(iter(setup.train.batches(0)))
    setup.learner.zero_gradients()
    accumulate_gradients(task, batch.micro_batches, setup.train.totals(batch.indices), setup.learner)
    setup.learner.sum_gradients()
    return _plain(setup.learner.gather_gradients())


def only(term: str, loss: LossConfig) -> LossConfig:
    """The loss with one of its terms, at weight 1."""
    return replace(
        loss,
        energy_weight=float(term == "energy"),
        forces_weight=float(term == "forces"),
        stress_weight=float(term == "stress"),
        magmoms_weight=float(term == "magmoms"),
    )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", torch.float64, copy=True) for name, value in tensors.items()}


def _array(value: Tensor) -> np.ndarray:
    return value.cpu().numpy()
