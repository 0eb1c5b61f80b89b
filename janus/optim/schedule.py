"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class DecayStyle(str, Enum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    wsd = "WSD"
    constant = "constant"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a decay.

    `cosine`: half a cosine from `lr` to `min_lr` over the remaining steps. `WSD` (warm-up, stable, decay,
    arXiv 2405.18392): `lr`, then `min_lr + (lr - min_lr) (1 - sqrt(x))` over the last `decay_steps`. `constant`: `lr`.

    Attributes:
        lr: largest learning rate.
        min_lr: learning rate at the end.
        warmup_steps: step k < warmup_steps uses lr (k + 1) / (warmup_steps + 1).
        decay_steps: length of WSD's decay.
        num_steps: steps of the whole run; later steps use `min_lr` (`lr` if constant).

    Raises:
        ValueError: rates or lengths out of range.
    """

    lr: float
    num_steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    style: DecayStyle = DecayStyle.cosine

    def __post_init__(self) -> None:
        if not (self.lr > 0.0 and 0.0 <= self.min_lr <= self.lr):
            raise ValueError(f"learning rates lr {self.lr} and min_lr {self.min_lr}: need 0 <= min_lr <= lr and lr > 0")
        decay_steps = self.decay_steps if self.style is DecayStyle.wsd else 0
        if self.warmup_steps < 0 or decay_steps < 0 or self.warmup_steps + decay_steps > self.num_steps:
            raise ValueError(
                f"warm-up of {self.warmup_steps} steps and decay of {decay_steps} steps do not fit into a run of "
                f"{self.num_steps} steps: shorten them or train longer"
            )

    def rate(self, step: int) -> float:
        """Learning rate of the update that turns the state after `step` updates into the next, step = 0, 1, ..."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.style is DecayStyle.constant:
            return self.lr
        start = self.warmup_steps if self.style is DecayStyle.cosine else self.num_steps - self.decay_steps
        if step < start:
            return self.lr
        if step >= self.num_steps:
            return self.min_lr
        progress = (step - start) / (self.num_steps - start)
        cosine = self.style is DecayStyle.cosine
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if cosine else 1.0 - math.sqrt(progress)
        return self.min_lr + (self.lr - self.min_lr) * share
