"""First features of atoms, edges and angles, and of whole structures.

Where two linear layers follow each other with nothing between them, their weights are multiplied first: the product
with the few columns of a basis is then the only one that runs over edges or angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from janus.comm.adjoint import copy, reduce
from janus.ops.segment import segment_sum
from janus.ops.silu import silu
from matris.basis.angular import build_angular_basis
from matris.blocks.module import MLP, Linear, MatRISConfig, MegatronModule, Norm
from matris.config import NormType
from matris.graph.batch import GraphBatch

MAX_CHARGE = 10
"""Total charges are whole numbers of e up to this, of either sign."""
MAX_SPIN = 20
"""Spin multiplicities are whole numbers up to this; 0 stands for none stated."""


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


class TaskEmbedding(MegatronModule):
    """What a structure is as a whole: c = W MLP([task; charge; spin; composition]), added to the features of its atoms.

    Task, charge and spin multiplicity have a table each; the composition is the mean of a table over the structure's
    atoms, so it is that of any supercell. W begins as zero: a new model predicts what it would without this.
    """

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        hyper, self.graph = config.model, config.mesh.graph
        width = hyper.hidden_size
        self.task = nn.Parameter(torch.randn(len(hyper.tasks), width))
        self.charge = nn.Parameter(torch.randn(2 * MAX_CHARGE + 1, width))
        self.spin = nn.Parameter(torch.randn(MAX_SPIN + 1, width))
        self.element = nn.Parameter(torch.randn(hyper.num_elements, width))
        self.mlp = MLP(config, (4 * width, width, width), bias=True)
        self.linear = Linear(config, width, width)
        nn.init.zeros_(self.linear.weight)

    def forward(self, batch: GraphBatch) -> Tensor:
        """(G, width); over a graph axis of the whole structures, on all of its ranks."""
        charge = batch.charge.nan_to_num().long() + MAX_CHARGE  # not stated: as neutral
        atoms = self.element.index_select(0, batch.numbers - 1)
        total = reduce(segment_sum(atoms, batch.structure_index, batch.num_structures), self.graph)
        # What follows is the same on all ranks, for the atoms of each.
        composition = copy(total, self.graph) / batch.atoms_per_structure[:, None]
        parts = (self.task[batch.task], self.charge[charge], self.spin[batch.spin.long()], composition)
        return self.linear(silu(self.mlp(torch.cat(parts, dim=1))))


def check_charge_and_spin(charge: float, spin: float) -> None:
    """Refuses what `TaskEmbedding` has no entry for.

    Raises:
        ValueError: a charge or a spin multiplicity that is no whole number, or too large.
    """
    if not math.isnan(charge) and not (float(charge).is_integer() and abs(charge) <= MAX_CHARGE):
        raise ValueError(f"total charge is {charge:g} e: whole numbers from {-MAX_CHARGE} to {MAX_CHARGE} are known")
    if not (float(spin).is_integer() and 0 <= spin <= MAX_SPIN):
        raise ValueError(
            f"spin multiplicity is {spin:g}: whole numbers from 1 (a singlet) to {MAX_SPIN} are known, and 0 for none "
            "stated"
        )


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
