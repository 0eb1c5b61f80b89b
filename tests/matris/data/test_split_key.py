"""Validation splits that keep the frames of a group together."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest

from janus.mesh import Mesh
from matris.cli import main
from matris.config import LossConfig
from matris.data.dataset import groups_aside, open_dataset
from matris.data.prepare import PrepareOptions, prepare
from matris.setup import build_setup
from matris.train_config import DataConfig
from tests.matris.data.frames_of import copper
from tests.matris.train.labelled import TINY, settings

CUTOFFS = {"pairwise_cutoff": TINY.pairwise_cutoff, "three_body_cutoff": TINY.three_body_cutoff}
LONG = "a path that goes on and on/" * 9


@pytest.fixture
def xyz(tmp_path: Path) -> str:
    """Five trajectories of four frames, mixed; the names of two differ only far behind."""
    names = ["cold", "hot", f"{LONG}1", f"{LONG}2", "7"]
    frames = [copper(seed) for seed in range(20)]
    for index, frame in enumerate(frames):
        frame.info["trajectory"] = names[index % 5]
    ase.io.write(tmp_path / "train.xyz", frames)
    return str(tmp_path / "train.xyz")


def groups_of(dataset) -> set[int]:
    """The frames of a group have the same number modulo 5."""
    return {int(dataset.identifier(index).rpartition(":")[2]) % 5 for index in range(len(dataset))}


@pytest.mark.parametrize("prepared", [False, True])
def test_no_group_is_on_both_sides(xyz: str, tmp_path: Path, prepared: bool) -> None:
    store = str(tmp_path / "train.h5")
    if prepared:
        assert main(["prepare", xyz, "--output", store, "--split_key", "trajectory", "--num_workers", "0"]) == 0
        prepare([store], tmp_path / "again.h5", PrepareOptions(split_key="trajectory"))
        store = str(tmp_path / "again.h5")
    data = {"train": [store if prepared else xyz], "valid": [], "valid_fraction": 0.4, "split_key": "trajectory"}
    seen = set()
    for seed in range(4):
        config = settings(tmp_path, data=data, training={"seed": seed}, loss=LossConfig())
        datasets = build_setup(config, Mesh()).datasets
        assert (len(datasets.train), len(datasets.valid)) == (12, 8)
        train, valid = groups_of(datasets.train), groups_of(datasets.valid)
        assert train | valid == set(range(5))
        assert not train & valid
        seen.add(frozenset(valid))
    assert len(seen) > 1


def test_without_a_split_key_nothing_is_stored(xyz: str, tmp_path: Path) -> None:
    prepare([xyz], tmp_path / "a.h5", PrepareOptions())
    dataset = open_dataset([str(tmp_path / "a.h5")], **CUTOFFS, cache_dir=tmp_path)
    assert dataset[0].group is None
    with pytest.raises(ValueError, match=r"a\.h5: to be split by 'trajectory', but it was prepared with no such key"):
        open_dataset([str(tmp_path / "a.h5")], **CUTOFFS, cache_dir=tmp_path, split_key="trajectory")
    with pytest.raises(ValueError, match="prepare it again from the original files with --split_key trajectory"):
        prepare([str(tmp_path / "a.h5")], tmp_path / "b.h5", PrepareOptions(split_key="trajectory"))


def test_values_are_kept(xyz: str, tmp_path: Path) -> None:
    dataset = open_dataset([xyz], **CUTOFFS, cache_dir=tmp_path, split_key="trajectory")
    values = [dataset[index].group for index in range(5)]
    assert (values[0], values[1], values[4]) == ("cold", "hot", "7")
    assert values[2] != values[3]
    assert all(value is not None and value.startswith(LONG[:31]) and len(value) == 64 for value in values[2:4])
    np.testing.assert_array_equal(dataset.subset(np.arange(10, 20)).groups(), dataset.groups()[10:])


def test_a_frame_without_the_key_is_refused(xyz: str, tmp_path: Path) -> None:
    frames = ase.io.read(xyz, ":")
    del frames[3].info["trajectory"]
    ase.io.write(tmp_path / "b.xyz", frames)
    with pytest.raises(ValueError, match=r"b\.xyz, frame 3 .*: no info entry 'trajectory'"):
        open_dataset([str(tmp_path / "b.xyz")], **CUTOFFS, cache_dir=tmp_path, split_key="trajectory")


def test_how_many_groups() -> None:
    groups = np.repeat(np.arange(4), [50, 30, 15, 5])
    for seed in range(20):
        aside = groups_aside(groups, 10, seed)
        assert 0 < aside.sum() < 4
        assert np.bincount(groups)[aside].sum() in (5, 15)
    assert groups_aside(np.repeat([0, 1], 50), 1, seed=0).sum() == 1
    assert groups_aside(np.repeat([0, 1], 50), 99, seed=0).sum() == 1
    with pytest.raises(ValueError, match="one group"):
        groups_aside(np.zeros(5, int), 1, seed=0)


def test_a_key_without_a_split_is_refused() -> None:
    with pytest.raises(ValueError, match="valid names files"):
        DataConfig(train=["a"], valid=["b"], split_key="trajectory")
    with pytest.raises(ValueError, match="valid_fraction is 0"):
        DataConfig(train=["a"], valid_fraction=0.0, split_key="trajectory")
