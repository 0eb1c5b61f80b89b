"""Results that are made again in backward passes: the same bits, nothing kept, and refusals where bits would differ."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from janus.ops.recompute import recomputable, recomputing, saving
from janus.ops.segment import gather_rows, segment_sum
from janus.ops.silu import silu


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def doubled(x: Tensor) -> Tensor:
    return recomputable(2 * x, lambda x: 2 * x, x)


def network(x: Tensor, w: Tensor) -> Tensor:
    """Halves of a result, results of results, and rows gathered in the recorded backward pass."""
    index = torch.tensor([0, 2, 2, 1, 0])
    left, right = silu(gather_rows(x, index) @ w).split(2, dim=1)
    rows = silu(doubled(left)) * right
    return segment_sum(rows, index, 3).square().sum()


def second_gradient(function: Callable[[Tensor, Tensor], Tensor], *, enabled: bool) -> tuple[Tensor, ...]:
    x, w = rand(3, 4, seed=1), rand(4, 4, seed=2)
    with recomputing(0 if enabled else None):
        (force,) = torch.autograd.grad(function(x, w), x, create_graph=True)
    return force, *torch.autograd.grad(force.square().sum(), (x, w))


def test_every_derivative_has_the_same_bits() -> None:
    for ours, plain in zip(
        second_gradient(network, enabled=True), second_gradient(network, enabled=False), strict=True
    ):
        assert torch.equal(ours, plain)


def test_result_is_not_kept() -> None:
    x, w = rand(3, 4), rand(4, 4)

    def is_kept(enabled: bool) -> bool:
        with recomputing(0 if enabled else None):
            hidden = silu(x @ w)
            storage = StorageWeakRef(hidden.untyped_storage())
            out = hidden @ w
            del hidden
            gc.collect()
            kept = not storage.expired()
        out.sum().backward()
        return kept

    assert is_kept(False)
    assert not is_kept(True)


def test_a_small_result_is_kept() -> None:
    x, w = rand(3, 4), rand(4, 4)
    for at_least, kept in ((96, False), (97, True)):
        with recomputing(at_least):
            hidden = silu(x @ w)  # 12 numbers
            storage = StorageWeakRef(hidden.untyped_storage())
            out = hidden @ w
            del hidden
        assert storage.expired() != kept
        assert out.requires_grad


def test_a_result_that_was_changed_is_kept_as_it_is() -> None:
    def changing(x: Tensor, w: Tensor) -> Tensor:
        return silu((doubled(x).add_(1.0) @ w).square()).sum()

    found, expected = (second_gradient(changing, enabled=enabled) for enabled in (True, False))
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)


def test_an_input_that_was_changed_is_refused() -> None:
    x, w = rand(3, 4), rand(4, 4)
    with recomputing(0):
        before = x * 1.0
        out = doubled(before) @ w
        with torch.no_grad():
            before.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_another_memory_layout_is_refused() -> None:
    x, w = rand(4, 4), rand(4, 4)
    with recomputing(0):
        out = recomputable(2 * x, lambda x: (2 * x).t().contiguous().t(), x) @ w
    with pytest.raises(RuntimeError, match="strides"):
        out.sum().backward()


def test_other_hooks_see_what_is_kept() -> None:
    """Sharded weights (`janus.sharding`) are recognised as they are saved, also as an input of a recipe."""
    x, w = rand(3, 4, seed=1), rand(4, 4, seed=2)
    seen: list[int] = []

    def pack(saved: Tensor) -> Any:
        is_weight = saved.untyped_storage()._cdata == w.untyped_storage()._cdata
        return (saved.shape, saved.stride()) if is_weight else saved

    def unpack(saved: Any) -> Tensor:
        seen.append(1)
        return w.detach().as_strided(*saved)

    with saving(pack, unpack), recomputing(0):
        product = recomputable(x @ w, torch.mm, x, w)
        (force,) = torch.autograd.grad(product.square().sum(), x, create_graph=True)
    found = torch.autograd.grad(force.square().sum(), (x, w))
    assert seen
    (force,) = torch.autograd.grad((x @ w).square().sum(), x, create_graph=True)
    for ours, plain in zip(found, torch.autograd.grad(force.square().sum(), (x, w)), strict=True):
        assert torch.equal(ours, plain)
