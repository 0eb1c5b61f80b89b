"""First features of atoms, edges and angles.

Where two linear layers follow each other with nothing between them, their weights are multiplied first: the product
with the few columns of a basis is then the only one that runs over edges or angles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from janus.ops.silu import silu
from matris.basis.angular import build_angular_basis
from matris.blocks.module import Linear, MatRISConfig, MegatronModule, Norm
from matris.config import NormType


class AtomEmbedding(MegatronModule):
    """h_i = SiLU(W table[Z_i - 1])."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        self.table = nn.Parameter(torch.randn(config.model.num_elements, width))
        self.linear = Linear(config, width, width)

    def forward(self, numbers: Tensor) -> Tensor:
        """(N,) atomic numbers to (N, width)."""
        # A row per element first: there are fewer elements than atoms.
        return silu(self.linear(self.table)).index_select(0, numbers - 1)


class EdgeEmbedding(MegatronModule):
    """e_u = SiLU(W3 LayerNorm(W2 W1 basis(d_u))); always a layer norm, whatever `norm_type`."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        self.linear_1 = Linear(config, config.model.num_radial, width)
        self.linear_2 = Linear(config, width, width)
        self.norm = Norm(config, NormType.layer, width)
        self.linear_3 = Linear(config, width, width)

    def forward(self, basis: Tensor) -> Tensor:
        """(E/2, num_radial) to (E/2, width)."""
        weight = self.linear_2.weight @ self.linear_1.weight
        return silu(self.linear_3(self.norm(functional.linear(basis, weight))))


class AngleEmbedding(MegatronModule):
    """t_ab = SiLU(W2 W1 basis(theta_ab))."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        self.basis = build_angular_basis(config.model)
        self.linear_1 = Linear(config, self.basis.num_columns, config.model.hidden_size)
        self.linear_2 = Linear(config, config.model.hidden_size, config.model.hidden_size)

    def forward(self, cosine: Tensor) -> Tensor:
        """(A,) cosines to (A, width)."""
        weight = self.linear_2.weight @ self.linear_1.weight
        return silu(functional.linear(self.basis(cosine), weight))
