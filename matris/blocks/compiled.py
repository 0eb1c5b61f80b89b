"""Interaction blocks as compiled programs (`janus.blockwise.traced`)."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from janus.blockwise.function import Passes, Tensors
from janus.blockwise.traced import BlockFunction, TracedBlock, TracedPasses, trace_block
from matris.blocks.edges import EdgeSet, Rows
from matris.blocks.interaction import Connectivity, InteractionBlock
from matris.blocks.module import MatRISConfig

_ROWS = (
    *("atoms", "undirected edges", "angles"),
    *("edges", "angles", "undirected edges", "undirected edges"),  # Connectivity.measured
    *("edges", "edges", "edges", "angles", "angles", "atoms", "angles"),  # _constants
)
"""What the rows of a block's inputs are."""
_ROWS_OF_EXAMPLE = {"atoms": 7, "undirected edges": 13, "edges": 26, "angles": 41}


class CompiledBlocks:
    """Computes the passes of the blocks of a model by programs: one set for all blocks but the last, and one for that.

    They are made when a block first meets a batch, serve batches of every size, and are compared with the plain block
    once. A batch with fewer than two rows of a kind (an atom alone, no angles) is left to autograd.

    Args:
        config: of the model.
        compiled: whether the programs are compiled; as traced they are slow, but tell the same.
        or_plain: leave all to autograd, with a warning, where programs cannot be made or are wrong.

    Raises:
        ValueError: the model has experts, or its ranks share it.
    """

    def __init__(self, config: MatRISConfig, *, compiled: bool = True, or_plain: bool = False) -> None:
        mesh = config.mesh
        shared = {name: axis.size for name, axis in (("tensor", mesh.tensor), ("graph", mesh.graph)) if axis.size > 1}
        if config.model.num_moe_experts:
            raise ValueError(
                f"blocks with experts (model.num_moe_experts is {config.model.num_moe_experts}) cannot be compiled as "
                "a whole, because which rows an expert gets depends on the batch: leave training.compile at none"
            )
        if shared:
            ranks = " and ".join(f"{size} ranks of the {name} axis" for name, size in shared.items())
            raise ValueError(
                f"blocks that {ranks} share cannot be compiled as a whole, because they communicate inside: leave "
                "training.compile at none, or use replicas and sharded weights alone"
            )
        self._compiled, self._or_plain = compiled, or_plain
        self._blocks: dict[bool, TracedBlock | None] = {}

    def __call__(self, block: InteractionBlock, graph: Connectivity) -> Passes | None:
        """The passes of this block on a batch; None leaves it to autograd."""
        constants = _constants(graph)
        if min(len(graph.pair_basis), *map(len, constants)) < 2:
            return None

        def function(x: Tensors, w: Tensors, c: Tensors) -> Tensors:
            return block.function_on(_connectivity(graph, x, c))(x, w)

        if block.is_last not in self._blocks:
            self._blocks[block.is_last] = self._made(block, graph, function)
        traced = self._blocks[block.is_last]
        return None if traced is None else TracedPasses(block=traced, function=function, constants=constants)

    def _made(self, block: InteractionBlock, graph: Connectivity, function: BlockFunction) -> TracedBlock | None:
        """Programs, after a comparison on a few rows with arbitrary numbers."""
        width, like = block.config.model.hidden_size, graph.pair_basis.detach()
        columns = [width] * 3 + [values.shape[1] for values in graph.measured]
        generator = torch.Generator().manual_seed(0)
        # Positive, as envelopes are: sums of them are divided by.
        x = tuple(
            torch.rand(_ROWS_OF_EXAMPLE[kind], count, generator=generator).add_(0.2).to(like)
            for kind, count in zip(_ROWS, columns, strict=False)
        )
        constants = tuple(
            torch.arange(_ROWS_OF_EXAMPLE[kind], dtype=values.dtype, device=values.device)
            % min(_ROWS_OF_EXAMPLE.values())
            for kind, values in zip(_ROWS[len(x) :], _constants(graph), strict=True)
        )
        w = block.weights.current()
        try:
            traced = trace_block(function, x, w, constants, rows=_ROWS)
            made = traced.compiled() if self._compiled else traced
            made.check(function, x, w, constants, product_format=block.config.matmul_dtype)
        except Exception as error:
            if not self._or_plain:
                raise
            warnings.warn(f"training goes on without compiled blocks: {error}", RuntimeWarning, stacklevel=2)
            return None
        return made


def _constants(graph: Connectivity) -> tuple[Tensor, ...]:
    atoms, lines = graph.atom_graph, graph.line_graph
    assert atoms.undirected is not None
    indices = (atoms.target, atoms.source, atoms.undirected, lines.target, lines.source)
    return (*indices, graph.element, graph.angle_center)


def _connectivity(graph: Connectivity, x: Tensors, constants: Tensors) -> Connectivity:
    """With numbers of rows that are those of `x`, which in a trace stand for any."""
    target, source, undirected, angle_target, angle_source, element, angle_center = constants
    atoms, edges, angles = (
        Rows(owned=rows.shape[0], local=rows.shape[0], halo=None, axis=graph.atom_graph.targets.axis) for rows in x[:3]
    )
    atom_graph = EdgeSet(
        targets=atoms,
        sources=atoms,
        features=edges,
        target=target,
        source=source,
        undirected=undirected,
        envelope=graph.atom_graph.envelope,
    )
    line_graph = EdgeSet(
        targets=edges,
        sources=edges,
        features=angles,
        target=angle_target,
        source=angle_source,
        undirected=None,
        envelope=graph.line_graph.envelope,
    )
    return replace(graph, atom_graph=atom_graph, line_graph=line_graph, element=element, angle_center=angle_center)
