"""The formulas of FLOPs and bytes against what torch counts, number by number."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from matris.config import AngularBasis, ModelConfig, NormType, Precision, RadialBasis
from matris.cost import (
    Counts,
    Derivatives,
    Part,
    PerPass,
    bytes_by_part,
    flops_by_part,
    products,
    step_bytes,
    step_flops,
    update_bytes,
)
from matris.graph.batch import GraphBatch
from matris.model import MatRIS
from tests.matris.structures import EXPERTS, TINY, batch_of, rattled

_BATCHES = {
    "one crystal": [rattled(bulk("Cu", cubic=True))],
    "three structures": [rattled(bulk("NaCl", "rocksalt", a=5.64)), molecule("C2H6"), Atoms("He")],
}
_CONFIGS = {
    "dense": {},
    "one layer": {"num_layers": 1},
    "three layers": {"num_layers": 3},
    "not smooth": {"smooth_attention": False},
    "rms norm": {"norm_type": NormType.rms},
    "wide": {"hidden_size": 24, "readout_hidden_sizes": (20, 12, 8)},
    "one readout layer": {"readout_hidden_sizes": ()},
    "fixed bases": {"learnable_basis": False, "num_radial": 5, "num_angular": 9},
    "other bases": {"radial_basis": RadialBasis.gaussian, "angular_basis": AngularBasis.spherical},
    "biases": {"ffn_bias": True, "enveloped_edge_update": True},
    "tasks": {"tasks": ("a", "b")},
}
_EXPERTS = {
    "multi-head": {},
    "multi-head, three layers, top 3": {"num_layers": 3, "moe_router_topk": 3},
    "separable": {"separable_attention": True},
}


def _product(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A product with a vector in a backward pass is a sum that is written so (`janus.ops.gated_norm`)."""
    return 0 if b[1] == 1 else 2 * prod(a) * b[1]


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Rows by a matrix for each group; or, for the weights' gradients, as many products as groups, of all rows."""
    return 2 * prod(a) * b[-1]


def count(function: Callable[[], object], *, vectors: bool = False) -> int:
    mapping: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped}
    if not vectors:
        mapping[torch.ops.aten.mm] = _product
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


class _Operands(TorchDispatchMode):
    """Bytes of the two factors and of the result of every matrix product."""

    def __init__(self, *, vectors: bool) -> None:
        super().__init__()
        self.vectors, self.bytes = vectors, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        factors = {aten.mm: args[:2], aten.bmm: args[:2], aten._grouped_mm: args[:2], aten.addmm: args[1:3]}
        found = factors.get(func.overloadpacket, ())
        assert func.overloadpacket not in (aten.baddbmm, aten.mv, aten.addmv, aten.addbmm)
        if found and (self.vectors or found[1].shape[-1] > 1 or func.overloadpacket != aten.mm):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*found, result))
        return result


def count_bytes(function: Callable[[], object], *, vectors: bool = False) -> int:
    with _Operands(vectors=vectors) as operands:
        function()
    return operands.bytes


def counted(
    model: MatRIS,
    batch: GraphBatch,
    derivatives: Derivatives,
    count: Callable[..., int] = count,
    *,
    row: int = 18,
    cell: int = 54,
) -> PerPass:
    """Each pass, by what it adds; `row` and `cell` are what a row of positions by the strain, and a cell, count."""
    model.readout.magmom.requires_grad_(derivatives.magmoms)
    weights = [value for value in model.parameters() if value.requires_grad]
    wanted = {"forces": derivatives.forces, "stress": derivatives.stress}

    def forward() -> None:
        with torch.no_grad():
            model(batch, forces=False, stress=False)

    def step() -> None:
        prediction = model(batch, create_graph=True, **wanted)
        loss = prediction.energy.sum()
        for value in (prediction.forces, prediction.stress, prediction.magmoms if derivatives.magmoms else None):
            loss = loss if value is None else loss + value.nan_to_num().square().sum()
        loss.backward(inputs=weights)

    alone, to_forces, whole = count(forward), count(lambda: model(batch, **wanted)), count(step)
    # Without strain the positions and the cell are not multiplied.
    strain = row * batch.num_atoms + cell * batch.num_structures if derivatives.stress else 0
    energies = count(forward, vectors=True)  # in bf16 the last layers are products with a vector, too
    return PerPass(forward=energies + strain, force=to_forces - alone - strain, second=whole - to_forces)


def counts_of(batch: GraphBatch) -> Counts:
    return Counts(
        structures=batch.num_structures,
        atoms=batch.num_atoms,
        edges=batch.num_edges,
        undirected=batch.num_undirected,
        angles=batch.num_angles,
    )


@pytest.mark.parametrize("structures", _BATCHES.values(), ids=_BATCHES)
@pytest.mark.parametrize("changes", _CONFIGS.values(), ids=_CONFIGS)
def test_what_a_step_computes(changes: dict[str, Any], structures: list[Atoms]) -> None:
    config = ModelConfig(**{**vars(TINY), **changes})
    batch = batch_of(*structures, config=config)
    found = counted(MatRIS(config, seed=0), batch, Derivatives())
    assert found == step_flops(config, counts_of(batch), Derivatives())


_IN_BYTES: dict[str, Any] = {"count": count_bytes, "row": 15 * 8, "cell": 27 * 8}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp64, Precision.bf16_mixed])
@pytest.mark.parametrize("changes", _CONFIGS.values(), ids=_CONFIGS)
def test_what_products_move(changes: dict[str, Any], precision: Precision) -> None:
    config = ModelConfig(**{**vars(TINY), **changes})
    batch = batch_of(*_BATCHES["three structures"], config=config)
    found = counted(MatRIS(config, precision=precision, seed=0), batch, Derivatives(), **_IN_BYTES)
    itemsize = {Precision.fp32: 4, Precision.fp64: 8, Precision.bf16_mixed: 2}[precision]
    assert found == step_bytes(config, counts_of(batch), Derivatives(), itemsize=itemsize)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp64])
@pytest.mark.parametrize("changes", _EXPERTS.values(), ids=_EXPERTS)
def test_what_experts_move(changes: dict[str, Any], precision: Precision) -> None:
    """At least the weights that any batch uses, at most those of all experts; the rows exactly."""
    config = ModelConfig(**{**vars(EXPERTS), "hidden_size": 32, "moe_ffn_hidden_size": 24, **changes})
    batch = batch_of(*_BATCHES["three structures"], config=config)
    itemsize = 4 if precision is Precision.fp32 else 8
    found = counted(MatRIS(config, precision=precision, seed=0), batch, Derivatives(), **_IN_BYTES)
    least = step_bytes(config, counts_of(batch), Derivatives(), itemsize=itemsize)
    unused = PerPass()
    for product in products(config, counts_of(batch)):
        if product.matrices > 1:
            others = product.times * (config.num_moe_experts - product.matrices) * product.inputs * product.outputs
            unused += product.runs(force_pass=True) * (itemsize * others)
    for name in ("forward", "force", "second"):
        assert getattr(least, name) <= getattr(found, name) <= getattr(least, name) + getattr(unused, name)


def test_what_an_update_moves() -> None:
    """Every tensor that AdamW's update, the average and the norm have to touch, once each way."""
    weights, gradients, moments, average = (torch.zeros(300) for _ in range(4))
    both_ways = [weights, moments, moments, weights, moments, moments]
    touched = [*both_ways, gradients]
    assert update_bytes(300, averaged=False, clipped=False) == sum(tensor.nbytes for tensor in touched)
    assert update_bytes(300, clipped=False) == sum(tensor.nbytes for tensor in (*touched, weights, average, average))
    assert update_bytes(300) == update_bytes(300, clipped=False) + gradients.nbytes


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp64, Precision.bf16_mixed])
@pytest.mark.parametrize("changes", _EXPERTS.values(), ids=_EXPERTS)
def test_experts(changes: dict[str, Any], precision: Precision) -> None:
    """One product per expert (fp64), or a grouped one; elements that share experts and elements that do not."""
    config = ModelConfig(**{**vars(EXPERTS), "hidden_size": 32, "moe_ffn_hidden_size": 24, **changes})
    batch = batch_of(*_BATCHES["three structures"], config=config)
    found = counted(MatRIS(config, precision=precision, seed=0), batch, Derivatives())
    assert found == step_flops(config, counts_of(batch), Derivatives())


@pytest.mark.parametrize(
    "derivatives",
    [
        Derivatives(stress=False),
        Derivatives(forces=False),
        Derivatives(forces=False, stress=False),
        Derivatives(magmoms=True),
        Derivatives(forces=False, stress=False, magmoms=True),
    ],
    ids=str,
)
def test_what_the_loss_asks_for(derivatives: Derivatives) -> None:
    batch = batch_of(*_BATCHES["three structures"])
    found = counted(MatRIS(TINY, seed=0), batch, derivatives)
    assert found == step_flops(TINY, counts_of(batch), derivatives)
    moved = counted(MatRIS(TINY, seed=0), batch, derivatives, **_IN_BYTES)
    assert moved == step_bytes(TINY, counts_of(batch), derivatives, itemsize=4)


def test_parts_add_up() -> None:
    """And a part's share is what it says: without angles, the line graph's products are those of its nodes alone."""
    counts = Counts(structures=1, atoms=4, edges=168, undirected=84, angles=1224)
    without = Counts(structures=1, atoms=4, edges=168, undirected=84, angles=0)
    parts, fewer = (flops_by_part(TINY, sizes, Derivatives()) for sizes in (counts, without))
    assert set(parts) == set(Part)
    assert sum(parts.values(), PerPass()) == step_flops(TINY, counts, Derivatives())
    of_bytes = bytes_by_part(TINY, counts, Derivatives(), itemsize=4)
    assert sum(of_bytes.values(), PerPass()) == step_bytes(TINY, counts, Derivatives(), itemsize=4)
    assert all((parts[part].step > 0) == (of_bytes[part].step > 0) for part in Part)
    differing = {part for part in Part if parts[part] != fewer[part]}
    assert differing == {Part.embedding, Part.line_attention, Part.line_refinement}
