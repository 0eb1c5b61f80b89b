"""A model of several levels of theory under every layout: the results, gradients and weights of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ase.io
import pytest
import torch
from ase import Atoms

from janus.comm.adjoint import copy, reduce
from janus.mesh import Launch, Mesh
from matris.blocks import embedding
from matris.config import ModelConfig, Precision
from matris.exported import save_model
from matris.layouts import Layout, parse_layout
from matris.model import MatRIS
from matris.run import run_training
from matris.train_config import LabelWeights, TaskConfig, TrainConfig
from matris.verify import Row, measure, verify
from tests.parallel.gate import EXPERTS, MODEL, gate_config, write_gate_files
from tests.parallel.ranks import run_ranks

KINDS = {"dense": MODEL, "experts": EXPERTS}
LAYOUTS = {"dense": "dp2 fsdp2 fsdp2-keep gp2 tp2", "experts": "ep2 ep2-home ep2xgp2"}
TERMS = ("energy", "forces", "stress", "magmoms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gate's structures, those without a cell as a task of their own, and a base model for each kind."""
    path = tmp_path_factory.mktemp("tasks")
    write_gate_files(path)
    frames: list[Atoms] = ase.io.read(path / "mixed.xyz", ":")
    ions = [atoms for atoms in frames if not atoms.pbc.any()]
    for index, atoms in enumerate(ions):
        atoms.info.update(charge=index - 1, spin=index + 1)
    ase.io.write(path / "ions.xyz", ions, format="extxyz")
    ase.io.write(path / "crystals.xyz", [atoms for atoms in frames if atoms.pbc.all()], format="extxyz")
    for name in ("ions", "crystals"):
        shutil.copy(path / f"{name}.xyz", path / f"{name}_valid.xyz")
    for kind, hyper in KINDS.items():
        save_model(base_model(hyper), path / kind, provenance={})
    return path


def base_model(hyper: ModelConfig) -> MatRIS:
    """A new model has a projection of zeros, under which no other weight of the embedding has a gradient."""
    tasks = {"tasks": ("ions", "crystals"), "charge_tasks": ("ions",), "spin_tasks": ("ions",)}
    model = MatRIS(replace(hyper, **tasks), precision=Precision.fp64, seed=0)
    assert model.task_embedding is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.task_embedding.linear.weight.normal_()
        model.reference_energies.normal_()
        model.energy_scale.uniform_(0.5, 2.0)
    return model


def config_of(folder: Path, kind: str) -> TrainConfig:
    config = gate_config(folder, "mixed", "fp64", kind)
    tasks = [
        TaskConfig(
            name="ions",
            train=[str(folder / "ions.xyz")],
            needs=["charge", "spin"],
            label_weights=LabelWeights(energy=2.0, forces=0.5),
            weight=2.0,
        ),
        TaskConfig(name="crystals", train=[str(folder / "crystals.xyz")]),
    ]
    data = replace(config.data, train=[], tasks=tasks)
    return replace(config, data=data, model=ModelConfig(), init_from=str(folder / kind))


def run_layouts(launch: Launch, config: TrainConfig, names: Sequence[str]) -> list[Row]:
    return list(verify(config, [parse_layout(name) for name in names], launch, floor=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_change_nothing(folder: Path, kind: str) -> None:
    names = LAYOUTS[kind].split()
    for rows in run_ranks(2, run_layouts, config_of(folder, kind), names, with_mesh=False, timeout=400.0):
        assert len(rows) == len(names)
        assert not [row for row in rows if not row.passed]
        assert max(error for row in rows for error in row.errors.values()) < 1e-10


def run_config(folder: Path, layout: Layout) -> TrainConfig:
    """Batches of some structures, validation after each update, and errors of each task at the end."""
    config = config_of(folder, "dense")
    tasks = [replace(task, valid=[str(folder / f"{task.name}_valid.xyz")]) for task in config.data.tasks]
    return replace(
        config,
        data=replace(config.data, tasks=tasks, global_batch_size=3, task_temperature=2.0),
        training=replace(config.training, output=str(folder / layout.name), eval_interval=1),
        parallel=layout.applied(config.parallel),
    )


def train(launch: Launch, folder: Path, names: Sequence[str]) -> list[int]:
    return [run_training(run_config(folder, parse_layout(name))) for name in names]


@pytest.mark.slow
def test_errors_of_each_task_do_not_depend_on_the_layout(folder: Path) -> None:
    names = ("dp2", "gp2", "fsdp2")
    assert run_training(run_config(folder, Layout())) == 0
    assert run_ranks(2, train, folder, names, with_mesh=False, timeout=300.0) == [[0] * len(names)] * 2
    expected = json.loads((folder / "one" / "metrics.json").read_text())["valid"]["tasks"]
    assert set(expected) == {"ions", "crystals"}
    for name in names:
        found = json.loads((folder / name / "metrics.json").read_text())["valid"]["tasks"]
        assert set(found) == set(expected)
        for task, errors in expected.items():
            assert found[task]["num_labels"] == errors["num_labels"]
            for key in ("energy_mae_meV_per_atom", "forces_mae_meV_per_A", "energy_rmse_meV_per_atom"):
                assert found[task][key] == pytest.approx(errors[key], rel=1e-10), (name, task, key)


def copies_nothing(patch: pytest.MonkeyPatch) -> None:
    """What a rank's atoms take from the composition is no gradient of other ranks' atoms."""
    patch.setattr(embedding, "copy", lambda x, axis: x)


def composition_of_own_atoms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedding, "reduce", lambda x, axis: x)


def sums_twice_on_the_way_back(patch: pytest.MonkeyPatch) -> None:
    """An all-reduce that is its own adjoint, beside the `copy` that has summed already."""
    patch.setattr(embedding, "reduce", lambda x, axis: copy(reduce(x, axis), axis))


MISTAKES = ((copies_nothing, True), (composition_of_own_atoms, False), (sums_twice_on_the_way_back, True))
"""Each with whether predictions stay right."""


def make_mistakes(launch: Launch, config: TrainConfig) -> list[Row]:
    rows = []
    for mistake, _ in MISTAKES:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            rows += run_layouts(launch, config, ["gp2"])
    return rows


@pytest.mark.slow
def test_mistakes_over_the_graph_axis_are_seen(folder: Path) -> None:
    for rows in run_ranks(2, make_mistakes, config_of(folder, "dense"), with_mesh=False, timeout=300.0):
        for row, (mistake, hidden) in zip(rows, MISTAKES, strict=True):
            right = {name: error <= row.tolerance for name, error in row.errors.items()}
            assert all(right[name] for name in ("energy", "forces", "stress")) == hidden, (mistake, row.errors)
            assert not any(right[f"{term}_gradient"] for term in TERMS), (mistake, row.errors)


def test_every_term_reaches_every_weight_of_the_embedding(folder: Path) -> None:
    """Or else the comparison over layouts would compare zeros."""
    found = measure(config_of(folder, "dense"), Mesh())
    for term in TERMS:
        gradients = getattr(found, f"{term}_gradient")
        names = [name for name in gradients if name.startswith("task_embedding.")]
        assert len(names) == 9
        assert all(gradients[name].any() for name in names), term
