"""A trained model knows the elements of its training data, and those of the model it started from."""

from __future__ import annotations

from pathlib import Path

import ase.io
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from janus.mesh import Mesh
from matris.config import LossConfig
from matris.exported import save_model
from matris.model import MatRIS
from matris.setup import build_setup
from tests.matris.train.labelled import TINY, settings, write_files


def test_elements_of_the_training_data(tmp_path: Path) -> None:
    write_files(tmp_path)
    frames = ase.io.read(tmp_path / "train.xyz", ":")
    # Forces alone teach an element too: silver is in no structure that has an energy.
    silver = frames[0].copy()
    silver.numbers[:] = 47
    silver.calc = SinglePointCalculator(silver, forces=frames[0].positions * 0.0 + 0.1)
    frames.append(silver)
    ase.io.write(tmp_path / "train.xyz", frames, format="extxyz")
    present = {int(number) for frame in frames for number in frame.numbers}
    config = settings(tmp_path, loss=LossConfig(), data={"reference_energies": "none"})
    assert build_setup(config, Mesh()).model.elements == tuple(sorted(present))

    base = MatRIS(TINY)
    base.elements = (1, 8)
    save_model(base, tmp_path / "base", provenance={})
    tuned = settings(tmp_path, loss=LossConfig(), init_from=str(tmp_path / "base"), data={"reference_energies": "none"})
    assert build_setup(tuned, Mesh()).model.elements == tuple(sorted(present | {1, 8}))
    kept = settings(tmp_path, loss=LossConfig(), init_from=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"has no reference energy: give --data.reference_energies fit"):
        build_setup(kept, Mesh())
