"""What the trainer must know about a model and its data: all chemistry lies behind these names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class MicroLoss:
    """One micro-batch's share of the loss of a batch.

    Attributes:
        total: scalar to differentiate, divided by the totals of the global batch; the gradients of all micro-batches
            of all ranks add up to that of its loss. So do the values, except where several ranks know the same term.
        sums: (Task.num_sums,) float64, detached: whatever adds up over micro-batches and ranks (loss terms, error
            sums and their counts; what several ranks know is counted by one); `Task.report` reads it.
        num_edges: edges computed, for the throughput.
        num_flops: of the matrix products, in all passes of a step, by formula; 0 where the task does not know.
    """

    total: Tensor
    sums: Tensor
    num_edges: int
    num_flops: float = 0.0


class Task(Protocol):
    """A model with its loss.

    Attributes:
        model: the same logical weights on every rank.
        num_sums: length of `MicroLoss.sums`.
        columns: names that `report` can return; among them `loss`.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def num_sums(self) -> int: ...
    @property
    def columns(self) -> tuple[str, ...]: ...

    def loss(self, micro_batch: Any, totals: Any, *, training: bool) -> MicroLoss:
        """Loss and error sums; with `training`, `total` can be differentiated by the weights."""

    def identifiers(self, micro_batch: Any) -> Sequence[str]:
        """Names of the records in a micro-batch, for messages."""

    def report(self, sums: np.ndarray, num_batches: int) -> dict[str, float]:
        """Readable values of sums over `num_batches` batches: mean loss and errors, with units in their names."""

    def summary(self, report: Mapping[str, float]) -> str:
        """A few words about a report, for the progress bar."""

    def export(self, directory: Path, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
        """Writes the model for use, atomically. Called on rank 0 alone, with the whole state dict."""

    def export_facts(self) -> Mapping[str, Any]:
        """What an exported model says of itself beside weights and hyper-parameters, JSON-ready; kept in checkpoints,
        so that models can be made of them."""


class Batch(Protocol):
    """This rank's part of a step's global batch.

    Attributes:
        step: 0, 1, ...
        indices: records of the global batch, the same on all ranks.
        micro_batches: this rank's share; may be empty.
    """

    @property
    def step(self) -> int: ...
    @property
    def indices(self) -> np.ndarray: ...
    @property
    def micro_batches(self) -> Sequence[Any]: ...


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Training batches.

    Attributes:
        batches: step -> iterator over the batches of that step and all later ones. What it yields for a step depends
            on nothing but the step, so that a resumed run continues the data exactly.
        totals: denominators of the loss of a global batch, from its indices.
        facts: what `batches` depends on and a clock has decided, JSON-ready; kept in checkpoints.
        restore: takes the facts of a checkpoint, None where it has none.
    """

    batches: Callable[[int], Iterable[Batch]]
    totals: Callable[[np.ndarray], Any]
    facts: Callable[[], Any] = lambda: None
    restore: Callable[[Any], None] = lambda facts: None


@dataclass(frozen=True, kw_only=True)
class EvaluationSource:
    """A set to evaluate on: every record on exactly one rank, exactly once.

    Attributes:
        micro_batches: yields this rank's share; may be empty.
        totals: denominators of the loss over the whole set.
    """

    micro_batches: Callable[[], Iterable[Any]]
    totals: Any
