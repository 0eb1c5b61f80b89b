"""Blocks as operations with four passes, against the same blocks left to autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from janus.blockwise.again import MadeAgain
from janus.blockwise.function import Tensors, run_block
from janus.blockwise.weights import Weights

Run = Callable[[Tensors, Sequence[Tensor]], Tensors]


def block(x: Tensors, w: Tensors) -> Tensors:
    """Two inputs and outputs, the second without a product."""
    rows, scale = x
    hidden = functional.silu(rows @ w[0] + scale * w[1])
    return torch.tanh(hidden @ w[2]), (hidden * hidden).mean(1, keepdim=True) * scale


def made_again(x: Tensors, w: Sequence[Tensor]) -> Tensors:
    return run_block(MadeAgain(function=block, recompute_bytes=None), x, w)


def left_to_autograd(x: Tensors, w: Sequence[Tensor]) -> Tensors:
    return block(x, tuple(w))


def derivatives(run: Run, order: int) -> list[Tensor]:
    """Energy, forces, gradients of each kind of loss for weights and positions, up to the order of derivative."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()

    layers = [(random(3, 3), random(3), random(3, 3)) for _ in range(3)]
    weights = [weight for layer in layers for weight in layer]
    positions = random(5, 3)
    rows, scale = positions.sin(), positions.cos().sum(1, keepdim=True)
    for layer in layers:
        rows, scale = run((rows, scale), layer)
    energy = rows.sum() + (scale * scale).sum()
    (forces,) = torch.autograd.grad(energy, positions, create_graph=True)
    found = [energy, forces]

    def differentiate(value: Tensor, inputs: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(value, inputs, retain_graph=True, **options)
        found.extend(grads)
        return grads

    differentiate(energy, weights)
    differentiate(forces.abs().sum(), weights)
    differentiate(forces.square().sum() + energy, [positions, *weights])
    differentiate(forces.square().sum(), [positions])  # a product with the Hessian: no weight gradient is wanted
    differentiate(energy, [*weights, positions])  # nothing is left over from the passes before
    if order > 2:
        for inputs in (weights, [positions]):
            second = differentiate(forces.square().sum(), inputs, create_graph=True)
            differentiate(sum((grad.square().sum() for grad in second), torch.zeros(())), [positions, *weights])
    return [value.detach() for value in found]


@pytest.mark.parametrize("order", [2, 3])
def test_made_again_equals_autograd(order: int) -> None:
    for ours, expected in zip(derivatives(made_again, order), derivatives(left_to_autograd, order), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_forces_alone() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    w = [torch.full(shape, 0.3, dtype=torch.float64) for shape in ((3, 3), (3,), (3, 3))]
    scale = torch.ones(2, 1, dtype=torch.float64)
    found = [torch.autograd.grad(run((x, scale), w)[0].sum(), x)[0] for run in (made_again, left_to_autograd)]
    torch.testing.assert_close(*found, rtol=1e-13, atol=0.0)
    with torch.no_grad():
        assert not made_again((x, scale), w)[0].requires_grad


def test_only_inputs_and_what_arrives_is_saved() -> None:
    saved: list[int] = []
    x = torch.zeros(7, 3, requires_grad=True), torch.ones(7, 1, requires_grad=True)
    w = [
        torch.zeros(3, 3, requires_grad=True),
        torch.zeros(3, requires_grad=True),
        torch.zeros(3, 3, requires_grad=True),
    ]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.numel()) or value, lambda value: value
    ):
        made_again(x, w)
        assert sum(saved) == 7 * 3 + 7 + 9 + 3 + 9 + 1  # inputs, weights, ticket


def test_lent_weights() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    weights = Weights(layer)
    own, x = weights.current(), torch.ones(1, 2)
    before = layer(x)
    with weights.given([torch.ones_like(value) for value in own]):
        assert layer(x).item() == 6.0
        with weights.given([torch.zeros_like(value) for value in own]):
            assert layer(x).item() == 0.0
        assert layer(x).item() == 6.0
    assert torch.equal(layer(x), before)
    assert all(one is two for one, two in zip(weights.current(), own, strict=True))
