"""The four passes of a block as programs, cut out of one trace of all of them, for every number of rows.

All that a step does with a block is traced at once: y = f(x, w), g_x, and the derivatives of <v, g_x> + <h, y>. Each
operation of this trace belongs to the first pass that has its inputs, and each pass becomes a program. What a later
pass needs of an earlier one is either kept or made again:

    from the forward and the force pass   results of matrix products and sums over rows are kept; chains of element-wise
                                          operations and gathers, which have more rows, are made again from these
    for the last pass                     what the second pass of the force pass has made for it, and nothing else of
                                          that pass or of the force pass

so no product runs twice, and element-wise results exist in the registers of fused kernels only, once the programs are
compiled. Programs run uncompiled as well, which is what most tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from janus.blockwise.function import Tensors
from janus.ops.recompute import saving_plainly

BlockFunction = Callable[[Tensors, Tensors, Tensors], Tensors]
"""f of x, w and constants (indices), whose derivatives nobody wants."""
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)
_NUM_PASSES = 4
_CANCELLED = 1e-3
_LEFT = 2
"""The pass that leaves things for the last one."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One pass.

    Attributes:
        run: from tensors to the results, then what is kept.
        reads: where its tensors come from: the name of a group, and a place in it.
        num_results: how many there are.
    """

    run: Callable[..., Sequence[Tensor]]
    reads: tuple[tuple[str, int], ...]
    num_results: int

    def __call__(self, **groups: Tensors) -> tuple[Tensors, Tensors]:
        """Results, and what is kept."""
        # Programs are compiled for rows without gaps; what is kept has the strides that it had in the trace.
        tensors = (
            groups[name][place] if name.startswith("kept") else groups[name][place].contiguous()
            for name, place in self.reads
        )
        with torch.no_grad():
            found = tuple(self.run(*tensors))
        return found[: self.num_results], found[self.num_results :]


@dataclass(frozen=True, kw_only=True)
class TracedBlock:
    """A block's programs.

    Attributes:
        programs: of the forward pass, the force pass, and the second pass of each.
    """

    programs: tuple[Program, ...]

    def compiled(self) -> TracedBlock:
        """With programs compiled by torch's inductor, each once for every number of rows from two up."""
        check_standalone_compile()
        from torch._inductor import standalone_compile

        def build(program: Program) -> Program:
            module = program.run
            assert isinstance(module, fx.GraphModule)
            examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
            return replace(program, run=standalone_compile(module, examples, dynamic_shapes="from_graph"))

        return TracedBlock(programs=tuple(map(build, self.programs)))

    def check(
        self, function: BlockFunction, x: Tensors, w: Tensors, constants: Tensors, *, product_format: torch.dtype | None
    ) -> None:
        """Compares all passes with the plain function, with arbitrary numbers for what arrives in each.

        Args:
            product_format: of matrix products, if not that of the weights.

        Raises:
            RuntimeError: they differ by more than rounding.
        """
        passes = TracedPasses(block=self, function=function, constants=constants)
        y, kept = passes.forward(x, w)
        g, v, h = (tuple(map(_arbitrary, values)) for values in (y, x, y))
        g_x, kept_by_force = passes.force(x, w, kept, g)
        v_g, left = passes.second_of_force(x, w, kept, kept_by_force, g, v)
        h_x, h_w = passes.second_of_forward(x, w, kept, left, h)
        whole = _all_passes(function, len(x), len(w), len(constants), len(y))
        expected = whole(*x, *w, *constants, *g, *v, *h)
        largest = max(_largest(plain) for plain in expected)
        for number, (ours, plain) in enumerate(zip((*y, *g_x, *h_x, *h_w, *v_g), expected, strict=True)):
            rounding = torch.finfo(plain.dtype).eps ** 0.5
            if product_format is not None:
                rounding = max(rounding, 8.0 * torch.finfo(product_format).eps)
            # A sum that cancels is as exact as what it is a sum of.
            allowed = rounding * max(_largest(plain), _CANCELLED * largest)
            difference = _largest(ours - plain)
            if not difference <= allowed:
                raise RuntimeError(
                    f"a compiled block differs from the plain one by {difference:.1e} in result {number} of "
                    f"{len(expected)}, where rounding explains {allowed:.1e}: train without (training.compile none), "
                    "and report this with the versions of torch and of the compiler"
                )


@dataclass(frozen=True, kw_only=True)
class TracedPasses:
    """The passes of one call (`janus.blockwise.function.Passes`).

    Attributes:
        block: with its programs.
        function: what was traced.
        constants: of this call.
    """

    block: TracedBlock
    function: BlockFunction
    constants: Tensors

    def plain(self, x: Tensors, w: Tensors) -> Tensors:
        return self.function(x, w, self.constants)

    def forward(self, x: Tensors, w: Tensors) -> tuple[Tensors, Tensors]:
        return self.block.programs[0](x=x, w=w, c=self.constants)

    def force(self, x: Tensors, w: Tensors, kept: Tensors, g: Tensors) -> tuple[Tensors, Tensors]:
        return self.block.programs[1](x=x, w=w, c=self.constants, kept0=kept, g=g)

    def second_of_force(
        self, x: Tensors, w: Tensors, kept: Tensors, kept_by_force: Tensors, g: Tensors, v: Tensors
    ) -> tuple[Tensors, Tensors]:
        groups = {"kept0": kept, "kept1": kept_by_force}
        return self.block.programs[_LEFT](x=x, w=w, c=self.constants, g=g, v=v, **groups)

    def second_of_forward(
        self, x: Tensors, w: Tensors, kept: Tensors, left: Tensors | None, h: Tensors
    ) -> tuple[Tensors, Tensors]:
        if left is None:  # there is no program without: <v, g_x> of nothing
            g, v = (tuple(torch.zeros_like(value) for value in values) for values in (h, x))
            left = self.second_of_force(x, w, kept, self.force(x, w, kept, g)[1], g, v)[1]
        found, _ = self.block.programs[3](x=x, w=w, c=self.constants, kept0=kept, kept2=left, h=h)
        return found[: len(x)], found[len(x) :]


def check_standalone_compile() -> None:
    """Raises ValueError where torch is too old for `TracedBlock.compiled`."""
    try:
        from torch._inductor import standalone_compile  # noqa: F401
    except ImportError:
        raise ValueError(
            f"blocks are to be compiled, which needs torch 2.8 or newer, and this is {torch.__version__}: install "
            "a newer one, or leave training.compile at none"
        ) from None


def trace_block(
    function: BlockFunction,
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    constants: Sequence[Tensor],
    *,
    rows: Sequence[str],
) -> TracedBlock:
    """Traces a block; takes seconds.

    Args:
        function: recorded operations on tensors of any number of rows, without branches that depend on that number.
        x, w, constants: examples, of which only formats and shapes matter.
        rows: what the rows of each of x and constants are; tensors of the same kind have equally many.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # A dimension that no other has, for each kind of row, so that the trace does not take one for another.
    sizes = {kind: 1009 + 1010 * number for number, kind in enumerate(dict.fromkeys(rows))}
    examples = [
        value.new_zeros((sizes[kind], *value.shape[1:])) for value, kind in zip((*x, *constants), rows, strict=True)
    ]
    x_, c_ = examples[: len(x)], examples[len(x) :]
    with torch.no_grad():
        y = function(tuple(x_), tuple(w), tuple(c_))
    arguments = [*x_, *w, *c_, *y, *x_, *y]
    arguments = [value.detach().clone() for value in arguments]
    whole = _all_passes(function, len(x), len(w), len(constants), len(y))
    recorded = make_fx(whole, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    recorded.graph.eliminate_dead_code()
    # Again without changes in place, which would tie operations to an order.
    functional = torch.func.functionalize(recorded, remove="mutations")
    graph = make_fx(functional, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments).graph
    _simplify(graph)
    counts = {"x": len(x), "w": len(w), "c": len(constants), "g": len(y), "v": len(x), "h": len(y)}
    cut = _Cut(graph, counts)
    return TracedBlock(programs=tuple(map(cut.program, range(_NUM_PASSES))))


def _all_passes(function: BlockFunction, num_x: int, num_w: int, num_c: int, num_y: int) -> Callable[..., Tensors]:
    """From x, w, constants, g, v and h to y, g_x, h_x, h_w and v_g."""

    def run(*tensors: Tensor) -> Tensors:
        groups, start = [], 0
        for count in (num_x, num_w, num_c, num_y, num_x, num_y):
            groups.append(tensors[start : start + count])
            start += count
        x, w, g = (tuple(value.detach().requires_grad_() for value in groups[number]) for number in (0, 1, 3))
        with torch.enable_grad(), saving_plainly():
            y = function(x, w, groups[2])
            g_x = torch.autograd.grad(y, x, g, create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(
                (*(value for value in g_x if value.requires_grad), *y),
                (*x, *w, *g),
                (*(v for v, value in zip(groups[4], g_x, strict=True) if value.requires_grad), *groups[5]),
                materialize_grads=True,
            )
        return tuple(value.detach() for value in (*y, *g_x, *second))

    return run


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _arbitrary(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), dtype=like.dtype, device=like.device).sin_().view_as(like)


def _simplify(graph: fx.Graph) -> None:
    """Removes what changes no number and what is there twice, and makes products with one column sums over channels,
    which can be part of a fused kernel."""
    graph.eliminate_dead_code()
    known: dict[tuple[Any, str, str], fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            continue
        if node.target is _aten.mm.default and node.meta["val"].shape[1] == 1:
            rows, column = node.args
            with graph.inserting_before(node), node.meta["val"].fake_mode:
                product = _call(graph, _aten.mul.Tensor, rows, _call(graph, _aten.t.default, column))
                node.replace_all_uses_with(_call(graph, _aten.sum.dim_IntList, product, [1], True))
            continue
        # Names of nodes are unique, so equal texts are equal arguments.
        first = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*(value.meta["val"] if isinstance(value, fx.Node) else value for value in arguments))
    return node


class _Cut:
    """Which nodes of the trace each pass runs, reads and keeps.

    Attributes:
        first: the first pass that has a node's inputs.
        runs, reads, keeps: of each pass.
    """

    def __init__(self, graph: fx.Graph, counts: dict[str, int]) -> None:
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        names = [(name, place) for name, count in counts.items() for place in range(count)]
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.source = dict(zip(inputs, names, strict=True))
        arrival = {"g": 1, "v": 2, "h": 3}
        self.first = {node: arrival.get(name, 0) for node, (name, _) in self.source.items()}
        for node in self.nodes:
            if node not in self.first:
                self.first[node] = max((self.first[value] for value in node.all_input_nodes), default=0)
        (output,) = graph.find_nodes(op="output")
        results = list(output.args[0])
        sizes = [counts["g"], counts["x"], counts["x"] + counts["w"], counts["g"]]
        y, g_x, second, v_g = (results[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(_NUM_PASSES))
        self.results = (y, g_x, v_g, second)
        assert all(self.first[node] <= number for number, nodes in enumerate(self.results) for node in nodes)
        self.runs: list[set[fx.Node]] = [set() for _ in range(_NUM_PASSES)]
        self.reads: list[set[fx.Node]] = [set() for _ in range(_NUM_PASSES)]
        for number in range(_NUM_PASSES - 1, -1, -1):  # what a pass reads, an earlier one must run
            self._want(self.results[number], number)
            for later in range(number + 1, _NUM_PASSES):
                self._want((node for node in self.reads[later] if self._kept_by(node, later) == number), number)

    def _kept_by(self, node: fx.Node, reader: int) -> int | None:
        """Which pass keeps what a later one reads; None for what is there anyway."""
        if node in self.source and (self.first[node] == 0 or self.source[node][0] in _AT_HAND[reader]):
            return None
        return _LEFT if reader > _LEFT and self.first[node] > 0 else self.first[node]

    def _want(self, nodes: Iterable[fx.Node], number: int) -> None:
        """Has a pass run these nodes, and all before them that are not read."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in self.runs[number] or node in self.reads[number]:
                continue
            if node in self.source or (self.first[node] < number and self._is_read(node, number)):
                self.reads[number].add(node)
                continue
            self.runs[number].add(node)
            waiting += node.all_input_nodes

    def _is_read(self, node: fx.Node, reader: int) -> bool:
        if reader > _LEFT and self.first[node] > 0:
            return isinstance(node.meta["val"], Tensor)
        return node.target in _PRODUCTS or _sums_rows(node)

    def keeps(self, number: int) -> list[fx.Node]:
        """In the order of the trace."""
        read = {
            node
            for later in range(number + 1, _NUM_PASSES)
            for node in self.reads[later]
            if self._kept_by(node, later) == number
        }
        return [node for node in self.nodes if node in read]

    def program(self, number: int) -> Program:
        """Uncompiled."""
        read = [node for node in self.nodes if node in self.reads[number]]
        graph, copies = fx.Graph(), {}
        for node in read:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta["val"] = node.meta["val"]
        for node in self.nodes:
            if node in self.runs[number]:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in (*self.results[number], *self.keeps(number))))
        return Program(
            run=fx.GraphModule({}, graph),
            reads=tuple(self._place(node, number) for node in read),
            num_results=len(self.results[number]),
        )

    def _place(self, node: fx.Node, reader: int) -> tuple[str, int]:
        keeper = self._kept_by(node, reader)
        return self.source[node] if keeper is None else (f"kept{keeper}", self.keeps(keeper).index(node))


_AT_HAND = ("", "g", "gv", "h")
"""Which of what arrives in backward passes each pass is given."""


def _sums_rows(node: fx.Node) -> bool:
    if node.target is _aten.sum.dim_IntList:
        return bool(node.args[1] == [0])
    return node.target is _aten.index_add.default
