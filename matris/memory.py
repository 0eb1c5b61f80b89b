"""Peak memory of a training step on one rank beside its weights, predicted from hyper-parameters and counts.

What a step holds at its peak grows with the rows of a micro-batch: with each atom, undirected edge and angle by so many
rows of features per block (what two backward passes want), so many once (what is on its way when the second backward
pass begins, in the last block), and so many numbers that no width changes (geometry in float64, indices). With experts
the edges' tokens come on top, in rows of `moe_router_topk` times the hidden width. The numbers below are of these
programs: they were fitted to exact counts of living tensor bytes over widths, depths and shapes of graphs, and
`tests/matris/test_memory.py` counts again, elsewhere, and allows a tenth.

With full recomputation a block keeps three rows of features per row: its inputs, what arrives at it in the force pass,
and what arrives in the second one. All else is there of one block alone, in its last pass, with the gradients of its
weights, which are handed over when that is over, all at once. It is at its most in one of two or three moments.

A tensor axis divides most of it, which is not counted, and neither is what a rank borrows over a graph axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from janus.ops.fused import Kernels
from matris.config import ModelConfig
from matris.cost import Counts


@dataclass(frozen=True, kw_only=True)
class Held:
    """Numbers that a row keeps alive at the peak.

    Attributes:
        block: rows of the feature width, per block.
        once: rows of the feature width, beside.
        numbers: whatever the width.
        expert_block, expert_once: rows of `moe_router_topk * moe_ffn_hidden_size`, per block and beside.
        expert_token: rows of `moe_router_topk` times the feature width, per block.
    """

    block: float
    once: float = 0.0
    numbers: float = 0.0
    expert_block: float = 0.0
    expert_once: float = 0.0
    expert_token: float = 0.0

    def common(self, config: ModelConfig) -> float:
        """Of one row, without what is of experts."""
        return (config.num_layers * self.block + self.once) * config.hidden_size + self.numbers

    def of_experts(self, config: ModelConfig) -> float:
        """Likewise, what is."""
        layers, hidden = config.num_layers, config.moe_ffn_hidden_size
        per_copy = (layers * self.expert_block + self.expert_once) * hidden
        return config.moe_router_topk * (per_copy + layers * self.expert_token * config.hidden_size)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One of each kind of row."""

    atom: Held
    undirected: Held
    angle: Held


_KEPT = Rows(
    atom=Held(block=0.0, once=60.4),
    undirected=Held(block=117.2, once=11.5),
    angle=Held(block=44.2, once=10.7),
)
"""Without recomputation."""
_MADE_AGAIN = Rows(
    atom=Held(block=28.2, once=43.7),
    undirected=Held(block=78.3, once=28.3),
    angle=Held(block=28.2, once=19.1),
)
_KEPT_WITH_EXPERTS = Rows(
    atom=Held(block=0.0),
    undirected=Held(block=121.0, expert_block=29.4),
    angle=Held(block=43.0, once=3.5),
)
_MADE_AGAIN_WITH_EXPERTS = Rows(
    atom=Held(block=31.0),
    undirected=Held(block=89.0, expert_block=14.8),
    angle=Held(block=27.7, once=16.9),
)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Of a step with full recomputation, which may be its peak.

    Attributes:
        rows: that are held.
        num_sites: of experts, whose weights have gradients by then that the block still holds, and that are on the way.
        num_squares: likewise of other weights, in squares of the width.
        num_hidden: likewise of those that shared experts have (without experts the attention), in products of the width
            and the hidden width.
    """

    rows: Rows
    num_sites: int
    num_squares: int
    num_hidden: int


_BLOCKS_MADE_AGAIN = (
    Moment(  # the angles' norm
        rows=Rows(
            atom=Held(block=3.0, once=48.5),
            undirected=Held(block=3.0, once=84.2),
            angle=Held(block=3.0, once=54.7),
        ),
        num_sites=0,
        num_squares=32,
        num_hidden=16,
    ),
    Moment(  # the attention over atoms
        rows=Rows(
            atom=Held(block=3.0, once=38.1),
            undirected=Held(block=3.0, once=132.5),
            angle=Held(block=3.0, once=28.6),
        ),
        num_sites=0,
        num_squares=46,
        num_hidden=16,
    ),
)
_BLOCKS_MADE_AGAIN_WITH_EXPERTS = (
    Moment(  # the angles' norm
        rows=Rows(
            atom=Held(block=3.0, once=56.7),
            undirected=Held(block=3.0, once=93.4, expert_once=10.0),
            angle=Held(block=3.0, once=55.0),
        ),
        num_sites=2,
        num_squares=37,
        num_hidden=16,
    ),
    Moment(  # the experts that make messages
        rows=Rows(
            atom=Held(block=3.0, expert_once=11.1),
            undirected=Held(block=3.0, once=117.3, expert_once=34.0),
            angle=Held(block=3.0, once=26.3),
        ),
        num_sites=1,
        num_squares=33,
        num_hidden=8,
    ),
    Moment(  # the end of the pass, when the gradients of all weights are handed over
        rows=Rows(
            atom=Held(block=3.0, expert_once=39.3),
            undirected=Held(block=3.0, once=127.2, expert_once=3.7),
            angle=Held(block=3.0, once=24.1),
        ),
        num_sites=3,
        num_squares=51,
        num_hidden=16,
    ),
)
_SHARES = {"bf16-mixed": (0.85, 0.93, 0.9), "native": (0.92, 0.9, 0.79), "released form": (0.95, 1.0, 1.0)}
"""Of the above: with products in bf16, with native kernels, and with attention that is not smooth, each without
recomputation, with it, and of whole blocks."""
_BATCH_BYTES = Rows(
    atom=Held(block=0.0, numbers=40.0), undirected=Held(block=0.0, numbers=104.0), angle=Held(block=0.0, numbers=40.0)
)
"""Bytes of the micro-batch itself: indices, and positions."""


@dataclass(frozen=True, kw_only=True)
class UnitBytes:
    """Bytes of a micro-batch as a linear function of its counts.

    Attributes:
        constant: of any micro-batch.
        atom, edge, angle: for each atom, directed edge and angle.
    """

    constant: float
    atom: float
    edge: float
    angle: float

    @property
    def per_unit(self) -> tuple[float, float, float]:
        """Of an atom, a directed edge and an angle."""
        return self.atom, self.edge, self.angle

    def scaled(self, factor: float) -> UnitBytes:
        """So many times each."""
        return UnitBytes(**{name: factor * value for name, value in vars(self).items()})


def step_memory(
    config: ModelConfig,
    counts: Counts,
    *,
    recompute_bytes: int | None,
    recompute_blocks: bool = False,
    itemsize: int = 4,
    bf16: bool = False,
    kernels: Kernels = "torch",
    expert_ranks: int = 1,
) -> float:
    """Bytes at the peak of a training step with forces and stress, micro-batch included, weights and gradients not,
    but for those gradients that a block made again holds until its pass is over.

    Args:
        config: of the model.
        counts: of the micro-batch.
        recompute_bytes: as `MatRIS.recompute_bytes`; results that reach it are made again.
        recompute_blocks: as `MatRIS.recompute_blocks`; then results of any size are made again.
        itemsize: of the features' numbers.
        bf16: whether products are formed in bf16, of features in fp32.
        kernels: that run; those of Triton count as torch's.
        expert_ranks: that share the experts of a site, each with whole ones at home.
    """
    share = _share(config, recompute_bytes, recompute_blocks, bf16=bf16, kernels=kernels)
    if recompute_blocks:
        return max(
            unit.constant + counts.atoms * unit.atom + 2 * counts.undirected * unit.edge + counts.angles * unit.angle
            for unit in _moments(config, share, itemsize, expert_ranks)
        )
    rows = {"atom": counts.atoms, "undirected": counts.undirected, "angle": counts.angles}
    total = 0.0
    for kind, number in rows.items():
        results = [number * _result_bytes(config, kind, of_experts, itemsize) for of_experts in (False, True)]
        common, of_experts = (recompute_bytes is not None and result >= recompute_bytes for result in results)
        total += number * _row_bytes(config, kind, (common, of_experts), itemsize)
    return share * total


def unit_bytes(
    config: ModelConfig,
    *,
    recompute_bytes: int | None,
    recompute_blocks: bool = False,
    itemsize: int = 4,
    bf16: bool = False,
    kernels: Kernels = "torch",
    expert_ranks: int = 1,
) -> UnitBytes:
    """A linear bound of `step_memory`, equal but for the constant where micro-batches are large in every count; where
    blocks with experts are made again, the least one for all compositions of a micro-batch."""
    share = _share(config, recompute_bytes, recompute_blocks, bf16=bf16, kernels=kernels)
    if recompute_blocks:
        moments = _moments(config, share, itemsize, expert_ranks)
        return UnitBytes(**{name: max(getattr(unit, name) for unit in moments) for name in vars(moments[0])})
    constant, of_row = 0.0, {}
    again = recompute_bytes is not None
    for kind in ("atom", "undirected", "angle"):
        of_row[kind] = _row_bytes(config, kind, (again, again), itemsize)
        for number, kept_too in enumerate(((False, True), (True, False)) if recompute_bytes is not None else ()):
            # With fewer rows than these, results are small, and kept.
            assert recompute_bytes is not None
            rows = recompute_bytes / max(_result_bytes(config, kind, bool(number), itemsize), 1.0)
            constant += rows * max(0.0, _row_bytes(config, kind, kept_too, itemsize) - of_row[kind])
    unit = UnitBytes(constant=constant, atom=of_row["atom"], edge=of_row["undirected"] / 2.0, angle=of_row["angle"])
    return unit.scaled(share)


def _share(
    config: ModelConfig, recompute_bytes: int | None, recompute_blocks: bool, *, bf16: bool, kernels: Kernels
) -> float:
    policy = 2 if recompute_blocks else 0 if recompute_bytes is None else 1
    ways = {"bf16-mixed": bf16, "native": kernels == "native", "released form": not config.smooth_attention}
    return math.prod(_SHARES[way][policy] for way, chosen in ways.items() if chosen)


def _moments(config: ModelConfig, share: float, itemsize: int, expert_ranks: int) -> list[UnitBytes]:
    """Bytes in each moment of a block that is made again."""
    width = config.hidden_size
    hidden = config.moe_ffn_hidden_size if config.num_moe_experts else width
    # Of a token, three rows of features, to a hidden layer for core and gate, and from each to a row of features.
    site = -(-config.num_moe_experts // expert_ranks) * 8 * width * hidden

    def weights(moment: Moment) -> int:
        return moment.num_sites * site + (moment.num_squares * width + moment.num_hidden * hidden) * width

    def of_row(rows: Rows, kind: str) -> float:
        held: Held = getattr(rows, kind)
        batch: Held = getattr(_BATCH_BYTES, kind)
        return share * (itemsize * (held.common(config) + held.of_experts(config)) + batch.numbers)

    return [
        UnitBytes(
            constant=float(itemsize * weights(moment)),
            atom=of_row(moment.rows, "atom"),
            edge=of_row(moment.rows, "undirected") / 2.0,
            angle=of_row(moment.rows, "angle"),
        )
        for moment in (_BLOCKS_MADE_AGAIN_WITH_EXPERTS if config.num_moe_experts else _BLOCKS_MADE_AGAIN)
    ]


def _result_bytes(config: ModelConfig, kind: str, of_experts: bool, itemsize: int) -> int:
    """Of what is made for one row, of which undirected edges have two."""
    width = 2 * config.moe_router_topk * config.moe_ffn_hidden_size if of_experts else config.hidden_size
    return itemsize * width * (2 if kind == "undirected" else 1)


def _row_bytes(config: ModelConfig, kind: str, made_again: tuple[bool, bool], itemsize: int) -> float:
    """
    Args:
        made_again: whether common results are, and whether those of experts are.
    """
    kept, again = (_KEPT_WITH_EXPERTS, _MADE_AGAIN_WITH_EXPERTS) if config.num_moe_experts else (_KEPT, _MADE_AGAIN)
    common, of_experts = (getattr(again if chosen else kept, kind) for chosen in made_again)
    batch: Held = getattr(_BATCH_BYTES, kind)
    return itemsize * (common.common(config) + of_experts.of_experts(config)) + batch.numbers
