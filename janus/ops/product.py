"""Matrix products in a chosen number format."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None, added in the format of `x`.
        dtype: format of the product's operands (and of the products in its derivatives); None keeps that of `x`.
    Returns:
        (..., out) in the format of `x`.
    """
    if dtype is None or dtype == x.dtype:
        return functional.linear(x, weight, bias)
    product = functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return product if bias is None else product + bias
