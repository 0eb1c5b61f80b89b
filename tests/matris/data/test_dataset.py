import pickle
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from janus.data.loader import StepLoader
from janus.data.sampler import GlobalBatchSampler
from matris.data.dataset import Collate, graph_budget, label_totals, open_dataset
from matris.data.demo import make_demo
from matris.data.frames import refuse_idle_keys
from matris.data.labels import LabelKeys
from matris.data.prepare import PrepareOptions, prepare
from tests.matris.data.frames_of import copper, unlabelled

CUTOFFS = {"pairwise_cutoff": 5.0, "three_body_cutoff": 3.5}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo"), num=60)


@pytest.fixture
def dataset(demo, tmp_path):
    return open_dataset([str(demo.train)], **CUTOFFS, cache_dir=tmp_path / "cache")


def test_raw_file_through_the_cache(demo, tmp_path):
    cache = tmp_path / "cache"
    first = open_dataset([str(demo.train)], **CUTOFFS, cache_dir=cache)
    (store,) = cache.iterdir()
    written = store.stat().st_mtime_ns
    second = open_dataset([str(demo.train)], **CUTOFFS, cache_dir=cache)
    assert store.stat().st_mtime_ns == written
    images = ase.io.read(demo.train, ":")
    assert len(first) == len(second) == len(images) == 48
    for i in (0, 17, 47):
        np.testing.assert_array_equal(second[i].structure.positions, images[i].positions)
        assert second[i].labels.energy == images[i].calc.results["energy"]
    # Other cutoffs, other entry; a changed file, another one.
    open_dataset([str(demo.train)], pairwise_cutoff=4.0, three_body_cutoff=3.0, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2
    changed = tmp_path / "changed.xyz"
    changed.write_text(demo.train.read_text())
    assert len(open_dataset([str(changed)], **CUTOFFS, cache_dir=cache)) == 48
    ase.io.write(changed, images[:3])
    assert len(open_dataset([str(changed)], **CUTOFFS, cache_dir=cache)) == 3


def test_several_processes_at_once(demo, tmp_path):
    """Ranks that start together agree on one store."""
    code = f"""
from matris.data.dataset import open_dataset
cache = {str(tmp_path / "c")!r}
data = open_dataset([{str(demo.train)!r}], pairwise_cutoff=5.0, three_body_cutoff=3.5, cache_dir=cache)
print(len(data), data.sizes.sum())
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {rank.communicate()[0] for rank in ranks}
    assert len(answers) == 1
    assert answers.pop().startswith("48 ")
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_process_that_ends_just_now_is_no_error(demo, tmp_path, monkeypatch):
    """It removes the folder between the attempt to make it and the next look at it."""
    mkdir, answers = Path.mkdir, [FileExistsError]

    def racing(self, *arguments, **options):
        if self.name.endswith(".parts") and answers:
            raise answers.pop()
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", racing)
    assert prepare([str(demo.train)], tmp_path / "a.h5", PrepareOptions()).num_frames == 48
    assert not answers


def test_sizes_are_recounted_for_other_cutoffs(demo, tmp_path):
    store = tmp_path / "a.h5"
    prepare([str(demo.train)], store, PrepareOptions())
    cache = tmp_path / "cache"
    recounted = open_dataset([str(store)], **CUTOFFS, cache_dir=cache)
    fresh = open_dataset([str(demo.train)], **CUTOFFS, cache_dir=cache)
    np.testing.assert_array_equal(recounted.sizes, fresh.sizes)
    (kept,) = cache.glob("*.npy")
    written = kept.stat().st_mtime_ns
    open_dataset([str(store)], **CUTOFFS, cache_dir=cache)
    assert kept.stat().st_mtime_ns == written


def test_several_files_are_one_set(demo, tmp_path):
    store = tmp_path / "valid.h5"
    prepare([str(demo.valid)], store, PrepareOptions(task="other"))
    whole = open_dataset([str(demo.train), str(store), str(demo.test)], **CUTOFFS, cache_dir=tmp_path)
    assert len(whole) == 60
    assert whole.task_names == ("default", "other")
    assert whole.task_index.tolist() == [0] * 48 + [1] * 6 + [0] * 6
    assert whole.identifier(48) == f"{demo.valid}:0"
    assert whole.identifier(59) == f"{demo.test}:5"
    assert whole[50].task == "other"


def test_masks_and_totals(tmp_path):
    images = [copper(0), unlabelled(1), copper(2, repeat=2)]
    del images[0].calc.results["forces"]
    ase.io.write(tmp_path / "a.xyz", images)
    dataset = open_dataset([str(tmp_path / "a.xyz")], **CUTOFFS, cache_dir=tmp_path)
    assert dataset.label_presence.energy.tolist() == [True, False, True]
    totals = label_totals(dataset, np.array([2, 1, 0]))
    assert (totals.energy_structures, totals.forces_structures, totals.stress_structures) == (2.0, 1.0, 2.0)
    assert (totals.forces_atoms, totals.magmoms_atoms) == (8.0, 0.0)


def test_collate_and_totals_agree(dataset):
    collate = Collate(**CUTOFFS, task_names=dataset.task_names)
    indices = np.array([3, 1, 40])
    batch = collate([dataset[int(i)] for i in indices])
    assert batch.identifiers == tuple(dataset.identifier(int(i)) for i in indices)
    assert batch.graph.task.tolist() == [0, 0, 0]
    sizes = dataset.sizes[indices].sum(axis=0).tolist()
    assert [batch.graph.num_atoms, batch.graph.num_edges, batch.graph.num_angles] == sizes
    assert label_totals(dataset, indices) == type(label_totals(dataset, indices)).of([(batch.graph, batch.labels)])
    assert batch.labels.energy.dtype == torch.float64
    moved = batch.to("cpu")
    assert moved.identifiers == batch.identifiers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_global_batch_within_budgets(dataset, num_workers):
    budget = graph_budget(max_atoms=20, max_angles=15_000)
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=16, seed=1)
    collate = Collate(**CUTOFFS, task_names=dataset.task_names)
    streams = [
        StepLoader(
            dataset, sampler, collate, num_steps=4, rank=rank, world_size=2, budget=budget, num_workers=num_workers
        )
        for rank in range(2)
    ]
    for batches in zip(*streams, strict=True):
        names = [name for batch in batches for micro in batch.micro_batches for name in micro.identifiers]
        assert sorted(names) == sorted(dataset.identifier(int(i)) for i in batches[0].indices)
        for micro in (micro for batch in batches for micro in batch.micro_batches):
            assert micro.graph.num_atoms <= 20
            assert micro.graph.num_angles <= 15_000


def test_too_large_for_the_budget_is_named(dataset):
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=4)
    with pytest.raises(ValueError, match=r"train\.xyz:\d+: 12 atoms, .*\nraise the budget to at least 12 atoms"):
        StepLoader(dataset, sampler, list, num_steps=1, budget=graph_budget(max_atoms=10))


def test_subset_split_and_pickle(dataset):
    train, valid = dataset.split(0.25, seed=0)
    assert (len(train), len(valid)) == (36, 12)
    names = {part.identifier(i) for part in (train, valid) for i in range(len(part))}
    assert len(names) == 48
    again = dataset.split(0.25, seed=0)[1]
    assert [again.identifier(i) for i in range(12)] == [valid.identifier(i) for i in range(12)]
    np.testing.assert_array_equal(valid.sizes[:, 0], [len(valid[i].structure.numbers) for i in range(12)])
    copy = pickle.loads(pickle.dumps(valid))
    assert copy[3].identifier == valid[3].identifier
    with pytest.raises(ValueError, match="a fraction of 1 of 48"):
        dataset.split(1.0, seed=0)


def test_mistakes(demo, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_dataset(["none.xyz"], **CUTOFFS)
    with pytest.raises(ValueError, match="no data files"):
        open_dataset([], **CUTOFFS)
    with pytest.raises(ValueError, match="'magmoms'"):
        open_dataset([str(demo.train)], **CUTOFFS, cache_dir=tmp_path, wanted=("magmoms",))
    with pytest.raises(ValueError, match="looked for under nothing"):
        open_dataset([str(demo.train)], **CUTOFFS, cache_dir=tmp_path, keys=LabelKeys(stress="nothing"))


def test_keys_that_would_do_nothing_are_refused(demo, tmp_path):
    store = tmp_path / "a.h5"
    prepare([str(demo.valid)], store, PrepareOptions())
    with pytest.raises(ValueError, match=r"no effect on stores \(energy=dft"):
        refuse_idle_keys([str(store)], LabelKeys(energy="dft"))
    with pytest.raises(ValueError, match="no effect on stores"):
        prepare([str(store)], tmp_path / "b.h5", PrepareOptions(keys=LabelKeys(energy="dft")))
    refuse_idle_keys([str(store), str(demo.train)], LabelKeys(energy="dft"))
    refuse_idle_keys([str(store)], LabelKeys())


def test_corrupt_store_is_refused(demo, tmp_path):
    store = tmp_path / "a.h5"
    prepare([str(demo.train)], store, PrepareOptions())
    store.write_bytes(store.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"a\.h5: corrupt or truncated"):
        open_dataset([str(store)], **CUTOFFS, cache_dir=tmp_path)


def test_demo_is_deterministic_and_small(tmp_path):
    first, second, other = (
        make_demo(tmp_path / name, num=20, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.train.read_bytes() != other.train.read_bytes()
    images = ase.io.read(first.train, ":")
    assert max(len(atoms) for atoms in images) <= 12
    assert {len(ase.io.read(path, ":")) for path in (first.valid, first.test)} == {2}
    with pytest.raises(ValueError, match="at least 10"):
        make_demo(tmp_path, num=5)


def test_samples_together_are_samples_one_by_one(demo, tmp_path):
    """Of several stores, in any order, with repeats; and a structure is three reads of a file."""
    files = []
    for number, frames in enumerate((ase.io.read(demo.train, ":7"), [unlabelled(1), copper(2)])):
        ase.io.write(tmp_path / f"{number}.xyz", frames)
        files.append(tmp_path / f"{number}.xyz")
    dataset = open_dataset(files, **CUTOFFS, cache_dir=tmp_path / "cache").subset(np.array([8, 1, 7, 0, 3, 5]))
    chosen = [5, 0, 2, 2, 1]
    assert dataset.__getitems__([]) == []  # a rank without structures in a step
    together = dataset.__getitems__(chosen)
    for index, sample in zip(chosen, together, strict=True):
        alone = dataset[index]
        for one, other in ((sample, alone), (sample.structure, alone.structure), (sample.labels, alone.labels)):
            for name, value in vars(one).items():
                if name not in ("structure", "labels"):
                    np.testing.assert_array_equal(value, getattr(other, name), strict=isinstance(value, np.ndarray))
    assert together[2].labels.forces is None  # the unlabelled one
    assert not np.shares_memory(together[2].structure.positions, together[3].structure.positions)


def test_a_structure_is_three_reads(dataset, monkeypatch):
    """Whatever its size, its labels, and how many come together."""
    calls = []
    table = type(dataset.stores[0]._table(None).dataset)
    plain = table.__getitem__
    monkeypatch.setattr(table, "__getitem__", lambda self, rows: calls.append(rows) or plain(self, rows))
    dataset.__getitems__([3, 40, 17, 5])
    assert len(calls) == 4 * 3
