"""The weights of modules as arguments of a function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

_ABSENT = object()


class Weights:
    """Where parameters of modules are read: lists them as they are when these run, and lends others.

    To be made before the parameters are shared out: `janus.sharding` takes them from the modules and puts gathered ones
    in their places while they run.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._places = [
            (owner, attribute)
            for module in modules
            for owner in module.modules()
            for attribute, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def current(self) -> tuple[Tensor, ...]:
        """All of them, in a fixed order."""
        return tuple(getattr(owner, attribute) for owner, attribute in self._places)

    @contextmanager
    def given(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules read these."""
        # An instance's own dictionary comes before the parameters of a module.
        before = [owner.__dict__.get(attribute, _ABSENT) for owner, attribute in self._places]
        for (owner, attribute), weight in zip(self._places, weights, strict=True):
            owner.__dict__[attribute] = weight
        try:
            yield
        finally:
            for (owner, attribute), value in zip(self._places, before, strict=True):
                if value is _ABSENT:
                    owner.__dict__.pop(attribute, None)
                else:
                    owner.__dict__[attribute] = value
