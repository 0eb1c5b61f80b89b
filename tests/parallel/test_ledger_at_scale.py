"""The step on one of 1024 and of 16384 ranks: calls and bytes of every collective are closed formulas of the batch, and
bytes of weights on a rank closed formulas of the layout.

`tools/bench/fake_ranks.py` says how.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from janus.sharding.memory import COPIES
from matris.config import ModelConfig, NormType
from tests.parallel import ranks  # noqa: F401  # says what the server of all processes imports first
from tools.bench.fake_ranks import step_of_rank

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    pairwise_cutoff=4.0,
    three_body_cutoff=3.0,
    num_radial=3,
    num_angular=3,
    readout_hidden_sizes=(8,),
)
CONFIGS = {
    "layer norm": SMALL,
    "rms norm": replace(SMALL, num_layers=1, norm_type=NormType.rms, ffn_bias=True, enveloped_edge_update=False),
}
WITH_EXPERTS = {
    "experts": replace(
        SMALL,
        num_layers=4,
        num_elements=20,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=32,
        kv_channels=2,
    ),
    "experts around separable attention": replace(
        SMALL, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, separable_attention=True
    ),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as executor:
        yield executor


def check(
    pool: ProcessPoolExecutor,
    rank: int,
    world_size: int,
    layout: Mapping[str, int],
    name: str,
    policy: str = "regather",
) -> None:
    hyper = (CONFIGS | WITH_EXPERTS)[name]
    result = pool.submit(step_of_rank, rank, world_size, layout, hyper, policy).result(timeout=120.0)
    print(f"rank {rank} of {world_size}: mesh {result.seconds[0]:.1f} s, step {result.seconds[1]:.1f} s")
    assert {key.split("/")[0] for key in result.found.calls} >= set(layout)
    assert dict(result.found.calls) == dict(result.expected.calls)
    assert dict(result.found.bytes) == dict(result.expected.bytes)
    assert dict(result.found.wire_bytes) == pytest.approx(dict(result.expected.wire_bytes), rel=1e-12)
    assert abs(result.held - result.expected_held) <= COPIES * result.padding
    assert abs(result.gathered - result.expected_gathered) <= 3 * layout.get("shard", 1) * result.padding
    assert (result.gathered > 0) == ("shard" in layout)


@pytest.mark.parametrize("rank", [0, 517])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 8},
        {"graph": 4},
        {"shard": 16},
        {"shard": 1024},
        {"graph": 4, "tensor": 2},
        {"shard": 8, "graph": 2, "tensor": 4},
    ],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()) or "data",
)
def test_ranks_of_1024(pool: ProcessPoolExecutor, layout: dict[str, int], name: str, rank: int) -> None:
    check(pool, rank, 1024, layout, name)


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("layout", [{"tensor": 8}, {"graph": 4, "tensor": 2}, {"shard": 8, "graph": 2, "tensor": 4}])
def test_ranks_of_1024_with_experts(pool: ProcessPoolExecutor, layout: dict[str, int], name: str) -> None:
    """Whose experts are not shared over an axis of their own."""
    check(pool, 517, 1024, layout, name)


@pytest.mark.parametrize("rank", [0, 9733])
@pytest.mark.parametrize("policy", ["regather", "keep"])
def test_ranks_of_16384(pool: ProcessPoolExecutor, rank: int, policy: str) -> None:
    check(pool, rank, 16384, {"shard": 64, "graph": 4, "tensor": 8}, "layer norm", policy)
