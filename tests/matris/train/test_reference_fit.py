"""Reference energies and the statistics that they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from janus.mesh import Mesh
from matris.data.records import Sample
from matris.elements import MAX_Z
from matris.graph.structure import Labels, Structure
from matris.reference_fit import LabelStatistics, label_statistics, reference_energies, reference_table

TRUE = {14: -5.0, 8: -3.0, 1: 0.5}


@dataclass(frozen=True)
class InMemory:
    """As much of a data set as the statistics need."""

    samples: list[Sample]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def dataset(compositions: list[list[int]], noise: float = 0.0, edges: int = 4) -> InMemory:
    rng = np.random.default_rng(0)
    samples = []
    for numbers in compositions:
        structure = Structure(
            numbers=np.array(numbers),
            positions=rng.normal(size=(len(numbers), 3)),
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, bool),
        )
        energy = sum(TRUE[number] for number in numbers) + noise * rng.normal() * len(numbers)
        labels = Labels(energy=energy, forces=rng.normal(size=(len(numbers), 3)))
        samples.append(Sample(identifier="x", structure=structure, labels=labels))
    sizes = np.array([(len(numbers), 0 if len(numbers) == 1 else edges, 0) for numbers in compositions])
    return InMemory(samples, sizes)


def statistics_of(compositions: list[list[int]], noise: float = 0.0) -> LabelStatistics:
    return label_statistics(dataset(compositions, noise), Mesh())  # type: ignore[arg-type]


def test_fit_finds_the_truth_and_the_residual() -> None:
    statistics = statistics_of([[14, 8, 8], [14], [8, 1, 1], [1, 1], [14, 1, 8]])
    energies = reference_energies("fit", statistics)
    assert {number: pytest.approx(energy) for number, energy in TRUE.items()} == {n: energies[n - 1] for n in TRUE}
    assert np.count_nonzero(energies) == 3
    assert statistics.residual(energies) < 1e-12
    assert "Si" in reference_table(energies, statistics)


def test_streaming_fit_is_the_direct_least_squares() -> None:
    rng = np.random.default_rng(1)
    compositions = [rng.choice([1, 8, 14], size=rng.integers(1, 6)).tolist() for _ in range(2500)]
    data = dataset(compositions, noise=0.1)
    statistics = label_statistics(data, Mesh())  # type: ignore[arg-type]
    rows = np.array([np.bincount(np.array(numbers) - 1, minlength=MAX_Z) / len(numbers) for numbers in compositions])
    target = np.array([sample.labels.energy / len(sample.structure.numbers) for sample in data.samples])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0]
    energies = reference_energies("fit", statistics)
    np.testing.assert_allclose(energies, expected, atol=1e-10)
    assert statistics.residual(energies) == pytest.approx(np.sqrt(np.mean((rows @ expected - target) ** 2)))
    forces = np.concatenate(
        [sample.labels.forces.ravel() for sample in data.samples if sample.labels.forces is not None]
    )
    assert statistics.rms_force == pytest.approx(np.sqrt(np.mean(forces**2)))


def test_one_composition_has_the_shortest_solution() -> None:
    statistics = statistics_of([[8, 1, 1]] * 3)
    energies = reference_energies("fit", statistics)
    assert energies[7] + 2 * energies[0] == pytest.approx(-2.0)
    assert energies[0] == pytest.approx(2 * energies[7])
    assert (statistics.rank, len(statistics.present)) == (1, 2)


def test_isolated_none_and_file(tmp_path: Path) -> None:
    statistics = statistics_of([[14], [8], [14, 8]])
    assert not reference_energies("none", statistics).any()
    isolated = reference_energies("isolated", statistics)
    assert (isolated[13], isolated[7]) == (-5.0, -3.0)
    path = tmp_path / "e0.json"
    path.write_text(json.dumps({"Si": -1.0, "O": -2.0, "He": 3.0}))
    from_file = reference_energies(str(path), statistics)
    assert (from_file[13], from_file[7], from_file[1]) == (-1.0, -2.0, 3.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Si": -1.0}', "no entry in .* for O"),
        ('{"Si": -1.0, "Xx": 1}', "unknown element 'Xx'"),
        ('{"Si": -1.0, "O": NaN}', "must be finite"),
        ("[1]", "expected JSON such as"),
        ("{", "expected JSON such as"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "e0.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        reference_energies(str(path), statistics_of([[14, 8]]))


def test_missing_isolated_atoms_and_missing_energies_are_refused() -> None:
    with pytest.raises(ValueError, match="no isolated atom in the training data for O"):
        reference_energies("isolated", statistics_of([[14], [14, 8]]))
    with pytest.raises(ValueError, match="no training structure has an energy"):
        reference_energies("fit", statistics_of([]))
