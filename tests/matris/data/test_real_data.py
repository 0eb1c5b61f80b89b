"""First-principles sets beside the repository; their README says what is in them."""

import pytest

from matris.data.consistency import Verdict
from matris.data.dataset import open_dataset
from matris.data.doctor import examine
from matris.data.prepare import PrepareOptions

OPTIONS = PrepareOptions(wanted=("energy",))


@pytest.mark.parametrize(
    ("name", "frames", "stress"),
    [("acac/train_300K", 500, False), ("mlearn_Si/test", 25, True), ("mp_crystals/test", 508, True)],
)
def test_every_frame_and_label_is_read(shared_directory, tmp_path, name, frames, stress):
    path = shared_directory / "data" / f"{name}.xyz.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = open_dataset([str(path)], pairwise_cutoff=6.0, three_body_cutoff=4.5, cache_dir=tmp_path)
    assert len(dataset) == frames
    assert dataset.label_presence.energy.all()
    assert dataset.label_presence.forces.all()
    assert dataset.label_presence.stress.all() == stress


def test_stress_of_silicon_has_the_right_unit_and_sign(shared_directory):
    path = shared_directory / "data" / "mlearn_Si" / "train.xyz.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    diagnosis = examine([str(path)], OPTIONS)
    assert not diagnosis.fatal
    assert diagnosis.stress.verdict is Verdict.plausible
    assert diagnosis.stress.slope == pytest.approx(1.0, abs=0.02)
    assert diagnosis.forces.verdict is Verdict.plausible
