"""Expansions of an edge length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from janus.ops.expansion import bessel_expansion, polynomial_envelope
from matris.config import ModelConfig, RadialBasis


class BesselExpansion(nn.Module):
    """b_n(d) = sqrt(2 / rc) sin(w_n d / rc) / d u(d), n = 1..num_radial (arXiv 2003.03123, eq. 7).

    Attributes:
        frequencies: w_n, (num_radial,), initially n pi.
    """

    def __init__(self, num_radial: int, cutoff: float, exponent: int, *, learnable: bool) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.exponent = exponent
        self.frequencies = nn.Parameter(math.pi * torch.arange(1.0, num_radial + 1), requires_grad=learnable)

    def forward(self, length: Tensor) -> Tensor:
        """(E,) Angstrom to (E, num_radial)."""
        return bessel_expansion(length, self.frequencies, cutoff=self.cutoff, exponent=self.exponent)


class GaussianExpansion(nn.Module):
    """exp(-(d - c_n)^2 / (2 w^2)) with centres from 0 to rc and w twice their spacing; times u(d) if `enveloped`."""

    centers: Tensor

    def __init__(self, num_radial: int, cutoff: float, exponent: int, *, enveloped: bool) -> None:
        super().__init__()
        if num_radial < 2:
            raise ValueError(f"model.num_radial is {num_radial}: the Gaussian basis needs at least 2 functions")
        self.cutoff = cutoff
        self.exponent = exponent
        self.enveloped = enveloped
        self.register_buffer("centers", torch.linspace(0.0, cutoff, num_radial), persistent=False)
        self.factor = -0.5 / (2.0 * cutoff / (num_radial - 1)) ** 2

    def forward(self, length: Tensor) -> Tensor:
        """(E,) Angstrom to (E, num_radial)."""
        values = torch.exp(self.factor * (length[:, None] - self.centers) ** 2)
        if not self.enveloped:
            return values
        return values * polynomial_envelope(length, self.cutoff, self.exponent)[:, None]


def build_radial_basis(config: ModelConfig, cutoff: float) -> nn.Module:
    """The radial basis that the configuration names, for one cutoff (Angstrom)."""
    if config.radial_basis is RadialBasis.bessel:
        return BesselExpansion(config.num_radial, cutoff, config.envelope_exponent, learnable=config.learnable_basis)
    # Without an envelope the learnable envelope of the refinement would not vanish at the cutoff.
    return GaussianExpansion(config.num_radial, cutoff, config.envelope_exponent, enveloped=config.smooth_attention)
