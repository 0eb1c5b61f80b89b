"""Two levels of theory in one run: the same structures, once with energies of another zero and another unit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms

from janus.checkpoint import read_directory
from janus.mesh import Mesh
from janus.telemetry.csv_log import read_csv
from matris.calculator import MatRISCalculator
from matris.cli import main
from matris.config import LossConfig
from matris.data.dataset import StructureDataset, open_dataset
from matris.data.demo import ELEMENTS, make_demo
from matris.evaluation import Portions, evaluate_dataset
from matris.exported import load_model
from matris.setup import build_setup
from matris.train_config import LabelWeights, TaskConfig, to_plain
from tests.matris.train.labelled import settings

UNIT = 2.5
NO_FILES: dict[str, Any] = {"train": [], "valid": []}
ERRORS = ("energy_mae_meV_per_atom", "forces_mae_meV_per_A", "stress_mae_meV_per_A3")


def shift(atoms: Atoms) -> float:
    """Sum of other zeros of the atoms, eV."""
    return float(sum(-100.0 - 3.5 * atoms.numbers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_tasks")
    demo = make_demo(path / "demo", num=120)
    for name in ("train", "valid", "test"):
        frames = [frame for frame in ase.io.read(getattr(demo, name), ":") if len(frame) <= 8]
        ase.io.write(path / f"{name}_emt.xyz", frames, format="extxyz")
        for frame in frames:
            results = frame.calc.results
            for label in ("energy", "forces", "stress"):
                if label in results:
                    results[label] = UNIT * results[label]
            results["energy"] += shift(frame)
        ase.io.write(path / f"{name}_far.xyz", frames[: 2 * len(frames) // 3], format="extxyz")
    return path


def tasks(folder: Path, *names: str, **fields: Any) -> list[TaskConfig]:
    return [
        TaskConfig(name=name, **{part: [str(folder / f"{part}_{name}.xyz")] for part in ("train", "valid")}, **fields)
        for name in names
    ]


def options(folder: Path, output: Path, data: dict[str, Any], *words: str, train_iters: int = 4) -> list[str]:
    """Command line of a run, as a YAML file with options after it."""
    portions = {**NO_FILES, "global_batch_size": 8, **data}
    training = {"train_iters": train_iters, "eval_interval": train_iters // 2, "log_interval": 1, "precision": "fp64"}
    values = to_plain(settings(folder, data=portions, training=training, optim={"lr": 1e-2, "ema_decay": 0.8}))
    values["loss"]["magmoms_weight"] = 0.0
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return ["train", "--config", str(path), "--training.output", str(output), *words]


def of_both(folder: Path) -> dict[str, Any]:
    """Unequal weights in sampler and loss."""
    first, second = tasks(folder, "emt", "far")
    weights = LabelWeights(energy=2.0, forces=0.5)
    test = [str(folder / "test_far.xyz")]
    second = TaskConfig(**{**vars(second), "test": test, "weight": 3.0, "label_weights": weights})
    return {"tasks": [first, second], "task_temperature": 2.0}


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """The run, and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(options(folder, folder / "finished", of_both(folder), train_iters=60)) == 0
    return folder / "finished", shown.getvalue()


def test_both_references_and_scales_are_found(folder: Path, finished: tuple[Path, str]) -> None:
    model = load_model(finished[0] / "best")
    assert model.hyper.tasks == ("emt", "far")
    assert set(model.elements_of_task) == {"emt", "far"}
    (emt, far), numbers = model.reference_energies.numpy(), np.array(model.elements_of_task["far"])
    assert len(numbers) == len(ELEMENTS)
    # Other structures were fitted, so references agree as well as a fit does, beside shifts of hundreds of eV.
    np.testing.assert_allclose(far[numbers - 1] - UNIT * emt[numbers - 1], -100.0 - 3.5 * numbers, atol=1.0)
    assert model.energy_scale[1] / model.energy_scale[0] == pytest.approx(UNIT, rel=0.2)


def test_each_task_is_reported(folder: Path, finished: tuple[Path, str]) -> None:
    output, shown = finished
    metrics = json.loads((output / "metrics.json").read_text())
    rows = read_csv(output / "log.csv")
    best = next(row for row in rows if row["step"] == metrics["step"] and "valid_loss" in row)
    for task in ("emt", "far"):
        for name in ERRORS:
            logged = best[f"valid_{task}/{name}"]
            assert metrics["valid"]["tasks"][task][name] == pytest.approx(logged, rel=1e-9)
        assert sum(f"{task}/{ERRORS[0]}" in row for row in rows) > 50  # a batch may have the other task alone
    assert set(metrics["test"]["tasks"]) == {"far"}
    counts = [metrics["valid"]["tasks"][task]["num_labels"]["energy"] for task in ("emt", "far")]
    assert sum(counts) == metrics["valid"]["num_labels"]["energy"]
    assert min(counts) > 0
    for words in ("references   emt: fit", "references   far: fit", "emt: ", "      far: E "):
        assert words in shown
    # Both are learned: better than at the start, and far beyond what one table of references could do.
    first = next(row for row in rows if row["step"] == 0)
    for task, unit in (("emt", 1.0), ("far", UNIT)):
        assert best[f"valid_{task}/{ERRORS[1]}"] < 0.9 * first[f"valid_{task}/{ERRORS[1]}"]
        assert best[f"valid_{task}/{ERRORS[0]}"] < 200.0 * unit


def test_epochs_have_the_shares_of_the_tasks(folder: Path) -> None:
    setup = build_setup(settings(folder, data=NO_FILES | of_both(folder), loss=LossConfig()), Mesh())
    sampler, train = setup.sampler, setup.datasets.train
    counts = np.bincount(train.task_index)
    shares = np.array([1.0, 3.0]) * np.sqrt(counts)
    records = np.concatenate([sampler.indices(step) for step in range(setup.steps_per_epoch)])
    drawn = np.bincount(train.task_index[records])
    assert drawn.sum() == len(train)
    assert abs(drawn - len(train) * shares / shares.sum()).max() < 1.0
    # Small temperatures draw from the largest task alone, up to one structure of each other.
    cold_data = NO_FILES | {"tasks": tasks(folder, "emt", "far"), "task_temperature": 1e-4}
    cold = build_setup(settings(folder, data=cold_data, loss=LossConfig()), Mesh())
    records = np.concatenate([cold.sampler.indices(step) for step in range(cold.steps_per_epoch)])
    assert np.bincount(train.task_index[records]).tolist() == [len(train) - 1, 1]


def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path) -> None:
    words = [options(folder, folder / name, of_both(folder)) for name in ("whole", "stopped")]
    assert main(words[0]) == 0
    shutil.copytree(folder / "whole", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "step_00000004")
    assert main([*words[1], "--data.num_workers", "1"]) == 0
    found, expected = (
        read_directory(folder / name / "checkpoints" / "step_00000004")[0] for name in ("stopped", "whole")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_other_proportions_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = of_both(folder)
    first, second = data["tasks"]
    lighter = {"tasks": [TaskConfig(**{**vars(first), "weight": 0.5}), second]}
    assert main(options(folder, tmp_path / "run", data)) == 0
    for change, words in (({"task_temperature": 1.0}, "data.task_temperature was 2.0, is 1.0"), (lighter, "weight")):
        capsys.readouterr()
        assert main(options(folder, tmp_path / "run", data | change, train_iters=6)) == 0
        assert words in capsys.readouterr().out


def test_other_tasks_are_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = of_both(folder)
    assert main(options(folder, tmp_path / "run", data)) == 0
    swapped = {"tasks": data["tasks"][::-1]}
    renamed = {"tasks": [data["tasks"][0], TaskConfig(**{**vars(data["tasks"][1]), "name": "scan"})]}
    for change in (swapped, renamed):
        capsys.readouterr()
        assert main(options(folder, tmp_path / "run", data | change, train_iters=6)) == 2
        assert "of another model: model.tasks was ['emt', 'far'], is" in capsys.readouterr().err


def test_fine_tuning_of_one_task(folder: Path, finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    base = load_model(finished[0] / "best")
    words = ["--init_from", str(finished[0] / "best")]
    assert main(options(folder, folder / "tuned", {"tasks": tasks(folder, "far")}, *words)) == 0
    assert "are those of" in capsys.readouterr().out
    tuned = load_model(folder / "tuned" / "best")
    assert tuned.hyper == base.hyper
    assert tuned.elements_of_task == base.elements_of_task
    assert torch.equal(tuned.reference_energies, base.reference_energies)
    assert torch.equal(tuned.energy_scale, base.energy_scale)
    metrics = json.loads((folder / "tuned" / "metrics.json").read_text())
    assert set(metrics["valid"]["tasks"]) == {"far"}


def test_fine_tuning_with_new_references_of_one_task(
    folder: Path, finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_model(finished[0] / "best")
    data = {"tasks": tasks(folder, "far", reference_energies="none")}
    assert main(options(folder, folder / "tuned_none", data, "--init_from", str(finished[0] / "best"))) == 0
    assert "reference energies aside" in capsys.readouterr().out
    tuned = load_model(folder / "tuned_none" / "best")
    assert torch.equal(tuned.reference_energies[0], base.reference_energies[0])
    assert not tuned.reference_energies[1].any()


@pytest.mark.parametrize(
    ("names", "words"), [(("scan",), "data.tasks has scan.*knows emt, far"), ((), "data.tasks has no task")]
)
def test_fine_tuning_on_other_tasks_is_refused(
    folder: Path, finished: tuple[Path, str], names: tuple[str, ...], words: str
) -> None:
    data = {"tasks": [TaskConfig(name=name, train=[str(folder / "train_emt.xyz")]) for name in names]}
    data = data if names else {"train": [str(folder / "train_emt.xyz")]}
    with pytest.raises(ValueError, match=words):
        build_setup(
            settings(folder, data=NO_FILES | data, loss=LossConfig(), init_from=str(finished[0] / "best")), Mesh()
        )


def test_fine_tuning_asks_for_no_other_states(folder: Path, finished: tuple[Path, str]) -> None:
    data = NO_FILES | {"tasks": tasks(folder, "far", needs=["spin"])}
    with pytest.raises(ValueError, match=r"data.tasks\[far\].needs has spin, which the base model"):
        build_setup(settings(folder, data=data, loss=LossConfig(), init_from=str(finished[0] / "best")), Mesh())


def test_states_that_are_missing_are_refused(folder: Path) -> None:
    data = NO_FILES | {"tasks": tasks(folder, "far", needs=["charge"])}
    with pytest.raises(ValueError, match=r"data.tasks\[far\].train: \d+ of \d+ structures do not state their charge"):
        build_setup(settings(folder, data=data, loss=LossConfig()), Mesh())


@pytest.mark.parametrize(("name", "value"), [("charge", 11), ("charge", 0.5), ("spin", 21)])
def test_states_that_no_model_knows_are_refused(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    frames = ase.io.read(folder / "train_emt.xyz", ":3")
    frames[1].info[name] = value
    ase.io.write(tmp_path / "odd.xyz", frames, format="extxyz")
    data = NO_FILES | {"tasks": [TaskConfig(name="emt", train=[str(tmp_path / "odd.xyz")])]}
    with pytest.raises(ValueError, match=r"data.tasks\[emt\].train: .*are known"):
        build_setup(settings(folder, data=data, loss=LossConfig()), Mesh())


def test_limits_of_a_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tasks(folder, "emt", "far")
    limited = TaskConfig(**{**vars(first), "max_force": 0.5})
    setup = build_setup(settings(folder, data=NO_FILES | {"tasks": [limited, second]}, loss=LossConfig()), Mesh())
    train, left_out = setup.datasets.train, setup.datasets.left_out
    assert set(left_out) == {"emt.train", "emt.valid"}
    kept = [train[index] for index in np.flatnonzero(train.task_index == 0)]
    assert len(kept) + left_out["emt.train"] == len(ase.io.read(folder / "train_emt.xyz", ":"))
    assert max(float(np.linalg.norm(sample.labels.forces, axis=1).max()) for sample in kept) <= 0.5
    nothing = TaskConfig(**{**vars(first), "max_stress": 1e-12, "max_force": 1e-30})
    with pytest.raises(ValueError, match=r"data.tasks\[emt\].train: none of \d+ structures is within max_force 1e-30"):
        build_setup(settings(folder, data=NO_FILES | {"tasks": [nothing, second]}, loss=LossConfig()), Mesh())


def test_evaluation_of_one_task(
    folder: Path, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "metrics.json"
    words = ["eval", "--model", str(finished[0] / "best"), "--data", str(folder / "test_far.xyz")]
    words += ["--cache_dir", str(folder / "cache"), "--output", str(output)]
    assert main([*words, "--task", "far"]) == 0
    report = json.loads(output.read_text())
    expected = json.loads((finished[0] / "metrics.json").read_text())["test"]
    for name in ERRORS:
        assert report[name] == pytest.approx(expected[name], rel=1e-9)
        assert report["tasks"]["far"][name] == report[name]
    assert main([*words, "--task", "emt"]) == 0  # another zero of energies
    assert json.loads(output.read_text())["energy_mae_meV_per_atom"] > 1e5
    for task, message in (([], "no task is given"), (["--task", "scan"], "choose emt, far")):
        capsys.readouterr()
        assert main([*words, *task]) == 2
        assert message in capsys.readouterr().err


def test_data_of_no_task_are_not_evaluated_as_the_first(folder: Path, finished: tuple[Path, str]) -> None:
    model = load_model(finished[0] / "best")
    cutoffs = {name: getattr(model.hyper, name) for name in ("pairwise_cutoff", "three_body_cutoff")}
    dataset = open_dataset([str(folder / "test_far.xyz")], **cutoffs, cache_dir=folder / "cache")
    with pytest.raises(ValueError, match=r"has the tasks default, and the model emt, far"):
        evaluate_dataset(model, dataset, Mesh(), Portions())


def test_relaxation_at_one_level(folder: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    words = ["relax", str(folder / "test_emt.xyz"), "--model", str(finished[0] / "best"), "--steps", "3"]
    energies = {}
    for task in ("emt", "far"):
        assert main([*words, "--task", task, "--output", str(tmp_path / task)]) == 1  # not converged in three steps
        first = ase.io.read(tmp_path / task / "trajectory.traj", 0)
        atoms = first.copy()
        atoms.calc = MatRISCalculator(finished[0] / "best", dtype="float64", task=task)
        energies[task] = first.get_potential_energy()
        assert energies[task] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert energies["far"] - UNIT * energies["emt"] == pytest.approx(shift(atoms), rel=0.02)
    assert main([*words, "--task", "scan", "--output", str(tmp_path / "scan")]) == 2


def test_keys_act_on_the_files_of_some_task(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "scan.h5"
    assert main(["prepare", str(folder / "train_emt.xyz"), "--output", str(store)]) == 0
    frames = ase.io.read(folder / "train_emt.xyz", ":")
    for frame in frames:
        frame.info["total"], frame.info["other"] = frame.calc.results["energy"] + 1.0, 7.0
    ase.io.write(tmp_path / "raw.xyz", frames, format="extxyz")
    raw = TaskConfig(name="raw", train=[str(tmp_path / "raw.xyz")])
    stored = TaskConfig(name="stored", train=[str(store)])

    def built(*entries: TaskConfig, **keys: str) -> StructureDataset:
        data = NO_FILES | {"tasks": list(entries), "valid_fraction": 0.0, **keys}
        return build_setup(settings(folder, data=data, loss=LossConfig()), Mesh()).datasets.train

    train = built(raw, stored, energy_key="total")
    assert train[0].labels.energy == pytest.approx(train[len(frames)].labels.energy + 1.0)
    own = TaskConfig(**{**vars(raw), "energy_key": "other"})
    assert built(own, stored, energy_key="total")[0].labels.energy == 7.0
    for entries, keys in (
        ((stored,), {"energy_key": "total"}),
        ((raw, TaskConfig(**{**vars(stored), "stress_unit": "GPa"})), {}),
    ):
        with pytest.raises(ValueError, match="label keys have no effect on stores"):
            built(*entries, **keys)


def test_a_store_of_another_task_is_not_taken_for_this_one(
    folder: Path, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "scan.h5"
    assert main(["prepare", str(folder / "train_emt.xyz"), "--task", "scan", "--output", str(store)]) == 0
    data = NO_FILES | {"tasks": [TaskConfig(name="pbe", train=[str(store)])]}
    with pytest.raises(ValueError, match=r"was prepared as the level of theory scan, not pbe"):
        build_setup(settings(folder, data=data), Mesh())
    words = ["eval", "--model", str(finished[0] / "best"), "--data", str(store), "--task", "far"]
    assert main([*words, "--output", str(tmp_path / "metrics.json")]) == 2
    assert "were prepared as the level of theory scan" in capsys.readouterr().err
    data = NO_FILES | {"tasks": [TaskConfig(name="scan", train=[str(store)])]}
    assert build_setup(settings(folder, data=data, loss=LossConfig()), Mesh()).model.hyper.tasks == ("scan",)
