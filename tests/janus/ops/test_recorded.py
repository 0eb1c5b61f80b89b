"""Recorded derivatives where inputs depend on each other, as they do inside of a model."""

import torch

from janus.ops.gated_norm import gated_norm, plain_gated_norm


def test_third_order_through_inputs_that_depend_on_each_other():
    """What arrives at an operation in a backward pass depends on its inputs; only the direct way is the operation's."""
    found = []
    for function in (gated_norm, plain_gated_norm):
        generator = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in ((4, 3), (2, 3))
        )
        y = function(
            x.sin(), function(x, x.cos(), weight, None, eps=1e-5, center=True), weight, None, eps=1e-5, center=True
        )
        scalar = (y * y).sum()
        for _ in range(3):
            grads = torch.autograd.grad(scalar, [x, weight], create_graph=True)
            scalar = sum((grad * grad).sum() for grad in grads)
        found.append(grads)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
