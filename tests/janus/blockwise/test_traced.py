"""Programs cut out of the trace of a block, against the block left to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from janus.blockwise.function import Tensors, run_block
from janus.blockwise.traced import TracedBlock, TracedPasses, trace_block
from janus.ops.segment import gather_rows, segment_sum

WIDTH = 4


def block(x: Tensors, w: Tensors, c: Tensors) -> Tensors:
    """Messages along edges, an update of nodes, with products, sums over rows, and changes in place."""
    nodes, lengths = x
    source, target = c
    message = functional.silu((nodes @ w[0]).index_select(0, source).add_(lengths * w[1]))
    message = (message * torch.exp(-lengths * lengths)).mean(1, keepdim=True)
    received = segment_sum(gather_rows(nodes, source) * message, target, nodes.shape[0])
    return torch.tanh(received @ w[2]) + nodes, (lengths + message).square()


@pytest.fixture(scope="module")
def traced() -> TracedBlock:
    def like(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64)

    index = torch.zeros(2, dtype=torch.int64)
    weights = [like(WIDTH, WIDTH), like(WIDTH), like(WIDTH, WIDTH)]
    rows = ["nodes", "edges", "edges", "edges"]
    return trace_block(block, [like(2, WIDTH), like(2, 1)], weights, [index, index], rows=rows)


def derivatives(traced: TracedBlock | None, num_nodes: int) -> list[Tensor]:
    """Energy, forces, gradients of each kind of loss for weights and positions, and one of third order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()

    layers = [(random(WIDTH, WIDTH), random(WIDTH), random(WIDTH, WIDTH)) for _ in range(2)]
    weights = [weight for layer in layers for weight in layer]
    positions = random(num_nodes, WIDTH)
    source = torch.arange(3 * num_nodes) % num_nodes
    target = torch.arange(3 * num_nodes) * 7 % num_nodes

    def run(x: Tensors, w: Sequence[Tensor]) -> Tensors:
        if traced is None:
            return block(x, tuple(w), (source, target))
        return run_block(TracedPasses(block=traced, function=block, constants=(source, target)), x, w)

    nodes = positions.sin()
    lengths = (positions[source] - positions[target]).square().sum(1, keepdim=True)
    for layer in layers:
        nodes, lengths = run((nodes, lengths), layer)
    energy = nodes.sum() + lengths.sum()
    (forces,) = torch.autograd.grad(energy, positions, create_graph=True)
    found = [energy, forces]
    for value, inputs in (
        (energy, weights),
        (forces.abs().sum(), weights),
        (forces.square().sum() + energy, [positions, *weights]),
        (forces.square().sum(), [positions]),
        (energy, [positions, *weights]),
    ):
        found += torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(forces.square().sum(), weights, create_graph=True)
    found += torch.autograd.grad(sum(grad.square().sum() for grad in second), [positions, *weights])
    return [value.detach() for value in found]


@pytest.mark.parametrize("num_nodes", [2, 5, 11])
def test_programs_equal_autograd_for_every_size(traced: TracedBlock, num_nodes: int) -> None:
    for ours, expected in zip(derivatives(traced, num_nodes), derivatives(None, num_nodes), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_no_product_runs_twice(traced: TracedBlock) -> None:
    """Two products: once in the forward and the force pass, twice in the second pass of each, for input and weight; and
    the last pass makes nothing again that a backward pass before it has made."""
    modules = [program.run for program in traced.programs]
    products = [
        len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) for module in modules
    ]
    assert products == [2, 2, 4, 4]
    assert {name for name, _ in traced.programs[3].reads} <= {"x", "w", "c", "kept0", "kept2", "h"}


@pytest.mark.slow
def test_compiled_programs(traced: TracedBlock) -> None:
    compiled = traced.compiled()
    for num_nodes in (2, 5, 11):
        for ours, expected in zip(derivatives(compiled, num_nodes), derivatives(None, num_nodes), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("number", range(4))
def test_wrong_programs_are_found(traced: TracedBlock, number: int) -> None:
    def wrong(*tensors: Tensor, program=traced.programs[number]) -> Tensors:
        first, *others = program.run(*tensors)
        return (first * 1.01, *others)

    programs = list(traced.programs)
    programs[number] = replace(programs[number], run=wrong)
    x = torch.ones(3, WIDTH, dtype=torch.float64), torch.full((4, 1), 0.5, dtype=torch.float64)
    w = tuple(torch.full(shape, 0.3, dtype=torch.float64) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH, WIDTH)))
    c = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    traced.check(block, x, w, c, product_format=None)
    with pytest.raises(RuntimeError, match="differs from the plain one"):
        TracedBlock(programs=tuple(programs)).check(block, x, w, c, product_format=None)
