"""Saving how a tensor was made instead of the tensor, for backward passes of any order.

Activation checkpointing runs a part of the forward pass again inside of each backward pass. Where a force pass is
recorded, that recorded part is recorded again, for little gain. Here the recorded operations stay as they are, and with
them every derivative; what changes is what they keep. An operation that is cheap beside a matrix product says how its
result is made (`recomputable`), in the forward pass and in the recorded force pass alike; inside of `recomputing`
autograd then saves that recipe where it would have saved the result, and makes the result again, with the same bits,
when a backward pass wants it. The inputs of a recipe are what the operation's own derivative needs anyway, or recipes
themselves, so nothing more is kept for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, ...])
Pack: TypeAlias = Callable[[Tensor], Any]
Unpack: TypeAlias = Callable[[Any], Tensor]


class _Current:
    """What holds for the operations that run now: one choice per process, as backward passes run in other threads."""

    recomputation: _Recomputation | None = None
    pack: Pack | None = None
    unpack: Unpack | None = None


@contextmanager
def saving(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """As torch's `saved_tensors_hooks`, of which only the innermost count; these also count inside of `recomputing`."""
    before = _Current.pack, _Current.unpack
    _Current.pack, _Current.unpack = pack, unpack
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _Current.pack, _Current.unpack = before


@contextmanager
def recomputing(at_least: int | None) -> Iterator[None]:
    """Inside, results that are `recomputable` are not saved by what is recorded; its backward passes may run outside.

    Args:
        at_least: bytes of a result; a smaller one is kept. None changes nothing.
    """
    if at_least is None:
        yield
        return
    before, recomputation = _Current.recomputation, _Recomputation(at_least, _Current.pack, _Current.unpack)
    _Current.recomputation = recomputation
    try:
        with torch.autograd.graph.saved_tensors_hooks(recomputation.pack, recomputation.unpack):
            yield
    finally:
        _Current.recomputation = before


@contextmanager
def saving_plainly() -> Iterator[None]:
    """Inside, tensors are saved as they are, whatever `recomputing` and `saving` are around."""
    before, _Current.recomputation = _Current.recomputation, None
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            yield
    finally:
        _Current.recomputation = before


def recomputed_size() -> int | None:
    """`at_least` of the innermost `recomputing`; None outside."""
    return None if _Current.recomputation is None else _Current.recomputation.at_least


def recomputable(outputs: Outputs, function: Callable[..., Outputs], *inputs: Tensor | None) -> Outputs:
    """The outputs, known from now on as what `function` makes of `inputs`.

    Args:
        outputs: new tensors, none of them a view.
        function: gives them again, bit by bit and in the same memory layout; runs without being recorded, and must not
            change its inputs.
        inputs: must not be changed in place later.
    """
    if _Current.recomputation is not None and torch.is_grad_enabled():
        _Current.recomputation.know(outputs, function, inputs)
    return outputs


_RECIPE = "janus_recipe"
"""Name of the attribute of a storage."""
_RECENT = 2
"""Results that are held after they were made again, for neighbouring operations want the same ones. At 8, a step makes
1 % less again and needs 5 % more memory."""


@dataclass(frozen=True, slots=True, eq=False)
class _Recipe:
    """How tensors are made.

    Attributes:
        inputs: as `_Recomputation.pack` keeps them.
        strides: of each output.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    strides: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A view of one of a recipe's outputs."""

    recipe: _Recipe
    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor, and how often it had been changed in place when it was saved."""

    tensor: Tensor
    version: int


class _Recomputation:
    """The hooks of one `recomputing`.

    A storage carries its recipe as an attribute of its Python object, which lives as long as the storage does.
    """

    def __init__(self, at_least: int, pack: Pack | None, unpack: Unpack | None) -> None:
        self.at_least, self._pack, self._unpack = at_least, pack, unpack
        self._recent: OrderedDict[_Recipe, tuple[Tensor, ...]] = OrderedDict()

    def know(self, outputs: Tensor | tuple[Tensor, ...], function: Callable[..., Any], inputs: tuple) -> None:
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        if results[0].nbytes < self.at_least:
            return
        packed = tuple(None if value is None else self.pack(value) for value in inputs)
        self._mark(_Recipe(function, packed, tuple(result.stride() for result in results)), results)

    def _mark(self, recipe: _Recipe, results: tuple[Tensor, ...]) -> None:
        for number, result in enumerate(results):
            result.untyped_storage().__dict__[_RECIPE] = (recipe, number, result._version)

    def pack(self, saved: Tensor) -> Any:
        recipe, number, version = saved.untyped_storage().__dict__.get(_RECIPE, (None, 0, 0))
        if recipe is not None and saved._version == version:
            return _Place(recipe, number, saved.shape, saved.stride(), int(saved.storage_offset()))
        if self._pack is not None and not isinstance(packed := self._pack(saved), Tensor):
            return packed
        return _Kept(saved.detach(), saved._version)

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Kept):
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(saved.tensor.shape)} that a backward pass needs was changed in place "
                    "after it had been saved"
                )
            return saved.tensor
        if not isinstance(saved, _Place):
            assert self._unpack is not None
            return self._unpack(saved)
        whole = self._follow(saved.recipe)[saved.number]
        if whole.shape == saved.shape and whole.stride() == saved.stride and saved.offset == 0:
            return whole
        return whole.as_strided(saved.shape, saved.stride, saved.offset)

    def _follow(self, recipe: _Recipe) -> tuple[Tensor, ...]:
        if (recent := self._recent.get(recipe)) is not None:
            return recent
        inputs = [None if value is None else self.unpack(value) for value in recipe.inputs]
        with torch.no_grad():
            made = recipe.function(*inputs)
        results = made if isinstance(made, tuple) else (made,)
        found = tuple(result.stride() for result in results)
        if found != recipe.strides:
            raise RuntimeError(f"results made again have strides {found}, and had {recipe.strides} at first")
        if torch.is_grad_enabled():  # a recorded pass may save them in turn
            self._mark(recipe, results)
        self._recent[recipe] = results
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return results
