"""Models of several levels of theory: what the embedding may depend on, directories, pruning, and the calculator."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from matris.calculator import MatRISCalculator
from matris.config import ModelConfig, Precision
from matris.exported import config_sha256, load_model, save_model
from matris.graph.batch import collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS, Prediction
from matris.pruning import keep_elements
from tests.matris.structures import EXPERTS, TINY, all_kinds, rattled
from tests.matris.test_continuity import crossing, pulled

NAMES = ("pbe", "wb97m", "scan")


def awake(hyper: ModelConfig) -> MatRIS:
    """As if trained: the projection of a new model is zero."""
    tasks = {"tasks": NAMES, "charge_tasks": ("wb97m",), "spin_tasks": ("wb97m",)}
    model = MatRIS(replace(hyper, **tasks), precision=Precision.fp64, seed=1)
    assert model.task_embedding is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.task_embedding.linear.weight.normal_()
        model.reference_energies.normal_()
        model.energy_scale.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> MatRIS:
    return awake({"dense": TINY, "experts": EXPERTS}[request.param])


def predict(model: MatRIS, *states: tuple[Atoms, int, float, float]) -> Prediction:
    """Of structures, each with its task, charge and spin."""
    hyper = model.hyper
    cutoffs = {"pairwise_cutoff": hyper.pairwise_cutoff, "three_body_cutoff": hyper.three_body_cutoff}
    atoms, tasks, charges, spins = zip(*states, strict=True)
    graphs = [build_graph(Structure.from_atoms(item), **cutoffs) for item in atoms]
    return model(collate_graphs(graphs, tasks=tasks, charges=charges, spins=spins))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))


def test_a_new_model_with_tasks_starts_as_one_without() -> None:
    plain = MatRIS(TINY, precision=Precision.fp64, seed=4)
    tasks = MatRIS(replace(TINY, tasks=("pbe",)), precision=Precision.fp64, seed=4)
    before = predict(plain, (rattled(bulk("Si")), 0, math.nan, 0.0))
    after = predict(tasks, (rattled(bulk("Si")), 0, 3.0, 2.0))
    for name in ("energy", "forces", "stress", "magmoms"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert set(plain.state_dict()) == {name for name in tasks.state_dict() if not name.startswith("task_embedding.")}
    assert (plain.reference_energies.shape, plain.energy_scale.shape) == ((94,), ())
    assert (tasks.reference_energies.shape, tasks.energy_scale.shape) == ((1, 94), (1,))


def test_each_task_of_a_new_model_starts_alike() -> None:
    plain = MatRIS(EXPERTS, precision=Precision.fp64, seed=4)
    several = MatRIS(replace(EXPERTS, tasks=NAMES), precision=Precision.fp64, seed=4)
    expected = predict(plain, (molecule("CH4"), 0, math.nan, 0.0))
    for task in range(len(NAMES)):
        found = predict(several, (molecule("CH4"), task, -1.0, 2.0))
        assert torch.equal(found.energy, expected.energy)
        assert torch.equal(found.forces, expected.forces)


def test_a_charge_that_is_not_stated_is_none(model: MatRIS) -> None:
    states = [(molecule("CH4"), 1, charge, spin) for charge in (math.nan, 0.0) for spin in (0.0, 1.0)]
    unstated, unstated_singlet, neutral, neutral_singlet = predict(model, *states).energy.tolist()
    assert (unstated, unstated_singlet) == (neutral, neutral_singlet)
    assert unstated != unstated_singlet


def test_each_task_has_its_scale_and_references(model: MatRIS) -> None:
    numbers = torch.tensor([6, 1, 1, 1, 1])
    found = predict(model, *((molecule("CH4"), task, 0.0, 1.0) for task in range(3)))
    references = model.reference_energies[:, numbers - 1].sum(dim=1)
    assert_same(found.reference_energy, references)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.energy_scale[1] *= 3.0
    again = predict(scaled, *((molecule("CH4"), task, 0.0, 1.0) for task in range(3)))
    assert_same(again.interaction_energy, torch.tensor([1.0, 3.0, 1.0]) * found.interaction_energy)
    assert_same(again.forces[5:10], 3.0 * found.forces[5:10])


def slope(model: MatRIS, displaced: Callable[[float], Atoms], step: float) -> float:
    """dE/dx at zero, by the fourth-order central difference."""
    energy = predict(model, *((displaced(k * step), 1, 1.0, 2.0) for k in (-2, -1, 1, 2))).energy
    return float((energy[0] - 8 * energy[1] + 8 * energy[2] - energy[3]) / (12 * step))


def test_forces_and_stress_are_slopes_of_the_energy(model: MatRIS) -> None:
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.2), 0.1)
    found = predict(model, (atoms, 1, 1.0, 2.0))

    def moved(x: float) -> Atoms:
        image = atoms.copy()
        image.positions[1, 2] += x
        return image

    def strained(x: float) -> Atoms:
        image = atoms.copy()
        strain = np.array([[0.0, x / 2, 0.0], [x / 2, 0.0, 0.0], [0.0, 0.0, 0.0]])
        image.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        return image

    assert abs(slope(model, moved, 3e-4) + found.forces[1, 2].item()) <= 1e-7 * found.forces.abs().max()
    assert found.stress is not None
    value = slope(model, strained, 1e-4) / atoms.cell.volume
    assert abs(value - found.stress[0, 0, 1].item()) <= 1e-7 * found.stress.abs().max()


def test_task_charge_and_spin_all_matter(model: MatRIS) -> None:
    states = [(0, 0.0, 1.0), (1, 0.0, 1.0), (2, 0.0, 1.0), (0, 1.0, 1.0), (0, -1.0, 1.0), (0, 0.0, 2.0), (0, 0.0, 0.0)]
    found = predict(model, *((molecule("CH3CH2OH"), *state) for state in states))
    scale = model.energy_scale[torch.tensor([task for task, *_ in states])]
    assert len(set((found.interaction_energy / scale).numpy().round(8).tolist())) == len(states)


@pytest.mark.parametrize("repeats", [(2, 1, 1), (3, 1, 1)])
def test_supercell(model: MatRIS, repeats: tuple[int, int, int]) -> None:
    atoms, count = rattled(bulk("NaCl", "rocksalt", a=5.2), 0.1), int(np.prod(repeats))
    single, large = predict(model, (atoms, 1, 1.0, 2.0)), predict(model, (atoms * repeats, 1, 1.0, 2.0))
    assert_same(large.energy, count * single.energy)
    assert_same(large.forces, single.forces.repeat(count, 1))
    assert_same(large.stress, single.stress)


def test_energy_does_not_depend_on_batch_mates(model: MatRIS) -> None:
    states = [(atoms, n % 3, float(n % 5 - 2), float(n % 4)) for n, atoms in enumerate(all_kinds().values())]
    together, first = predict(model, *states), 0
    for index, state in enumerate(states):
        alone, last = predict(model, state), first + len(state[0])
        assert_same(together.energy[index], alone.energy[0])
        assert_same(together.forces[first:last], alone.forces)
        if state[0].cell.volume:
            assert_same(together.stress[index], alone.stress[0])
        first = last


def test_energy_does_not_depend_on_the_order(model: MatRIS) -> None:
    atoms = all_kinds()["left-handed cell"]
    forward = [(atoms, 0, math.nan, 0.0), (molecule("CH4"), 1, 1.0, 2.0), (atoms, 2, 0.0, 3.0), (atoms, 1, -2.0, 1.0)]
    assert_same(predict(model, *reversed(forward)).energy.flip(0), predict(model, *forward).energy)
    turned = atoms[::-1]
    assert_same(predict(model, (turned, 1, 1.0, 2.0)).energy, predict(model, (atoms, 1, 1.0, 2.0)).energy)


@pytest.mark.parametrize("cutoff", [TINY.pairwise_cutoff, TINY.three_body_cutoff])
@pytest.mark.parametrize("scene", [crossing, pulled])
def test_no_jump_at_a_cutoff(model: MatRIS, scene, cutoff: float) -> None:
    found = predict(model, *((scene(cutoff, offset), 1, 1.0, 2.0) for offset in (-1e-9, 1e-9)))
    half = len(found.forces) // 2
    assert abs(found.energy[0] - found.energy[1]) < 1e-7
    assert (found.forces[:half] - found.forces[half:]).abs().max() < 1e-7
    assert (found.stress[0] - found.stress[1]).abs().max() < 1e-7


def test_directory_keeps_tasks(model: MatRIS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.elements_of_task, "scan", (14,))
    save_model(model, tmp_path / "model", provenance={})
    loaded = load_model(tmp_path / "model")
    assert loaded.hyper == model.hyper
    assert loaded.elements_of_task == model.elements_of_task
    states = [(rattled(bulk("Si")), task, 1.0, 2.0) for task in range(3)]
    assert torch.equal(predict(loaded, *states).energy, predict(model, *states).energy)


def test_pruning_keeps_tasks() -> None:
    whole = awake(EXPERTS)
    pruned = keep_elements(whole, [11, 17])
    states = [(bulk("NaCl", "rocksalt", a=5.2), task, 1.0, 2.0) for task in range(3)]
    assert_same(predict(pruned, *states).energy, predict(whole, *states).energy)
    assert (pruned.hyper.tasks, pruned.hyper.charge_tasks) == (NAMES, ("wb97m",))
    assert pruned.elements_of_task == dict.fromkeys(NAMES, (11, 17))
    whole.elements_of_task["scan"] = (8,)
    with pytest.raises(ValueError, match="task scan has no elements in this model, which was pruned to Na, Cl"):
        keep_elements(whole, [11, 17]).check_elements([11], "scan")


def with_calculator(model: MatRIS, task: str | None, **settings: float) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.calc = MatRISCalculator(model, dtype="float64", task=task, **settings)
    return atoms


def test_calculator_takes_charge_and_spin_from_either_place(model: MatRIS) -> None:
    given, stated = with_calculator(model, "wb97m", charge=1, spin=2), with_calculator(model, "wb97m")
    stated.info.update(charge=1, spin=2)
    energy = given.get_potential_energy()
    assert stated.get_potential_energy() == energy
    assert pytest.approx(energy, abs=1e-9) == given.get_potential_energies().sum()
    assert pickle.loads(pickle.dumps(given.calc)).get_potential_energy(given) == energy
    stated.info["charge"] = 0
    assert stated.get_potential_energy() != energy


def test_calculator_refuses_unknown_and_missing_tasks(model: MatRIS) -> None:
    with pytest.raises(ValueError, match=r"no task is given.*pbe, wb97m, scan"):
        with_calculator(model, None)
    with pytest.raises(ValueError, match=r"b3lyp.*pbe, wb97m, scan"):
        with_calculator(model, "b3lyp")


def test_calculator_of_a_directory(model: MatRIS, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", provenance={})
    for task, number in (("pbe", 0), ("scan", 2)):
        atoms = molecule("CH3CH2OH")
        atoms.calc = MatRISCalculator(tmp_path / "model", dtype="float64", task=task)
        expected = predict(model, (atoms, number, math.nan, 0.0))
        assert atoms.get_potential_energy() == expected.energy.item()
        assert torch.equal(torch.from_numpy(atoms.get_forces()), expected.forces)


def test_another_charge_is_another_evaluation(model: MatRIS, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, runs = with_calculator(model, "pbe"), []
    calculate = MatRISCalculator.calculate
    monkeypatch.setattr(MatRISCalculator, "calculate", lambda *args, **kwargs: runs.append(calculate(*args, **kwargs)))
    for info, expected in (({}, 1), ({"name": "x"}, 1), ({"total_charge": 1}, 2), ({"spin": 2}, 3), ({"spin": 2}, 3)):
        atoms.info.update(info)
        atoms.get_potential_energy()
        atoms.get_forces()
        assert len(runs) == expected


def test_elements_belong_to_a_task(model: MatRIS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.elements_of_task, "scan", (1, 8))
    with pytest.raises(ValueError, match=r"not trained on C in task scan: it knows H, O"):
        with_calculator(model, "scan").get_potential_energy()
    assert math.isfinite(with_calculator(model, "pbe").get_potential_energy())
    expected = dict(model.elements_of_task)
    assert pickle.loads(pickle.dumps(with_calculator(model, "scan").calc)).model.elements_of_task == expected


@pytest.mark.parametrize(("settings", "words"), [({}, "needs the charge"), ({"charge": 0}, "needs the spin")])
def test_calculator_refuses_what_is_not_stated(model: MatRIS, settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_calculator(model, "wb97m", **settings).get_potential_energy()


@pytest.mark.parametrize(
    "settings",
    [
        *({"charge": value} for value in (11, -11, 0.5, math.inf, math.nan)),
        *({"spin": value} for value in (21, -1, 1.5, math.nan)),
    ],
)
def test_states_without_an_entry_are_refused_at_once(model: MatRIS, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="whole number"):
        with_calculator(model, "pbe", **settings)


def test_a_spin_of_zero_is_no_multiplicity(model: MatRIS) -> None:
    with pytest.raises(ValueError, match="spin is 0: give a multiplicity"):
        with_calculator(model, "wb97m", charge=0, spin=0)


@pytest.mark.parametrize("settings", [{"charge": -11}, {"charge": 0.5}, {"spin": 21}, {"spin": -1}])
def test_states_in_a_structure_are_refused(model: MatRIS, settings: dict[str, float]) -> None:
    atoms = with_calculator(model, "pbe")
    atoms.info.update(settings)
    with pytest.raises(ValueError, match="whole numbers"):
        atoms.get_potential_energy()


def test_a_model_without_tasks_takes_no_task_and_no_state() -> None:
    plain = MatRIS(TINY, precision=Precision.fp64, seed=4)
    with pytest.raises(ValueError, match=r"task is 'pbe'.*leave task away"):
        with_calculator(plain, "pbe")
    with pytest.raises(ValueError, match="takes neither"):
        with_calculator(plain, None, charge=1)


def test_reference_energies_belong_to_a_task(model: MatRIS) -> None:
    with pytest.raises(ValueError, match=r"no task is given.*pbe, wb97m, scan"):
        model.set_reference_energies({1: -1.0})


def test_tasks_of_a_directory_must_fit_its_model(model: MatRIS, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", provenance={})
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["task_elements"]["scan"]
    path.write_text(json.dumps(config | {"config_sha256": config_sha256(config)}))
    with pytest.raises(ValueError, match="task_elements"):
        load_model(tmp_path / "model")


def test_without_tasks_nothing_is_written_of_them() -> None:
    assert not any("task" in name for name in TINY.to_dict())
    assert ModelConfig.from_dict(TINY.to_dict()) == TINY
    several = replace(TINY, tasks=NAMES, charge_tasks=("scan",))
    assert ModelConfig.from_dict(several.to_dict()) == several


@pytest.mark.parametrize(
    "fields", [{"tasks": ("a", "a")}, {"tasks": ("",)}, {"tasks": "pbe"}, {"charge_tasks": ("a",)}, {"tasks": (1,)}]
)
def test_wrong_names_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="tasks"):
        replace(TINY, **fields)
