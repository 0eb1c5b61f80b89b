"""The force-matching loss of a global batch, as a sum over its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from janus.ops.segment import segment_sum
from matris.config import ForceReduction, LossConfig, LossKind
from matris.graph.batch import GraphBatch, LabelBatch, LabelTotals
from matris.model import Prediction


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Terms of the loss, each already divided by its count in the global batch and not yet weighted, float64 scalars.

    Attributes:
        energy: per atom, eV; forces: eV/A; stress: eV/A^3; magmoms: Bohr magnetons (squared for `mse` and `huber`).
        total: weighted sum. Summed over all micro-batches of all ranks it is the loss of the global batch. On a graph
            axis energies and stresses are known to every rank: each has these terms whole, for its gradients are parts
            of a sum, but only the first rank's count (`counted_once`).
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor
    magmoms: Tensor
    total: Tensor

    @staticmethod
    def weighted(config: LossConfig, *, energy: Tensor, forces: Tensor, stress: Tensor, magmoms: Tensor) -> LossTerms:
        """The terms with their total."""
        total = (
            config.energy_weight * energy
            + config.forces_weight * forces
            + config.stress_weight * stress
            + config.magmoms_weight * magmoms
        )
        return LossTerms(energy=energy, forces=forces, stress=stress, magmoms=magmoms, total=total)

    def counted_once(self, config: LossConfig, *, is_first: bool) -> LossTerms:
        """The terms whose sum over the ranks of a graph axis is that of the whole structures.

        Args:
            is_first: whether this is the first rank of the axis.
        """
        if is_first:
            return self
        zero = torch.zeros_like(self.energy)
        return LossTerms.weighted(config, energy=zero, forces=self.forces, stress=zero, magmoms=self.magmoms)


def force_matching_loss(
    prediction: Prediction,
    labels: LabelBatch,
    batch: GraphBatch,
    totals: LabelTotals,
    config: LossConfig,
    task_weights: Tensor | None = None,
) -> LossTerms:
    """Loss of one micro-batch, normalised by the label counts of the global batch.

    Errors are formed in float64; missing labels contribute nothing. A term of weight zero is not evaluated.

    Args:
        task_weights: (tasks, 4) factors of the structures of each task in the terms energy, forces, stress and magmoms;
            None for ones. The counts that terms are divided by do not know them.

    Raises:
        ValueError: a term has a weight but the prediction lacks the quantity.
    """
    weights = None if task_weights is None else task_weights[batch.task]

    def weighted(values: Tensor, term: int, structure: Tensor) -> Tensor:
        """Values (n, ...) of these structures (n,)."""
        return values if weights is None else values * weights[structure, term].view(-1, *(1,) * (values.ndim - 1))

    structures = torch.arange(batch.num_structures, device=batch.cell.device)
    zero = prediction.interaction_energy.new_zeros(())
    energy = forces = stress = magmoms = zero
    if config.energy_weight and totals.energy_structures:
        mask = labels.energy_mask
        # The reference energies go to the label's side: the difference is small, and exact.
        target = (labels.energy - prediction.reference_energy)[mask]
        error = (prediction.interaction_energy[mask] - target) / batch.atoms_per_structure[mask]
        error = weighted(_elementwise(error, config.energy, config.huber_delta), 0, structures[mask])
        energy = error.sum() / totals.energy_structures
    if config.forces_weight and totals.forces_structures:
        per_atom = _force_error(_required(prediction.forces, "forces") - labels.forces, config)
        per_atom = weighted(per_atom, 1, batch.structure_index)
        if config.force_reduction is ForceReduction.graph:
            per_structure = segment_sum(per_atom, batch.structure_index, batch.num_structures)
            per_structure = per_structure / batch.atoms_per_structure
            forces = per_structure[labels.forces_mask].sum() / totals.forces_structures
        else:
            forces = per_atom[labels.forces_mask[batch.structure_index]].sum() / totals.forces_atoms
    if config.stress_weight and totals.stress_structures:
        mask = labels.stress_mask
        error = _required(prediction.stress, "stress")[mask] - labels.stress[mask]
        error = _elementwise(error, config.stress, config.huber_delta).mean(dim=(1, 2))
        stress = weighted(error, 2, structures[mask]).sum() / totals.stress_structures
    if config.magmoms_weight and totals.magmoms_atoms:
        mask = labels.magmoms_mask[batch.structure_index]
        error = _required(prediction.magmoms, "magmoms")[mask] - labels.magmoms[mask].abs()
        error = weighted(_elementwise(error, config.magmoms, config.huber_delta), 3, batch.structure_index[mask])
        magmoms = error.sum() / totals.magmoms_atoms
    return LossTerms.weighted(config, energy=energy, forces=forces, stress=stress, magmoms=magmoms)


def _required(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the loss has a {name} term, but the prediction has no {name}: ask the model for it")
    return value


def _elementwise(error: Tensor, kind: LossKind, delta: float) -> Tensor:
    if kind is LossKind.mae:
        return error.abs()
    if kind is LossKind.mse:
        return error.square()
    return functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def _force_error(error: Tensor, config: LossConfig) -> Tensor:
    """(N, 3) to (N,)."""
    if config.forces is LossKind.l2norm:
        return torch.linalg.vector_norm(error, dim=1)
    return _elementwise(error, config.forces, config.huber_delta).mean(dim=1)
