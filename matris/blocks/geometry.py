"""Edge vectors and angles of a batch, as differentiable functions of positions and strain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matris.blocks.edges import Rows
from matris.graph.batch import GraphBatch


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Lengths and angles of a batch.

    Attributes:
        length: (U,) lengths of local undirected edges, Angstrom.
        cosine: (A,) cosines of the angles.
    """

    length: Tensor
    cosine: Tensor


def measure(batch: GraphBatch, positions: Tensor, strain: Tensor | None, dtype: torch.dtype, atoms: Rows) -> Geometry:
    """Lengths and cosines, formed in the format of `positions` (float64) and handed on in `dtype`.

    Borrows the positions of other ranks' atoms. A bond between two ranks is measured on both, each for its own uses.

    Args:
        positions: (N, 3) Angstrom, of owned atoms.
        strain: (G, 3, 3) dimensionless, symmetrised here and applied to positions and cell (rows times (1 + strain)),
            or None.
        atoms: rows of the atoms.
    """
    cell = batch.cell
    if strain is not None:
        symmetric = 0.5 * (strain + strain.transpose(1, 2))
        positions = positions + torch.einsum("nx,nxy->ny", positions, symmetric[batch.structure_index])
        cell = cell + cell @ symmetric
    # Only one direction of an undirected edge needs its vector; the other's is the negative.
    first = batch.undirected_edge
    target, source = batch.edge_target[first], batch.edge_source[first]
    image = batch.edge_image[first].to(positions.dtype)
    shift = torch.einsum("ex,exy->ey", image, cell[batch.structure_index[target]])
    vector = positions[target] - atoms.start_borrow(positions).wait()[source] - shift
    length = vector.square().sum(dim=1).sqrt()
    unit = (vector / length[:, None]).to(dtype)
    return Geometry(length=length.to(dtype), cosine=_cosines(batch, unit))


def _cosines(batch: GraphBatch, unit: Tensor) -> Tensor:
    is_first = torch.zeros_like(batch.edge_undirected, dtype=unit.dtype)
    is_first[batch.undirected_edge] = 1.0
    sign = 2 * is_first - 1
    directed = unit[batch.edge_undirected] * sign[:, None]
    a, b = directed.index_select(0, batch.angle_target_edge), directed.index_select(0, batch.angle_source_edge)
    return (a * b).sum(dim=1)
