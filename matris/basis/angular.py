"""Expansions of an angle, given by its cosine."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from janus.ops.expansion import fourier_expansion
from matris.config import AngularBasis, ModelConfig

_COSINE_SCALE = 1.0 - 1e-6
"""Keeps acos differentiable for straight angles; part of the released models."""


class FourierExpansion(nn.Module):
    """[1/sqrt 2, sin(f_k theta), cos(f_k theta)] / sqrt pi, k = 1..K.

    Attributes:
        frequencies: f_k, (K,), initially k.
    """

    def __init__(self, num_angular: int, *, learnable: bool) -> None:
        super().__init__()
        self.num_columns = num_angular
        self.frequencies = nn.Parameter(torch.arange(1.0, (num_angular - 1) // 2 + 1), requires_grad=learnable)

    def forward(self, cosine: Tensor) -> Tensor:
        """(A,) to (A, num_columns)."""
        return fourier_expansion(cosine, self.frequencies, scale=_COSINE_SCALE)


class SphericalExpansion(nn.Module):
    """Y_l0(cos theta) times a radial factor R_ln evaluated at the constant length 1 / rc, l and n = 0..degree-1.

    R_ln(x) = sqrt(2 / rc^3) j_l(z_ln x) / |j_{l+1}(z_ln)|, z_ln the n-th zero of the spherical Bessel function j_l.
    The radial argument is constant in the reference package, so only `degree` columns are independent; kept because
    released weights need it.
    """

    radial: Tensor

    def __init__(self, degree: int, cutoff: float) -> None:
        super().__init__()
        self.degree = degree
        self.num_columns = degree * degree
        self.register_buffer("radial", torch.from_numpy(_radial_factors(degree, cutoff)).float(), persistent=False)

    def forward(self, cosine: Tensor) -> Tensor:
        """(A,) to (A, degree^2), column l * degree + n."""
        x = _COSINE_SCALE * cosine
        legendre = [torch.ones_like(x), x]
        for degree in range(2, self.degree):
            legendre.append(((2 * degree - 1) * x * legendre[-1] - (degree - 1) * legendre[-2]) / degree)
        columns = [
            math.sqrt((2 * degree + 1) / (4 * math.pi)) * legendre[degree][:, None] * self.radial[degree]
            for degree in range(self.degree)
        ]
        return torch.cat(columns, dim=1)


def build_angular_basis(config: ModelConfig) -> FourierExpansion | SphericalExpansion:
    """The angular basis that the configuration names."""
    if config.angular_basis is AngularBasis.fourier:
        return FourierExpansion(config.num_angular, learnable=config.learnable_basis)
    return SphericalExpansion(config.spherical_degree, config.pairwise_cutoff)


def _spherical_bessel(degree: int, x: np.ndarray) -> np.ndarray:
    """j_degree(x) by upward recurrence, accurate for x of order one and above and small degrees."""
    previous, value = np.cos(x) / x, np.sin(x) / x
    for order in range(degree):
        previous, value = value, (2 * order + 1) / x * value - previous
    return value


def _radial_factors(degree: int, cutoff: float) -> np.ndarray:
    """R_ln(1 / cutoff) of `SphericalExpansion`, (degree, degree)."""
    zeros = np.pi * np.arange(1.0, 2 * degree + 1)
    factors = []
    for order in range(degree):
        if order:
            # The zeros of j_l separate those of j_{l+1}: bisect between neighbours.
            low, high = zeros[:-1], zeros[1:]
            sign = np.sign(_spherical_bessel(order, low))
            for _ in range(60):
                middle = (low + high) / 2
                left = np.sign(_spherical_bessel(order, middle)) == sign
                low, high = np.where(left, middle, low), np.where(left, high, middle)
            zeros = (low + high) / 2
        z = zeros[:degree]
        factors.append(_spherical_bessel(order, z / cutoff) / np.abs(_spherical_bessel(order + 1, z)))
    return math.sqrt(2.0 / cutoff**3) * np.stack(factors)
