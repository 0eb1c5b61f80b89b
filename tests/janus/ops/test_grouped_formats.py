"""Grouped products in a lower format than that of their operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from janus.ops.grouped import grouped_linear


def through_a_step(rows: Tensor, weight: Tensor, counts: Tensor, product) -> list[Tensor]:
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    (force,) = torch.autograd.grad(product(rows, weight, counts).square().sum(), rows, create_graph=True)
    return [force, *torch.autograd.grad(force.square().sum(), (rows, weight))]


def by_group(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = zip(rows.bfloat16().split(counts.tolist()), weight.bfloat16(), strict=True)
    return torch.cat([part @ matrix.t() for part, matrix in parts]).float()


@pytest.mark.parametrize("widths", [(8, 16), (6, 16), (8, 5)], ids=["fits", "odd outputs", "odd inputs"])
def test_second_derivative_in_bf16(widths: tuple[int, int]) -> None:
    """Also for matrices that torch's grouped product does not take."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5])
    rows, weight = torch.randn(8, widths[1], generator=generator), torch.randn(3, *widths, generator=generator)

    def ours(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(rows, weight, counts, dtype=torch.bfloat16)

    expected = through_a_step(rows, weight, counts, by_group)
    for found, wanted in zip(through_a_step(rows, weight, counts, ours), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.detach().abs().max()))
    assert expected[2][1].eq(0).all()


def test_no_converted_weight_is_kept() -> None:
    rows, weight = torch.randn(8, 16).requires_grad_(), torch.randn(2, 8, 16).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        grouped_linear(rows, weight, torch.tensor([4, 4]), dtype=torch.bfloat16)
    assert any(saved.data_ptr() == weight.data_ptr() for saved in kept)
    assert all(saved.dtype != torch.bfloat16 or saved.numel() != weight.numel() for saved in kept)


def test_fp32_matrices_of_any_width() -> None:
    rows, weight, counts = torch.randn(5, 6), torch.randn(2, 3, 6), torch.tensor([2, 3])
    expected = torch.cat([rows[:2] @ weight[0].t(), rows[2:] @ weight[1].t()])
    torch.testing.assert_close(grouped_linear(rows, weight, counts), expected)
