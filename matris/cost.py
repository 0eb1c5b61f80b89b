"""Matrix-product FLOPs and bytes of a training step, exactly, from hyper-parameters and the counts of a batch.

A product y = x W^T of n rows costs 2 n inputs outputs each time it runs, and a step runs it up to six times:

    forward pass                 y = x W^T
    force pass                   g_x = g_y W                      if x depends on the positions
    second backward, of forward  h_x = h_y W, h_W = h_y^T x       the first if weights lie before x
    second backward, of force    h_g = v W^T, h_W = g_y^T v       the first if g_y depends on weights; v is for g_x

So a step costs six forward passes but for inputs that are the same wherever the atoms are (the first block's atoms),
inputs before which nothing is trained (fixed bases), and the energy's last layer, whose g_y is constant. Recomputation
of results runs no product again; that of whole blocks (`full`) runs those of the forward and the force pass twice.
`tests/matris/test_cost.py` counts what torch runs and finds the same numbers.

Each run of it moves rows inputs + inputs outputs + rows outputs numbers between memory and processor, if each operand
is read once and each result written once. That is what a step moves whose other operations all happen on the way, in
the products' kernels: a bound for kernels of one product each. Which experts serve a batch is not known here, so of
their weights no more are counted than every batch uses.

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
class PerPass:
    """A number for each of the three passes of a step.

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

    def __add__(self, other: PerPass) -> PerPass:
        return PerPass(
            forward=self.forward + other.forward, force=self.force + other.force, second=self.second + other.second
        )

    def __mul__(self, factor: int) -> PerPass:
        return PerPass(forward=factor * self.forward, force=factor * self.force, second=factor * self.second)


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows by a weight matrix.

    Attributes:
        part: where it is.
        rows, inputs, outputs: (rows, inputs) to (rows, outputs).
        times: how many of the kind there are.
        matrices: by how many matrices, each for a part of the rows, at least.
        moves: whether the input depends on the positions.
        after_weights: whether anything trained lies before the input.
        is_last: whether the energy is a sum of its outputs.
        of_energy: whether the energy depends on it.
        in_full: whether it is computed in fp32 where the precision is mixed.
        trained: whether the loss depends on it.
    """

    part: Part
    rows: int
    inputs: int
    outputs: int
    times: int = 1
    matrices: int = 1
    moves: bool = True
    after_weights: bool = True
    is_last: bool = False
    in_full: bool = False
    of_energy: bool = True
    trained: bool = True

    @property
    def flops(self) -> int:
        """Of one run of all of the kind."""
        return 2 * self.times * self.rows * self.inputs * self.outputs

    @property
    def elements(self) -> int:
        """That one run of all of the kind reads and writes."""
        rows, matrices = self.rows * (self.inputs + self.outputs), self.matrices * self.inputs * self.outputs
        return self.times * (rows + matrices)

    def runs(self, *, force_pass: bool) -> PerPass:
        """In a step with or without a force pass; see the head of this module."""
        differentiated = force_pass and self.of_energy and self.moves
        second = int(self.trained) * (1 + self.after_weights) + int(differentiated) * (1 + (not self.is_last))
        return PerPass(forward=1, force=int(differentiated), second=second)


def step_flops(config: ModelConfig, counts: Counts, derivatives: Derivatives) -> PerPass:
    """Of one micro-batch."""
    return sum(flops_by_part(config, counts, derivatives).values(), PerPass())


def step_bytes(config: ModelConfig, counts: Counts, derivatives: Derivatives, *, itemsize: int) -> PerPass:
    """Of one micro-batch, products with elements of `itemsize` bytes, and geometry in float64."""
    return sum(bytes_by_part(config, counts, derivatives, itemsize=itemsize).values(), PerPass())


def flops_by_part(config: ModelConfig, counts: Counts, derivatives: Derivatives) -> dict[Part, PerPass]:
    """Of one micro-batch, every part."""
    found = dict.fromkeys(Part, PerPass())
    found[Part.geometry] = _geometry(counts, derivatives, row=18, cell=54)
    for product in products(config, counts, magmoms=derivatives.magmoms):
        found[product.part] += product.runs(force_pass=derivatives.any) * product.flops
    return found


def bytes_by_part(
    config: ModelConfig, counts: Counts, derivatives: Derivatives, *, itemsize: int
) -> dict[Part, PerPass]:
    """Likewise, what `step_bytes` sums."""
    found = dict.fromkeys(Part, PerPass())
    found[Part.geometry] = _geometry(counts, derivatives, row=15 * 8, cell=27 * 8)
    for product in products(config, counts, magmoms=derivatives.magmoms):
        size = max(itemsize, 4) if product.in_full else itemsize
        found[product.part] += product.runs(force_pass=derivatives.any) * (size * product.elements)
    return found


def update_bytes(num_parameters: int, *, itemsize: int = 4, averaged: bool = True, clipped: bool = True) -> int:
    """Of an update by AdamW, with everything read and written once.

    Args:
        num_parameters: that this rank updates.
        averaged: whether there is a moving average: reads it and the new weights, writes it.
        clipped: whether the norm of the gradients is formed before any is used.
    """
    # Weights, both moments: read and written; gradients: read.
    return itemsize * num_parameters * (7 + 3 * averaged + clipped)


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


def _geometry(counts: Counts, derivatives: Derivatives, *, row: int, cell: int) -> PerPass:
    """Rows times 3 x 3 matrices, in float64: positions and cell by the strain, images by the cell.

    A row and its matrix, or a cell and its strain, count as given.

    Neither factor is a weight, so the second backward pass only takes the derivatives of the force pass.
    """
    if not derivatives.stress:
        return PerPass(forward=row * counts.undirected)
    positions = row * counts.atoms
    for_strain = positions + cell * counts.structures + row * counts.undirected
    force = for_strain + positions * derivatives.forces
    return PerPass(forward=for_strain, force=force, second=force)


def _embedding(config: ModelConfig, counts: Counts) -> Iterator[Product]:
    width, columns = config.hidden_size, config.num_radial
    angular = config.num_angular if config.angular_basis is AngularBasis.fourier else config.spherical_degree**2
    part = Part.embedding
    yield Product(part=part, rows=config.num_elements, inputs=width, outputs=width, moves=False)
    if config.tasks:
        yield Product(part=part, rows=counts.structures, inputs=4 * width, outputs=width, moves=False)
        yield Product(part=part, rows=counts.structures, inputs=width, outputs=width, times=2, moves=False)
    # Two layers in a row become one, by the product of their weights.
    yield Product(part=part, rows=width, inputs=width, outputs=columns, moves=False, in_full=True)
    yield Product(part=part, rows=width, inputs=width, outputs=angular, moves=False, in_full=True)
    yield replace(_of_radial_basis(config, counts, part), in_full=True)
    yield Product(part=part, rows=counts.undirected, inputs=width, outputs=width)
    trained = config.learnable_basis and config.angular_basis is AngularBasis.fourier
    yield Product(part=part, rows=counts.angles, inputs=angular, outputs=width, after_weights=trained, in_full=True)


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
        yield Product(part=part, rows=counts.edges, inputs=width, outputs=2 * width)  # keys
        yield Product(part=part, rows=counts.edges, inputs=width, outputs=width)  # values
        yield Product(part=part, rows=atoms, inputs=width, outputs=width, times=2)  # outputs
    else:
        yield Product(part=part, rows=edges, inputs=width, outputs=2 * width)  # logits
    yield from _gated(config, part, (edges,), counts.edges, hidden)
    yield Product(part=part, rows=atoms, inputs=width, outputs=2 * hidden, times=2, moves=moves)
    yield from _gated(config, part, (atoms, atoms), atoms, hidden)
    yield Product(part=part, rows=atoms, inputs=width, outputs=2 * hidden, moves=moves)
    for tokens in (counts.edges, atoms) if has_experts else ():
        rows = config.moe_router_topk * tokens
        # An atom has so many experts, so no fewer serve any batch that has atoms, and edges.
        matrices = min(config.moe_router_topk, rows)
        yield Product(part=part, rows=rows, inputs=3 * width, outputs=2 * hidden, matrices=matrices)
        yield Product(part=part, rows=rows, inputs=hidden, outputs=width, times=2, matrices=matrices)


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
