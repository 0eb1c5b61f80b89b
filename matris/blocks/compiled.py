"""Interaction blocks, or parts of them, as compiled programs (`janus.blockwise.traced`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from janus.blockwise.function import Passes, Tensors
from janus.blockwise.traced import (
    BlockFunction,
    TracedBlock,
    TracedPasses,
    check_standalone_compile,
    trace_block,
)
from janus.ops.fused import check_compiler, using_kernels
from matris.blocks.edges import EdgeSet, Rows
from matris.blocks.interaction import Connectivity, Part
from matris.blocks.module import MatRISConfig

_ROWS = {
    "atoms": "atoms",
    "edges": "undirected edges",
    "angles": "angles",
    "atom envelope": "edges",
    "line envelope": "angles",
    "pair basis": "undirected edges",
    "line basis": "undirected edges",
}
"""What the rows of the inputs of a part are."""
_ROWS_OF_CONSTANTS = ("edges", "edges", "edges", "angles", "angles", "atoms", "angles")
_ROWS_OF_EXAMPLE = {"atoms": 7, "undirected edges": 13, "edges": 26, "angles": 41}


class CompiledBlocks:
    """Computes the passes of parts of the blocks of a model by programs, one set for parts of the same name.

    They are made when a part first meets a batch, serve batches of every size, and are compared with the plain part
    once. A batch with fewer than two rows of a kind (an atom alone, no angles) is left to autograd.

    Args:
        config: of the model.
        compiled: whether the programs are compiled; as traced they are slow, but tell the same.
        or_plain: leave all to autograd, with a warning, where programs cannot be made or are wrong.

    Raises:
        ValueError: ranks share a structure, or products of matrices; there is no compiler.
    """

    def __init__(self, config: MatRISConfig, *, compiled: bool = True, or_plain: bool = False) -> None:
        mesh = config.mesh
        shared = {name: axis.size for name, axis in (("tensor", mesh.tensor), ("graph", mesh.graph)) if axis.size > 1}
        if shared:
            ranks = " and ".join(f"{size} ranks of the {name} axis" for name, size in shared.items())
            raise ValueError(
                f"blocks that {ranks} share cannot be compiled as a whole, because they communicate inside: leave "
                "training.compile at none, or use replicas and sharded weights alone"
            )
        self._compiled, self._or_plain, self._can_compile = compiled, or_plain, True
        self._width, self._product_format = config.model.hidden_size, config.matmul_dtype
        self._programs: dict[str, TracedBlock | None] = {}
        if compiled:
            try:
                check_standalone_compile()
                check_compiler("compiled blocks", mesh.device, instead="leave training.compile at none")
            except ValueError as error:
                if not or_plain:
                    raise
                self._can_compile = False
                warnings.warn(f"training goes on without compiled blocks: {error}", RuntimeWarning, stacklevel=3)

    def __call__(self, part: Part, graph: Connectivity) -> Passes | None:
        """The passes of this part on a batch; None leaves it to autograd."""
        constants = _constants(graph)
        if not self._can_compile or min(len(graph.pair_basis), *map(len, constants)) < 2:
            return None

        def function(x: Tensors, w: Tensors, c: Tensors) -> Tensors:
            return part.on(_connectivity(graph, dict(zip(part.features, x, strict=False)), c))(x, w)

        if part.name not in self._programs:
            # A compiler sees through torch's operations alone.
            with using_kernels("torch", graph.pair_basis.device):
                self._programs[part.name] = self._made(part, graph, function)
        traced = self._programs[part.name]
        return None if traced is None else TracedPasses(block=traced, function=function, constants=constants)

    def _made(self, part: Part, graph: Connectivity, function: BlockFunction) -> TracedBlock | None:
        """Programs, after a comparison on a few rows with arbitrary numbers."""
        like = graph.pair_basis.detach()
        columns = [self._width] * len(part.features) + [values.shape[1] for values in part.measured_of(graph)]
        kinds = [_ROWS[name] for name in (*part.features, *part.measured)]
        generator = torch.Generator().manual_seed(0)
        # Positive, as envelopes are: sums of them are divided by.
        x = tuple(
            torch.rand(_ROWS_OF_EXAMPLE[kind], count, generator=generator).add_(0.2).to(like)
            for kind, count in zip(kinds, columns, strict=True)
        )
        constants = tuple(
            torch.arange(_ROWS_OF_EXAMPLE[kind], dtype=values.dtype, device=values.device)
            % min(_ROWS_OF_EXAMPLE.values())
            for kind, values in zip(_ROWS_OF_CONSTANTS, _constants(graph), strict=True)
        )
        w = part.weights.current()
        try:
            traced = trace_block(function, x, w, constants, rows=(*kinds, *_ROWS_OF_CONSTANTS))
            made = traced.compiled() if self._compiled else traced
            made.check(function, x, w, constants, product_format=self._product_format)
        except Exception as error:
            if not self._or_plain:
                raise
            warnings.warn(
                f"training goes on without compiled programs of the {part.name}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return made


def _constants(graph: Connectivity) -> tuple[Tensor, ...]:
    atoms, lines = graph.atom_graph, graph.line_graph
    assert atoms.undirected is not None
    indices = (atoms.target, atoms.source, atoms.undirected, lines.target, lines.source)
    return (*indices, graph.element, graph.angle_center)


def _connectivity(graph: Connectivity, features: Mapping[str, Tensor], constants: Tensors) -> Connectivity:
    """With numbers of rows that are those of the arguments, which in a trace stand for any."""
    target, source, undirected, angle_target, angle_source, element, angle_center = constants
    atoms, edges, angles = (
        Rows(owned=rows.shape[0], local=rows.shape[0], halo=None, axis=graph.atom_graph.targets.axis)
        for rows in (element, features["edges"], angle_center)
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
