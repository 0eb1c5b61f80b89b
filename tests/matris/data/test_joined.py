"""Data sets of several levels of theory as one, and limits on labels."""

from __future__ import annotations

import pickle
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from matris.data.dataset import StructureDataset, label_totals, open_dataset
from tests.matris.data.frames_of import copper, unlabelled

NAMES = ("a", "b", "c")


def frames() -> list[Atoms]:
    """Ten of copper with all labels, rattled more and more, one without labels, and two molecules without stress."""
    found = [copper(seed, rattle=0.02 * seed) for seed in range(10)]
    found.append(unlabelled())
    for name in ("H2O", "CH4"):
        atoms = molecule(name)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.full((len(atoms), 3), 2.0))
        found.append(atoms)
    return found


def opened(folder: Path, name: str, images: list[Atoms]) -> StructureDataset:
    path = folder / f"{name}.xyz"
    ase.io.write(path, images, format="extxyz")
    return open_dataset([str(path)], pairwise_cutoff=4.0, three_body_cutoff=3.0, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StructureDataset]:
    folder = tmp_path_factory.mktemp("joined")
    images = frames()
    return {
        "many": opened(folder, "many", images),
        "few": opened(folder, "few", images[3:6]),
        "bare": opened(folder, "bare", [*images[:1], images[10]]),
    }


def names_of(dataset: StructureDataset) -> list[tuple[str, str]]:
    samples = [dataset[index] for index in range(len(dataset))]
    return [(sample.task, sample.identifier.rsplit("/", 1)[-1]) for sample in samples]


def test_joined_is_one_after_the_other(parts: dict[str, StructureDataset]) -> None:
    many = parts["many"].subset(np.array([7, 2, 11]))
    joined = StructureDataset.joined([("c", many), ("a", parts["few"])], NAMES)
    assert joined.task_names == NAMES
    assert joined.task_index.tolist() == [2, 2, 2, 0, 0, 0]
    expected = [("c", f"many.xyz:{n}") for n in (7, 2, 11)] + [("a", f"few.xyz:{n}") for n in range(3)]
    assert names_of(joined) == expected
    np.testing.assert_array_equal(joined.sizes, np.concatenate([many.sizes, parts["few"].sizes]))
    assert joined.label_presence.stress.tolist() == [True, True, False, True, True, True]
    np.testing.assert_array_equal(joined.sizes, joined.column("size"))
    assert len(joined.stores) == 2


def test_a_data_set_may_be_there_for_two_tasks(parts: dict[str, StructureDataset]) -> None:
    joined = StructureDataset.joined([("a", parts["few"]), ("b", parts["few"])], NAMES)
    assert [task for task, _ in names_of(joined)] == ["a"] * 3 + ["b"] * 3
    assert joined[1].labels.energy == joined[4].labels.energy


def test_parts_of_the_joined_keep_their_tasks(parts: dict[str, StructureDataset]) -> None:
    joined = StructureDataset.joined([("b", parts["few"]), ("a", parts["many"]), ("c", parts["bare"])], NAMES)
    chosen = np.array([17, 0, 5, 2])
    assert names_of(joined.subset(chosen)) == [names_of(joined)[index] for index in chosen]
    assert joined.subset(chosen).task_index.tolist() == [2, 1, 0, 1]
    twice = joined.subset(chosen).subset(np.array([3, 0]))
    assert names_of(twice) == [names_of(joined)[2], names_of(joined)[17]]
    rest, aside = joined.split(0.3, seed=1)
    assert sorted(names_of(rest) + names_of(aside)) == sorted(names_of(joined))
    assert rest.task_names == aside.task_names == NAMES
    # Joined again: what was chosen of a joined data set, as one level of theory.
    again = StructureDataset.joined([("a", joined.subset(chosen))], ("a",))
    assert [name for _, name in names_of(again)] == [names_of(joined)[index][1] for index in chosen]
    assert set(again.task_index) == {0}


def test_totals_count_over_all_tasks(parts: dict[str, StructureDataset]) -> None:
    joined = StructureDataset.joined([("b", parts["bare"]), ("a", parts["few"])], NAMES)
    totals = label_totals(joined, np.array([0, 1, 2, 2]))  # a record that is drawn twice counts twice
    assert (totals.energy_structures, totals.forces_atoms, totals.stress_structures) == (3, 12, 3)


@pytest.mark.parametrize(
    "limits", [(None, None), (1.0, None), (None, 0.02), (1.0, 0.02), (0.01, None), (1e-9, 1e-9), (1e9, 1e9)]
)
def test_within_against_a_loop(parts: dict[str, StructureDataset], limits: tuple[float | None, float | None]) -> None:
    force, stress = (np.inf if limit is None else limit for limit in limits)
    for dataset in (parts["many"], parts["many"].subset(np.array([12, 9, 1, 10]))):
        expected = []
        for index in range(len(dataset)):
            labels = dataset[index].labels
            lengths = [0.0] if labels.forces is None else [float(np.linalg.norm(row)) for row in labels.forces]
            largest = 0.0 if labels.stress is None else float(np.abs(labels.stress).max())
            if max(lengths) <= force and largest <= stress:
                expected.append(dataset[index].identifier)
        kept = dataset.within(max_force=limits[0], max_stress=limits[1])
        assert [kept[index].identifier for index in range(len(kept))] == expected


def test_limits_act_on_both_labels(parts: dict[str, StructureDataset]) -> None:
    """The cases above leave out some and keep some: of molecules forces alone speak."""
    many = parts["many"]
    kept = [
        len(many.within(max_force=force, max_stress=stress)) for force, stress in ((1.0, None), (None, 0.02), (1e-9, 1))
    ]
    assert all(0 < count < len(many) for count in kept)
    molecules = many.subset(np.array([11, 12]))
    assert len(molecules.within(max_force=None, max_stress=1e-9)) == 2
    assert len(molecules.within(max_force=3.4, max_stress=None)) == 0
    assert len(molecules.within(max_force=3.5, max_stress=None)) == 2


def test_large_data_sets_share_their_rows(
    parts: dict[str, StructureDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files that the next process finds, whatever was done with them; and as those of small ones are."""

    cutoffs = {"pairwise_cutoff": 4.0, "three_body_cutoff": 3.0}
    for name, images in (("many", frames()), ("few", frames()[3:6])):
        ase.io.write(tmp_path / f"{name}.xyz", images, format="extxyz")

    def made() -> list[StructureDataset]:
        many, few = (
            open_dataset([str(tmp_path / f"{name}.xyz")], cache_dir=tmp_path / "cache", **cutoffs)
            for name in ("many", "few")
        )
        within = many.within(max_force=1.0, max_stress=None)
        rest, aside = many.split(0.3, seed=1)
        joined = StructureDataset.joined([("c", rest), ("a", few)], NAMES)
        return [many, few, within, rest, aside, joined, *joined.split(0.25, seed=2)]

    small = made()
    assert not list(tmp_path.rglob("*.rows"))
    monkeypatch.setattr("janus.data.shared_rows.SHARED_FROM", 1)
    large = made()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.rows")}
    assert len(files) == len(large)
    again = made()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.rows")} == files
    for one, other, third in zip(small, large, again, strict=True):
        read = pickle.loads(pickle.dumps(third))
        assert len(pickle.dumps(third)) < len(pickle.dumps(one))
        for dataset in (other, third, read):
            assert names_of(dataset) == names_of(one)
            np.testing.assert_array_equal(dataset.sizes, one.sizes)
            np.testing.assert_array_equal(dataset.task_index, one.task_index)
            np.testing.assert_array_equal(dataset.column("charge"), one.column("charge"))
            assert vars(label_totals(dataset)) == vars(label_totals(one))
    # Other limits, other fractions and other seeds are other files.
    large[0].within(max_force=0.9, max_stress=None)
    large[0].split(0.3, seed=3)
    large[0].split(0.4, seed=1)
    assert len(list(tmp_path.rglob("*.rows"))) == len(files) + 5


def test_records_by_their_task(parts: dict[str, StructureDataset]) -> None:
    joined = StructureDataset.joined([("b", parts["few"]), ("a", parts["many"])], NAMES)
    assert joined.task_runs() == [(1, slice(0, 3)), (0, slice(3, 16))]
    assert list(joined.by_task()) == ["a", "b"]
    assert names_of(joined.by_task()["b"]) == names_of(joined)[:3]
    mixed = joined.subset(np.array([0, 5, 1, 6]))
    assert mixed.task_runs() == [(1, slice(0, 1)), (0, slice(1, 2)), (1, slice(2, 3)), (0, slice(3, 4))]
    assert names_of(mixed.by_task()["a"]) == [names_of(joined)[index] for index in (5, 6)]


def test_totals_of_all_and_elements(parts: dict[str, StructureDataset]) -> None:
    many = parts["many"]
    assert vars(label_totals(many)) == vars(label_totals(many, np.arange(len(many))))
    assert many.elements().tolist() == [1, 6, 8, 29]
    assert many.subset(np.array([11])).elements().tolist() == [1, 8]
