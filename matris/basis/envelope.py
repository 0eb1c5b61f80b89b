"""The polynomial envelope that takes every edge smoothly to zero at the cutoff."""

from __future__ import annotations

import torch
from torch import Tensor


def polynomial_envelope(length: Tensor, cutoff: float, exponent: int) -> Tensor:
    """u(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2) with x = length / cutoff; 0 beyond.

    Evaluated as (1-x)^3 sum_{k<p} (k+1)(k+2)/2 x^k, which keeps its relative precision near the cutoff. u has two
    continuous derivatives there. Source: Gasteiger et al., arXiv 2003.03123, eq. 8.

    Args:
        length: (E,) Angstrom.
        cutoff: Angstrom.
        exponent: p >= 1.
    Returns:
        (E,)
    """
    x = (length / cutoff).clamp(max=1.0)
    series = torch.zeros_like(x)
    for k in reversed(range(exponent)):
        series = series * x + (k + 1) * (k + 2) / 2
    return (1 - x) ** 3 * series
