"""What `train` and `eval` refuse in data and options, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest

from janus.mesh import Mesh
from matris.cli import main
from matris.config import LossConfig
from matris.exported import save_model
from matris.model import MatRIS
from matris.run import _differences, _open_output, run_training
from matris.run_table import run_table
from matris.setup import build_setup
from tests.matris.train.labelled import TINY, settings, write_files

PLAIN = LossConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_files(path)
    return path


def copy_of(folder: Path, output: Path, change: Callable[[ase.Atoms], None], name: str = "valid") -> str:
    frames = ase.io.read(folder / f"{name}.xyz", ":")
    for frame in frames:
        change(frame)
    ase.io.write(output, frames, format="extxyz")
    return str(output)


def without_labels(frame: ase.Atoms) -> None:
    frame.calc = None
    frame.arrays.pop("REF_magmoms", None)


def without_energy(frame: ase.Atoms) -> None:
    frame.calc.results.pop("energy", None)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("valid", without_labels, "no frame has the label 'energy'.* Give its key with --data.energy_key"),
        ("valid", without_energy, "no frame has the label 'energy'.* Give its key with --data.energy_key"),
        ("test", without_labels, "data.test has no label at all.* --data.forces_key"),
    ],
)
def test_data_without_labels(folder: Path, tmp_path: Path, part: str, change: Callable, message: str) -> None:
    path = copy_of(folder, tmp_path / "bare.xyz", change)
    output = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match=message):
        run_training(settings(folder, data={part: [path]}, training={"output": str(output)}, loss=PLAIN))
    assert not output.parent.exists()


def test_fraction_that_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"choose at most 0.958"):
        build_setup(settings(folder, data={"valid": [], "valid_fraction": 0.99}, loss=PLAIN), Mesh())


def test_two_levels_of_theory(folder: Path, tmp_path: Path) -> None:
    words = ["prepare", str(folder / "valid.xyz"), "--task", "r2scan", "--output", str(tmp_path / "other.h5")]
    assert main(words) == 0
    for part in ("train", "valid", "test"):
        paths = [str(folder / "train.xyz")] * (part == "train") + [str(tmp_path / "other.h5")]
        with pytest.raises(ValueError, match=r"task names default, r2scan.*data.tasks"):
            build_setup(settings(folder, data={part: paths}, loss=PLAIN), Mesh())


def test_charges_are_announced(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path / "charged.xyz", lambda frame: frame.info.update(charge=1.0))
    for valid, announced in ((path, True), (str(folder / "valid.xyz"), False)):
        config = settings(folder, data={"valid": [valid]}, loss=PLAIN)
        shown = run_table(config, build_setup(config, Mesh()), Mesh())
        assert ("charge of the structures differ" in shown) == announced


def test_global_budget(folder: Path) -> None:
    config = settings(folder, data={"global_batch_size": None, "global_max_atoms": 20}, loss=PLAIN)
    setup = build_setup(config, Mesh())
    sizes = setup.datasets.train.sizes[:, 0]
    parts = [setup.sampler.indices(step) for step in range(setup.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(24))
    assert max(sizes[part].sum() for part in parts) <= 20
    assert "at most 20 atoms per update, on average" in run_table(config, setup, Mesh())
    with pytest.raises(ValueError, match="exceed the budget of 3 atoms per update"):
        build_setup(settings(folder, data={"global_batch_size": None, "global_max_atoms": 3}, loss=PLAIN), Mesh())


def test_digest_of_the_training_data(folder: Path, tmp_path: Path) -> None:
    def digest(path: str) -> str:
        (found,) = build_setup(settings(folder, data={"train": [path]}, loss=PLAIN), Mesh()).statistics.values()
        return found.digest

    def shift(frame: ase.Atoms) -> None:
        if "stress" in frame.calc.results:
            frame.calc.results["stress"] = frame.calc.results["stress"] + 1e-3

    same = digest(copy_of(folder, tmp_path / "same.xyz", lambda frame: None, "train"))
    assert same == digest(str(folder / "train.xyz"))
    assert same != digest(copy_of(folder, tmp_path / "other.xyz", shift, "train"))


def test_differences_of_a_base(folder: Path) -> None:
    setup = build_setup(settings(folder, loss=PLAIN, training={"precision": "fp64"}), Mesh())
    (batch, *_) = setup.valid.micro_batches()
    one = setup.model(batch.graph)
    assert set(_differences(one, one, batch.graph.atoms_per_structure).values()) == {0.0}
    setup.model.energy_scale *= 1.01
    found = _differences(setup.model(batch.graph), one, batch.graph.atoms_per_structure)
    largest = float((one.interaction_energy / batch.graph.atoms_per_structure).abs().max())
    assert found["energy"] == pytest.approx(0.01 * largest)
    one.forces[0, 0] = float("nan")
    assert np.isnan(_differences(one, one, batch.graph.atoms_per_structure)["forces"])


def test_stale_exports_are_swept(tmp_path: Path) -> None:
    moved_aside = tmp_path / ".best.old.x" / "best"
    moved_aside.mkdir(parents=True)
    (moved_aside / "config.json").write_text("{}")
    (tmp_path / ".last.y").mkdir()
    _open_output(tmp_path, "")
    assert {path.name for path in tmp_path.iterdir()} == {"best", "config.yaml"}
    assert (tmp_path / "best" / "config.json").is_file()


def test_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MatRIS(TINY, seed=0)
    save_model(model, tmp_path / "model", provenance={})
    forces = copy_of(folder, tmp_path / "forces.xyz", without_energy)
    bare = copy_of(folder, tmp_path / "bare.xyz", without_labels)

    def evaluate(name: str, data: str, *words: str) -> int:
        options = ["--model", str(tmp_path / name), "--data", data, "--cache_dir", str(tmp_path / "cache")]
        return main(["eval", *options, "--output", str(tmp_path / "new" / "out.json"), *words])

    assert evaluate("model", bare) == 2
    error = capsys.readouterr().err
    assert "no structure has a label" in error
    assert "(--energy_key, --forces_key, ...)" in error
    assert evaluate("model", forces, "--energy_key", "nonsense") == 2
    assert "looked for under nonsense" in (error := capsys.readouterr().err)
    assert "with --energy_key" in error
    assert evaluate("model", forces, "--plot", "/dev/null/plot.png") == 2
    model.elements = (1, 8)
    save_model(model, tmp_path / "water", provenance={})
    assert evaluate("water", forces) == 2
    assert "was not trained on" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert evaluate("model", forces) == 0
    assert (tmp_path / "new" / "out.png").is_file()


def test_help_of_eval_has_no_empty_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert "(default: None)" not in capsys.readouterr().out
