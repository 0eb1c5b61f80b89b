"""Matrix-product FLOPs of a training step, exactly, from hyper-parameters and the counts of a batch.

A product y = x W^T of n rows costs 2 n inputs outputs each time it runs, and a step runs it up to six times:

    forward pass                 y = x W^T
    force pass                   g_x = g_y W                      if x depends on the positions
    second backward, of forward  h_x = h_y W, h_W = h_y^T x       the first if weights lie before x
    second backward, of force    h_g = v W^T, h_W = g_y^T v       the first if g_y depends on weights; v is for g_x

So a step costs six forward passes but for inputs that are the same wherever the atoms are (the first block's atoms),
inputs before which nothing is trained (fixed bases), and the energy's last layer, whose g_y is constant. Recomputation
runs no product again. `tests/matris/test_cost.py` counts what torch runs and finds the same numbers.

Counted are the rows that a rank owns, as one process would compute them: rows that it borrows, and a tensor axis,
change nothing. Sums over channels that happen to be written as products with a vector are no matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from matris.config import AngularBasis, ModelConfig, RadialBasis


class Part(Enum):
    """Parts of a step that have products."""

    geometry = "geometry"
    embedding = "embedding"
    line_attention = "line attention"
    atom_attention = "atom attention"
    line_refinement = "line refinement"
    atom_refinement = "atom refinement"
    readout = "readout"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sizes of a batch; of a part of one, over a graph axis, its owned rows.

    Attributes:
        structures, atoms: numbers of them.
        edges: directed edges of the atom graph.
        undirected: undirected edges.
        angles: directed edges of the line graph.
    """

    structures: int
    atoms: int
    edges: int
    undirected: int
    angles: int


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """What a step differentiates for; the loss has the energies, and all of these.

    Attributes:
        forces, stress: derivatives that are computed.
        magmoms: whether the head for magnetic moments is trained. It is computed in any case.
    """

    forces: bool = True
    stress: bool = True
    magmoms: bool = False

    @property
    def any(self) -> bool:
        """Whether there is a force pass."""
        return self.forces or self.stress


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of the three passes of a step.

    Attributes:
        forward: energies and magnetic moments.
        force: derivatives of the energies for positions and strain.
        second: derivatives of the loss for the weights.
    """

    forward: int = 0
    force: int = 0
    second: int = 0

    @property
    def step(self) -> int:
        """Of all three."""
        return self.forward + self.force + self.second

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            forward=self.forward + other.forward, force=self.force + other.force, second=self.second + other.second
        )


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows by a weight matrix.

    Attributes:
        part: where it is.
        rows, inputs, outputs: (rows, inputs) to (rows, outputs).
        times: how many of the kind there are.
        moves: whether the input depends on the positions.
        after_weights: whether anything trained lies before the input.
        is_last: whether the energy is a sum of its outputs.
        of_energy: whether the energy depends on it.
        trained: whether the loss depends on it.
    """

    part: Part
    rows: int
    inputs: int
    outputs: int
    times: int = 1
    moves: bool = True
    after_weights: bool = True
    is_last: bool = False
    of_energy: bool = True
    trained: bool = True

    def flops(self, *, force_pass: bool) -> Flops:
        """Of a step with or without a force pass; see the head of this module."""
        once = 2 * self.times * self.rows * self.inputs * self.outputs
        differentiated = force_pass and self.of_energy and self.moves
        second = int(self.trained) * (1 + self.after_weights) + int(differentiated) * (1 + (not self.is_last))
        return Flops(forward=once, force=once * differentiated, second=once * second)


def step_flops(config: ModelConfig, counts: Counts, derivatives: Derivatives) -> Flops:
    """Of one micro-batch."""
    return sum(flops_by_part(config, counts, derivatives).values(), Flops())


def flops_by_part(config: ModelConfig, counts: Counts, derivatives: Derivatives) -> dict[Part, Flops]:
    """Of one micro-batch, every part."""
    found = dict.fromkeys(Part, Flops())
    found[Part.geometry] = _geometry(counts, derivatives)
    for product in products(config, counts, magmoms=derivatives.magmoms):
        found[product.part] += product.flops(force_pass=derivatives.any)
    return found


def products(config: ModelConfig, counts: Counts, *, magmoms: bool = False) -> Iterator[Product]:
    """All of a forward pass."""
    last = config.num_layers - 1
    yield from _embedding(config, counts)
    yield from _block(config, counts, is_first=True, is_last=last == 0)
    for product in _block(config, counts, is_first=False, is_last=False) if last > 1 else ():
        yield replace(product, times=product.times * (last - 1))
    if last > 0:
        yield from _block(config, counts, is_first=False, is_last=True)
    yield from _readout(config, counts, magmoms=magmoms)


def _geometry(counts: Counts, derivatives: Derivatives) -> Flops:
    """Rows times 3 x 3 matrices, in float64: positions and cell by the strain, images by the cell.

    Neither factor is a weight, so the second backward pass only takes the derivatives of the force pass.
    """
    if not derivatives.stress:
        return Flops(forward=18 * counts.undirected)
    positions, cell, images = 18 * counts.atoms, 54 * counts.structures, 18 * counts.undirected
    for_strain = positions + cell + images
    force = for_strain + positions * derivatives.forces
    return Flops(forward=for_strain, force=force, second=force)


def _embedding(config: ModelConfig, counts: Counts) -> Iterator[Product]:
    width, columns = config.hidden_size, config.num_radial
    angular = config.num_angular if config.angular_basis is AngularBasis.fourier else config.spherical_degree**2
    part = Part.embedding
    yield Product(part=part, rows=config.num_elements, inputs=width, outputs=width, moves=False)
    if config.tasks:
        yield Product(part=part, rows=counts.structures, inputs=4 * width, outputs=width, moves=False)
        yield Product(part=part, rows=counts.structures, inputs=width, outputs=width, times=2, moves=False)
    # Two layers in a row become one, by the product of their weights.
    yield Product(part=part, rows=width, inputs=width, outputs=columns, moves=False)
    yield Product(part=part, rows=width, inputs=width, outputs=angular, moves=False)
    yield _of_radial_basis(config, counts, part)
    yield Product(part=part, rows=counts.undirected, inputs=width, outputs=width)
    trained = config.learnable_basis and config.angular_basis is AngularBasis.fourier
    yield Product(part=part, rows=counts.angles, inputs=angular, outputs=width, after_weights=trained)


def _block(config: ModelConfig, counts: Counts, *, is_first: bool, is_last: bool) -> Iterator[Product]:
    width, layer = config.hidden_size, 2 * config.hidden_size
    atoms, edges, angles = counts.atoms, counts.undirected, counts.angles

    part = Part.line_attention
    yield Product(part=part, rows=angles, inputs=width, outputs=layer)  # logits
    yield from _gated(config, part, (angles, edges, edges), angles, width)
    yield from _gated(config, part, (edges, edges, edges), edges, width)

    yield from _atom_attention(config, counts, is_first=is_first)

    part = Part.line_refinement
    yield from _gated(config, part, (angles, atoms, edges, edges), angles, width)
    yield _of_radial_basis(config, counts, part)
    yield Product(part=part, rows=edges, inputs=width, outputs=width, times=2)
    if not is_last:
        yield Product(part=part, rows=angles, inputs=width, outputs=width, times=2)

    part = Part.atom_refinement
    yield from _gated(config, part, (edges, atoms, atoms), counts.edges, width)
    yield _of_radial_basis(config, counts, part)
    yield Product(part=part, rows=atoms, inputs=width, outputs=width, times=2)
    if not is_last:
        yield Product(part=part, rows=counts.edges, inputs=width, outputs=width, times=2)


def _atom_attention(config: ModelConfig, counts: Counts, *, is_first: bool) -> Iterator[Product]:
    """With the experts: every token is served by `moe_router_topk` of them, whichever these are."""
    width, part = config.hidden_size, Part.atom_attention
    has_experts = config.num_moe_experts > 0
    hidden = config.moe_ffn_hidden_size if has_experts else width
    atoms, edges, moves = counts.atoms, counts.undirected, not is_first
    if has_experts and not config.separable_attention:
        yield Product(part=part, rows=atoms, inputs=width, outputs=2 * width, moves=moves)  # queries
        yield Product(part=part, rows=counts.edges, inputs=width, outputs=3 * width)  # keys and values
        yield Product(part=part, rows=atoms, inputs=width, outputs=width, times=2)  # outputs
    else:
        yield Product(part=part, rows=edges, inputs=width, outputs=2 * width)  # logits
    yield from _gated(config, part, (edges,), counts.edges, hidden)
    yield Product(part=part, rows=atoms, inputs=width, outputs=2 * hidden, times=2, moves=moves)
    yield from _gated(config, part, (atoms, atoms), atoms, hidden)
    yield Product(part=part, rows=atoms, inputs=width, outputs=2 * hidden, moves=moves)
    for tokens in (counts.edges, atoms) if has_experts else ():
        rows = config.moe_router_topk * tokens
        yield Product(part=part, rows=rows, inputs=3 * width, outputs=2 * hidden)
        yield Product(part=part, rows=rows, inputs=hidden, outputs=width, times=2)


def _readout(config: ModelConfig, counts: Counts, *, magmoms: bool) -> Iterator[Product]:
    part, width, atoms = Part.readout, config.hidden_size, counts.atoms
    sizes = (width, *config.readout_hidden_sizes, 1)
    for index in range(len(sizes) - 1):
        inputs, outputs = sizes[index : index + 2]
        yield Product(part=part, rows=atoms, inputs=inputs, outputs=outputs, is_last=index == len(sizes) - 2)
    for inputs, outputs in ((width, 2 * width), (2 * width, 1)):
        yield Product(part=part, rows=atoms, inputs=inputs, outputs=outputs, of_energy=False, trained=magmoms)


def _gated(config: ModelConfig, part: Part, inner: tuple[int, ...], outer: int, hidden: int) -> Iterator[Product]:
    """A gated perceptron: parts of its input with so many rows each, and two products with the sum of them."""
    for rows in inner:
        yield Product(part=part, rows=rows, inputs=config.hidden_size, outputs=2 * hidden)
    yield Product(part=part, rows=outer, inputs=hidden, outputs=config.hidden_size, times=2)


def _of_radial_basis(config: ModelConfig, counts: Counts, part: Part) -> Product:
    trained = config.learnable_basis and config.radial_basis is RadialBasis.bessel
    rows, columns = counts.undirected, config.num_radial
    return Product(part=part, rows=rows, inputs=columns, outputs=config.hidden_size, after_weights=trained)
