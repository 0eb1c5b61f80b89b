import json

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from matris.cli import doctor as cli
from matris.data.consistency import Verdict
from matris.data.demo import make_demo
from matris.data.doctor import Severity, examine, suggest_budgets
from matris.data.prepare import PrepareOptions, prepare

OPTIONS = PrepareOptions(wanted=("energy",))


def images_of(change=lambda results: results, count=30):
    """Strained and rattled copper; `change` edits the labels."""
    images = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        atoms = bulk("Cu", cubic=True)
        strain = rng.uniform(-0.02, 0.02, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        atoms.rattle(0.05, rng=rng)
        atoms.calc = EMT()
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **change(results))
        images.append(atoms)
    return images


def diagnose(tmp_path, images):
    ase.io.write(tmp_path / "a.xyz", images)
    return examine([str(tmp_path / "a.xyz")], OPTIONS)


def texts(diagnosis, severity):
    return [finding.text for finding in diagnosis.findings if finding.severity is severity]


def test_good_set(tmp_path):
    diagnosis = diagnose(tmp_path, images_of())
    assert diagnosis.findings == ()
    assert diagnosis.forces.verdict is diagnosis.stress.verdict is Verdict.plausible
    assert diagnosis.forces.slope == pytest.approx(1.0, abs=0.1)
    assert diagnosis.stress.slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-1.0, "sign is opposite"),
        (160.21766208, "in GPa; use"),
        (-1602.1766208, "as VASP prints it"),
        (7.0, "do not belong to these energies"),
    ],
)
def test_wrong_stress(tmp_path, factor, message):
    diagnosis = diagnose(tmp_path, images_of(lambda results: {**results, "stress": factor * results["stress"]}))
    (text,) = texts(diagnosis, Severity.fatal)
    assert "stress does not fit" in text
    assert message in text
    assert diagnosis.forces.verdict is Verdict.plausible


def test_wrong_forces(tmp_path):
    diagnosis = diagnose(tmp_path, images_of(lambda results: {**results, "forces": -results["forces"]}))
    (text,) = texts(diagnosis, Severity.fatal)
    assert "these are gradients" in text


def test_few_structures_are_not_enough_evidence(tmp_path):
    diagnosis = diagnose(tmp_path, images_of(count=3))
    assert diagnosis.stress.verdict is Verdict.unclear
    assert not diagnosis.fatal


def test_sign_of_stress_from_pressure_and_volume(tmp_path):
    """Cells too different for pairs to be compared by their energies."""
    images = []
    for scale in np.linspace(0.7, 1.2, 8):
        atoms = bulk("Cu", a=3.6 * scale)
        atoms.calc = EMT()
        stress = -atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), stress=stress)
        images.append(atoms)
    diagnosis = diagnose(tmp_path, images)
    assert diagnosis.stress.verdict is Verdict.wrong
    assert "sign is probably opposite" in diagnosis.stress.text


def test_molecules_are_compared_in_any_orientation(tmp_path):
    images = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        atoms = Atoms("Cu4", positions=2.5 * np.eye(4, 3))
        atoms.rattle(0.04, rng=rng)
        atoms.rotate(rng.uniform(0, 360), rng.normal(size=3))
        atoms.calc = EMT()
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        images.append(atoms)
    diagnosis = diagnose(tmp_path, images)
    assert diagnosis.forces.verdict is Verdict.plausible
    assert diagnosis.forces.slope == pytest.approx(1.0, abs=0.1)


def test_frames_that_cannot_be_used_are_all_listed(tmp_path):
    images = images_of(count=10)
    images[2].calc.results["energy"] = np.nan
    images[7].calc.results["forces"][1, 1] = np.inf
    diagnosis = diagnose(tmp_path, images)
    first, second = texts(diagnosis, Severity.fatal)
    assert "frame 2 (counted from 0): energy" in first
    assert "frame 7 (counted from 0): forces" in second
    assert len(diagnosis.sizes) == 8


def test_no_usable_structure(tmp_path):
    images = images_of(lambda results: {**results, "energy": np.nan}, count=2)
    assert texts(diagnose(tmp_path, images), Severity.fatal)[-1] == "no usable structure"


def test_no_energies(tmp_path):
    images = images_of(lambda results: {"forces": results["forces"]}, count=2)
    (text,) = texts(diagnose(tmp_path, images), Severity.fatal)  # asked for
    assert "no frame has the label 'energy'" in text
    assert "with --energy_key" in text
    for wanted in (), ("forces",):
        diagnosis = examine([str(tmp_path / "a.xyz")], PrepareOptions(wanted=wanted))
        assert not diagnosis.fatal
        assert any("no structure has an energy" in text for text in texts(diagnosis, Severity.warning))


def test_no_labels(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [bulk("Cu")])
    diagnosis = examine([str(tmp_path / "a.xyz")], PrepareOptions(wanted=()))
    assert any("no structure has any label" in text for text in texts(diagnosis, Severity.fatal))


def test_overlapping_and_close_atoms(tmp_path):
    images = [
        Atoms("H2", positions=[[0, 0, 0], [0, 0, distance]], info={"REF_energy": 1.0}) for distance in (0.2, 0.25, 0.9)
    ]
    diagnosis = diagnose(tmp_path, images)
    (text,) = texts(diagnosis, Severity.fatal)
    assert "2 structures" in text
    assert "0.200 A (H-H)" in text


def test_warnings(tmp_path):
    images = images_of()
    images[3].calc.results["forces"][0] = 0.0  # as a constraint leaves it
    images[5] = images[4].copy()
    images[5].calc = SinglePointCalculator(images[5], energy=images[4].calc.results["energy"] + 1.0)
    images[6].calc.results["forces"] += 0.1
    diagnosis = diagnose(tmp_path, images)
    held, drifting, same, conflicting = texts(diagnosis, Severity.warning)
    assert "a.xyz:3" in held
    assert "constraints applied" in held
    assert "a.xyz:6" in drifting
    assert same.startswith("1 structures repeat")
    assert conflicting.startswith("1 of them")


def test_suggested_budgets_hold_the_largest():
    sizes = np.array([[1, 10, 100], [50, 1234, 98765]])
    assert suggest_budgets(sizes, structures=1) == (50, 1300, 99000)


def test_command_writes_json_and_pictures(tmp_path, capsys):
    demo = make_demo(tmp_path, num=40)
    prepare([str(demo.train)], tmp_path / "a.h5", OPTIONS)
    arguments = [str(tmp_path / "a.h5"), "--num_workers", "0", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--json", str(tmp_path / "out" / "a.json")]) == 0
    text = capsys.readouterr().out
    assert "structures  32" in text
    assert "--data.max_atoms" in text
    diagnosis = json.loads((tmp_path / "out" / "a.json").read_text())
    assert diagnosis["num_structures"] == 32
    assert diagnosis["fatal"] is False
    assert sum(diagnosis["histograms"]["edges"]["counts"]) == 32
    for name in ("sizes.png", "labels.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_command_fails_on_a_fatal_finding(tmp_path, capsys):
    ase.io.write(tmp_path / "a.xyz", images_of(lambda results: {**results, "energy": np.nan}, count=1))
    assert cli.main([str(tmp_path / "a.xyz"), "--num_workers", "0", "--output", str(tmp_path / "out")]) == 1
    assert "FATAL" in capsys.readouterr().out


def test_command_checks_its_outputs_first(tmp_path, monkeypatch):
    monkeypatch.setattr("matris.data.doctor.examine", lambda *_, **__: pytest.fail("examined"))
    (tmp_path / "file").write_text("")
    for option, target in (("--json", "file/a.json"), ("--output", "file/deep"), ("--output", "file")):
        with pytest.raises(ValueError, match="files cannot be written there"):
            cli.main(["a.xyz", option, str(tmp_path / target)])
    with pytest.raises(ValueError, match="is a folder"):
        cli.main(["a.xyz", "--json", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
