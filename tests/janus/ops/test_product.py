"""Products in another number format than that of their operands."""

from __future__ import annotations

import torch
from torch import Tensor

from janus.ops.product import linear


def test_any_order_in_a_lower_format() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 5, 4), (3, 4), (3,))
    )

    def value(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias, dtype=torch.float32).square()

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.nn.functional.linear(x.float(), weight.float()).double() + bias).square()

    found, expected = [], []
    for function, results in ((value, found), (plain, expected)):
        (force,) = torch.autograd.grad(function(x, weight, bias).sum(), x, create_graph=True)
        grads = torch.autograd.grad(force.pow(3).sum(), (x, weight, bias), create_graph=True)
        results += [force, *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight, bias))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


def test_no_converted_weight_is_kept() -> None:
    x, weight = torch.randn(5, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        value = linear(x.square(), weight, dtype=torch.bfloat16).square().sum()
        torch.autograd.grad(value, x, create_graph=True)
    assert sum(saved.data_ptr() == weight.data_ptr() for saved in kept) == 2  # by the product and by its derivative
    assert all(saved.dtype != torch.bfloat16 or saved.numel() != weight.numel() for saved in kept)
