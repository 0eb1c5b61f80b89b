import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from janus.data.loader import StepLoader
from janus.data.packing import Budget
from janus.data.sampler import GlobalBatchSampler, SequentialSampler


class Numbers:
    """Record i is the number i."""

    def __init__(self, count: int) -> None:
        self.sizes = np.random.default_rng(0).integers(1, 20, (count, 3))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> int:
        return index

    def identifier(self, index: int) -> str:
        return f"number {index}"


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        raise ValueError(f"record {index} is broken")


def make_loader(dataset=None, **options):
    dataset = dataset or Numbers(50)
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=12, seed=5)
    return StepLoader(dataset, sampler, sorted, **{"num_steps": 9, **options})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_global_batches_do_not_depend_on_the_ranks(world_size):
    reference = list(make_loader())
    ranks = [list(make_loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, expected in enumerate(reference):
        batches = [rank[step] for rank in ranks]
        assert all(batch.step == step for batch in batches)
        together = [record for batch in batches for micro_batch in batch.micro_batches for record in micro_batch]
        assert sorted(together) == sorted(expected.indices)  # all of them, none twice
        for batch in batches:
            np.testing.assert_array_equal(batch.indices, expected.indices)


def test_budget_is_respected():
    loader = make_loader(budget=Budget(limits=(30, None, 40), names=("a", "b", "c")))
    for batch in loader:
        for micro_batch in batch.micro_batches:
            assert (loader.dataset.sizes[micro_batch].sum(axis=0)[[0, 2]] <= (30, 40)).all()


def test_starts_at_any_step():
    whole = list(make_loader())
    rest = list(make_loader(start_step=4, num_steps=5))
    assert [batch.step for batch in rest] == [4, 5, 6, 7, 8]
    for got, expected in zip(rest, whole[4:], strict=True):
        assert got.micro_batches == expected.micro_batches


def test_more_ranks_than_records():
    dataset = Numbers(3)
    loaders = [
        StepLoader(dataset, SequentialSampler(3, global_batch_size=2), list, num_steps=2, rank=rank, world_size=4)
        for rank in range(4)
    ]
    counts = [[len(batch.micro_batches) for batch in loader] for loader in loaders]
    assert counts == [[1, 1], [1, 0], [0, 0], [0, 0]]


def test_workers_give_the_same_stream():
    budget = Budget(limits=(40, None, None), names=("a", "b", "c"))
    alone = list(make_loader(budget=budget, world_size=2))
    helped = list(make_loader(budget=budget, world_size=2, num_workers=2))
    assert [batch.micro_batches for batch in helped] == [batch.micro_batches for batch in alone]


def test_reads_lazily():
    seen = []

    class Watched(Numbers):
        def __getitem__(self, index: int) -> int:
            seen.append(index)
            return index

    iterator = iter(make_loader(Watched(50)))
    next(iterator)
    assert len(seen) <= 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_that_can_is_asked_for_a_micro_batch_at_once(num_workers):
    class Together(Broken):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [*indices, -1]  # to be told from records

    budget = Budget(limits=(40, None, None), names=("a", "b", "c"))
    plain = make_loader(budget=budget)
    for batch, expected in zip(make_loader(Together(50), budget=budget, num_workers=num_workers), plain, strict=True):
        assert batch.micro_batches == [[-1, *micro_batch] for micro_batch in expected.micro_batches]


def test_oversize_record_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"number \d+: "):
        make_loader(budget=Budget(limits=(3, None, None), names=("a", "b", "c")))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_records_surface(num_workers):
    with pytest.raises(ValueError, match="is broken"):
        next(iter(make_loader(Broken(20), num_workers=num_workers)))


def test_rank_out_of_range():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        make_loader(rank=2, world_size=2)


def test_workers_ignore_the_stop_signals_of_schedulers_but_not_of_their_parent():
    """Slurm sends SIGTERM to every process; Python itself ends workers with it at its exit, and waits for them."""
    code = """
import os, signal, multiprocessing
from tests.janus.data.test_loader import make_loader
batches = iter(make_loader(num_workers=1, num_steps=30))
next(batches)
(worker,) = multiprocessing.active_children()
for number in ("TERM", "USR1"):
    os.system(f"kill -{number} {worker.pid}")
print(sum(1 for _ in zip(range(20), batches)), worker.is_alive(), flush=True)
keep = batches  # alive at the exit, as after an error
raise RuntimeError
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["20", "True"]
    assert run.returncode == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_that_run_together_get_as_many_micro_batches(num_workers):
    budget = Budget(limits=(30, None, 40), names=("a", "b", "c"))
    counts = []
    for rank in range(5):
        options = {"budget": budget, "rank": rank, "world_size": 5, "num_steps": 4}
        plain = [batch.micro_batches for batch in make_loader(**options)]
        together = [batch.micro_batches for batch in make_loader(**options, same_count=True, num_workers=num_workers)]
        for share, padded in zip(plain, together, strict=True):
            assert len(padded) >= len(share)
            assert sorted(chain(*padded)) == sorted(chain(*share))
        counts.append([len(padded) for padded in together])
    assert all(count == counts[0] for count in counts)
