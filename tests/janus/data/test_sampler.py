import numpy as np
import pytest

from janus.data.packing import Budget
from janus.data.sampler import GlobalBatchSampler, SequentialSampler
from janus.data.shuffle import WHOLE


@pytest.mark.parametrize(("num_records", "size"), [(10, 3), (7, 7), (5, 100), (100, 16), (1, 1)])
def test_every_epoch_has_every_record_once(num_records, size):
    sampler = GlobalBatchSampler(num_records, global_batch_size=size, seed=3)
    for epoch in range(3):
        steps = range(sampler.first_step(epoch), sampler.first_step(epoch + 1))
        batches = [sampler.indices(step) for step in steps]
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(num_records))
        lengths = [len(batch) for batch in batches]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert {sampler.epoch(step) for step in steps} == {epoch}


def test_a_step_depends_on_seed_and_step_alone():
    sizes = np.random.default_rng(0).integers(1, 50, (200, 3))
    budget = Budget(limits=(500, None, 400), names=("a", "b", "c"))
    for options in ({"global_batch_size": 16}, {"global_budget": budget, "sizes": sizes}):
        forward = GlobalBatchSampler(200, seed=1, **options)
        batches = [forward.indices(step) for step in range(40)]
        backward = GlobalBatchSampler(200, seed=1, **options)
        for step in reversed(range(40)):
            np.testing.assert_array_equal(backward.indices(step), batches[step])
        other = GlobalBatchSampler(200, seed=2, **options)
        assert not np.array_equal(other.indices(0), batches[0])


def test_global_budget_is_kept_and_used():
    sizes = np.random.default_rng(0).integers(1, 50, (300, 2))
    sampler = GlobalBatchSampler(300, sizes=sizes, global_budget=Budget(limits=(400, None), names=("a", "b")))
    last = sampler.first_step(1)
    sums = [sizes[sampler.indices(step)][:, 0].sum() for step in range(last)]
    assert max(sums) <= 400
    assert min(sums[:-1]) > 350
    records = np.concatenate([sampler.indices(step) for step in range(last)])
    np.testing.assert_array_equal(np.sort(records), np.arange(300))
    assert sampler.epoch(last) == 1


def test_many_records_need_no_table():
    """Of more records than an order is held for, and more than are computed with at a time."""
    count = 3 * WHOLE // 2
    sizes = np.random.default_rng(0).integers(1, 50, (count, 2))
    budget = Budget(limits=(40_000, None), names=("a", "b"))
    groups, shares = (count - 1000, 1000), np.array([3.0, 1.0])
    for options in ({"global_batch_size": 1000}, {"global_budget": budget, "sizes": sizes}):
        sampler = GlobalBatchSampler(count, seed=1, **options)
        batches = [sampler.indices(step) for step in range(sampler.first_step(1))]
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(count))
        if "sizes" in options:
            sums = [sizes[batch][:, 0].sum() for batch in batches]
            following = [sizes[batch[0], 0] for batch in batches[1:]]
            assert max(sums) <= 40_000
            assert all(own + first > 40_000 for own, first in zip(sums, following, strict=False))  # none had room
        drawn = GlobalBatchSampler(count, groups=groups, shares=shares, **options)
        records = np.concatenate([drawn.indices(step) for step in range(drawn.first_step(1))])
        times = np.bincount(records, minlength=count)
        assert times[: count - 1000].sum() == count * 3 // 4
        assert times[: count - 1000].max() == 1
        assert times[count - 1000 :].max() - times[count - 1000 :].min() <= 1


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="empty"):
        GlobalBatchSampler(0, global_batch_size=1)
    with pytest.raises(ValueError, match="exactly one"):
        GlobalBatchSampler(3)
    with pytest.raises(ValueError, match="at least 1"):
        GlobalBatchSampler(3, global_batch_size=0)
    with pytest.raises(ValueError, match="less than the largest record"):
        GlobalBatchSampler(1, sizes=np.array([[9]]), global_budget=Budget(limits=(8,), names=("atoms",)))


def test_sequential_covers_all_in_order():
    sampler = SequentialSampler(10, global_batch_size=4)
    assert sampler.num_steps == 3
    np.testing.assert_array_equal(np.concatenate([sampler.indices(step) for step in range(3)]), np.arange(10))
