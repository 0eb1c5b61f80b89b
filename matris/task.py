"""Force matching with MatRIS, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from janus.training.task import MicroLoss
from matris.config import LossConfig
from matris.cost import Counts, Derivatives, step_flops
from matris.data.dataset import MicroBatch
from matris.elements import SYMBOLS
from matris.exported import save_model
from matris.graph.batch import GraphBatch, LabelTotals
from matris.loss import force_matching_loss
from matris.metrics import METRIC_NAMES, QUANTITIES, error_sums, metrics, metrics_line
from matris.model import MatRIS, Prediction

_PLAN = ("expert_load_balance", "experts_per_rank", "expert_tokens_moved")
"""Of the plans of experts, averaged over their sites: largest load of a rank over the mean, experts that a rank has at
hand, part of the tokens' copies that travel."""
TERMS = ("loss", "loss_energy", "loss_forces", "loss_stress", "loss_magmoms")


class MatRISTask:
    """A MatRIS model with its loss and its errors.

    Args:
        model: on the device to compute on.
        loss: weights and kinds of the terms.
        task_names: levels of theory in the data; errors are summed for each.
        task_weights: (tasks, 4) see `force_matching_loss`.
    """

    def __init__(
        self, model: MatRIS, loss: LossConfig, task_names: Sequence[str], task_weights: torch.Tensor | None = None
    ) -> None:
        self.model = model
        self.loss_config = loss
        self.task_names, self.task_weights = tuple(task_names), task_weights
        self._plan_columns = _PLAN if model.mesh.expert.size > 1 else ()
        # What no layout of ranks changes comes first.
        self.num_common_sums = len(TERMS) + len(self.task_names) * len(QUANTITIES) * 3
        self.num_sums = self.num_common_sums + len(self._plan_columns) + bool(self._plan_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of `report`."""
        return (
            *TERMS,
            *METRIC_NAMES,
            *self._plan_columns,
            *(f"{task}/{name}" for task in self._told_apart for name in METRIC_NAMES),
        )

    @property
    def _told_apart(self) -> tuple[str, ...]:
        return self.task_names if len(self.task_names) > 1 else ()

    def loss(self, micro_batch: MicroBatch, totals: LabelTotals, *, training: bool) -> MicroLoss:
        """Loss and error sums of a micro-batch, normalised by the totals of the global batch."""
        batch = micro_batch.to(self.model.reference_energies.device)
        prediction = self.predict(batch, totals, training=training)
        terms = force_matching_loss(prediction, batch.labels, batch.graph, totals, self.loss_config, self.task_weights)
        is_first = self.model.mesh.graph.rank == 0
        once = terms.counted_once(self.loss_config, is_first=is_first)
        values = [once.total, once.energy, once.forces, once.stress, once.magmoms]
        errors = error_sums(
            prediction, batch.labels, batch.graph, batch.graph.task, len(self.task_names), is_first=is_first
        )
        return MicroLoss(
            total=terms.total,
            sums=torch.cat([torch.stack(values).detach(), errors.flatten(), self._plan_sums(errors)]),
            num_edges=batch.graph.num_edges,
            num_flops=self._num_flops(batch.graph, totals) if training else 0.0,
        )

    def _num_flops(self, graph: GraphBatch, totals: LabelTotals) -> float:
        """Of the three passes of a training step."""
        forces, stress = self._wanted(totals, training=True)
        counts = Counts(
            structures=graph.num_structures,
            atoms=graph.num_atoms,
            edges=graph.num_edges,
            undirected=graph.num_undirected,
            angles=graph.num_angles,
        )
        magmoms = self.loss_config.magmoms_weight > 0.0 and totals.magmoms_atoms > 0
        derivatives = Derivatives(forces=forces, stress=stress, magmoms=magmoms)
        return float(step_flops(self.model.hyper, counts, derivatives).step)

    def _plan_sums(self, like: torch.Tensor) -> torch.Tensor:
        """Sums of `_PLAN` over the sites of experts, and how many those are; nothing without an expert axis."""
        if not self._plan_columns:
            return like.new_empty(0)
        plans = [site.plan for site in self.model.expert_sites() if site.plan is not None]
        ranks = self.model.mesh.expert.size
        rows = [
            (plan.balance, plan.num_replicas.sum() / ranks, plan.tokens_moved / max(plan.tokens.sum(), 1), 1.0)
            for plan in plans
        ]
        return like.new_tensor(rows).sum(dim=0)

    def predict(self, batch: MicroBatch, totals: LabelTotals, *, training: bool) -> Prediction:
        """What the loss needs, or all that has labels: decided by the global totals, alike on all ranks."""
        forces, stress = self._wanted(totals, training=training)
        return self.model(batch.graph, forces=forces, stress=stress, create_graph=training)

    def _wanted(self, totals: LabelTotals, *, training: bool) -> tuple[bool, bool]:
        """Whether forces and stress are."""
        weights = self.loss_config
        forces = totals.forces_structures > 0 and (weights.forces_weight > 0.0 or not training)
        stress = totals.stress_structures > 0 and (weights.stress_weight > 0.0 or not training)
        return forces, stress

    def identifiers(self, micro_batch: MicroBatch) -> Sequence[str]:
        """`file:frame` of each structure."""
        return micro_batch.identifiers

    def report(self, sums: np.ndarray, num_batches: int) -> dict[str, float]:
        """Mean loss terms (unweighted, except `loss`), overall errors and those of each of several tasks; NaN where
        there are no labels."""
        terms = dict(zip(TERMS, (sums[: len(TERMS)] / num_batches).tolist(), strict=True))
        table = self.error_table(sums)
        of_tasks = {
            f"{task}/{name}": value
            for task, part in zip(self._told_apart, table, strict=False)
            for name, value in metrics(part).items()
        }
        plans = sums[self.num_common_sums :]
        of_plans = dict(zip(self._plan_columns, (plans[:-1] / max(plans[-1:], default=1.0)).tolist(), strict=True))
        return {**terms, **metrics(table.sum(axis=0)), **of_plans, **of_tasks}

    def error_table(self, sums: np.ndarray) -> np.ndarray:
        """(num_tasks, 4, 3) error sums within the vector of all sums."""
        return sums[len(TERMS) : self.num_common_sums].reshape(len(self.task_names), len(QUANTITIES), 3)

    def summary(self, report: Mapping[str, float]) -> str:
        """Loss and errors in a few words."""
        return f"loss {report['loss']:.4g}  {metrics_line(dict(report))}"

    def export(self, directory: Path, state: Mapping[str, torch.Tensor], provenance: Mapping[str, Any]) -> None:
        """Writes a model directory, replacing the one of an earlier step."""
        save_model(self.model, directory, provenance=dict(provenance), overwrite=True, state=state)

    def export_facts(self) -> dict[str, Any]:
        """Entries of `config.json` that say what the model has learned from."""
        model = self.model
        return {
            "elements": [SYMBOLS[number] for number in model.elements],
            "task_elements": {
                task: [SYMBOLS[number] for number in numbers] for task, numbers in model.elements_of_task.items()
            },
            "predicts_magmoms": model.predicts_magmoms,
        }
