"""Plans of experts for the tokens of real structures, on virtual ranks: even on every one."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest

from janus.data.packing import Budget, plan_micro_batches
from janus.expert_parallel.plan import expert_load, fixed_plan, plan_experts
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.presets import PRESETS

FILES = {"mp_crystals": "train.xyz.gz", "acac": "train_300K.xyz.gz", "tio2_pbe": "train.xyz.gz"}


@pytest.fixture(scope="module")
def counts(shared_directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Atoms, and directed edges by their target, of each structure and element, (n, 118) both."""
    atoms, edges = [], []
    for folder, name in FILES.items():
        path = shared_directory / "data" / folder / name
        if not path.exists():
            pytest.skip(f"no {path}")
        for frame in ase.io.iread(path, index=":200"):
            structure = Structure(
                numbers=frame.numbers.astype(np.int64),
                positions=frame.positions,
                cell=np.asarray(frame.cell),
                pbc=np.asarray(frame.pbc),
            )
            graph = build_graph(structure, pairwise_cutoff=6.0, three_body_cutoff=1e-3)
            atoms.append(np.bincount(structure.numbers - 1, minlength=118))
            edges.append(np.bincount(structure.numbers[graph.edge_target] - 1, minlength=118))
    return np.array(atoms), np.array(edges)


@pytest.mark.parametrize("model", ["moe-s", "moe-m", "moe-l"])
@pytest.mark.parametrize("num_ranks", [8, 64, 512])
def test_real_tokens_are_even(counts: tuple[np.ndarray, np.ndarray], model: str, num_ranks: int) -> None:
    atoms, edges = counts
    hyper = PRESETS[model]
    experts = hyper.num_moe_experts
    generator = np.random.default_rng(num_ranks)
    routing = np.argsort(-generator.normal(size=(118, experts)), axis=1)[:, : hyper.moe_router_topk]
    batch = generator.integers(len(atoms), size=8 * num_ranks)
    cost = edges[batch].sum(axis=1, keepdims=True)
    shares = plan_micro_batches(cost, num_ranks=num_ranks, budget=Budget())
    for tokens in (edges, atoms):
        histogram = np.array([tokens[batch[np.concatenate(share)]].sum(axis=0) for share in shares])
        load = expert_load(histogram, routing, experts)
        assert load.sum() == histogram.sum() * hyper.moe_router_topk
        sizes = {"token_bytes": 20.0 * hyper.hidden_size}
        sizes["expert_bytes"] = 32.0 * hyper.hidden_size * hyper.moe_ffn_hidden_size
        plan = plan_experts(load, **sizes)
        assert plan.balance <= 1.05
        np.testing.assert_array_equal(plan.kept.sum(axis=0) + plan.taken.sum(axis=0), load.sum(axis=0))
        np.testing.assert_array_equal(plan.num_replicas > 0, load.any(axis=0))
        if experts % num_ranks == 0:
            assert fixed_plan(load, num_ranks).balance > plan.balance
