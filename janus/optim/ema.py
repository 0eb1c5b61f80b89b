"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averaged copy of trainable parameters, by name.

    After update k = 1, 2, ... the average moves by 1 - min(decay, (1 + k) / (10 + k)) towards the weights: an early
    average forgets the random start quickly.

    Attributes:
        average: name -> averaged parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay is {decay}: it must be in [0, 1); 0 follows the weights exactly")
        self.decay = decay
        self._parameters = {name: value for name, value in parameters.items() if value.requires_grad}
        self.average: dict[str, Tensor] = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Moves towards the weights after the optimizer's update number `num_updates` (1, 2, ...)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1.0 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """The averages are the parameters as they are now."""
        for name, value in self.average.items():
            value.copy_(self._parameters[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters have the averaged values inside of the block, and their own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
