import json
import os
import signal
import subprocess
import sys
import time

import ase.io
import numpy as np
import pytest

from janus.data.store import StoreReader
from matris.cli import prepare as cli
from matris.data.labels import SEARCH_ORDER, LabelKeys
from matris.data.prepare import PrepareOptions, prepare
from matris.data.records import samples_of
from matris.graph.build import count_graph
from tests.matris.data.frames_of import copper, unlabelled


@pytest.fixture
def xyz(tmp_path):
    """70 frames, three blocks."""
    path = tmp_path / "in.xyz"
    images = [copper(seed, repeat=1 + seed % 2) for seed in range(7)] * 10
    ase.io.write(path, images)
    return path


def records(path):
    reader = StoreReader(path)
    return reader.read(0, len(reader))


def assert_same_stores(first, second):
    for a, b in zip(records(first), records(second), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_store_holds_samples_and_sizes(xyz, tmp_path):
    report = prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions(task="emt"))
    assert report.num_frames == 70
    assert report.sources["forces"] == {"calc['forces']": 70}
    assert report.sources["magmoms"] == {}
    assert sorted(os.listdir(tmp_path)) == ["in.xyz", "out.h5"]
    reader = StoreReader(tmp_path / "out.h5")
    assert reader.attributes["pairwise_cutoff"] == 6.0
    for number in (0, 33, 69):
        record = reader[number]
        (sample,) = samples_of(reader.columns(number, number + 1))
        assert (sample.identifier, sample.task) == (f"{xyz}:{number}", "emt")
        size = count_graph(sample.structure, pairwise_cutoff=6.0, three_body_cutoff=4.5)
        assert record["size"].tolist() == [size.num_atoms, size.num_edges, size.num_angles]


def test_processes_change_nothing(xyz, tmp_path):
    prepare([str(xyz)], tmp_path / "one.h5", PrepareOptions())
    prepare([str(xyz)], tmp_path / "two.h5", PrepareOptions(), num_workers=2)
    assert_same_stores(tmp_path / "one.h5", tmp_path / "two.h5")


def test_resumes_after_sigkill(xyz, tmp_path):
    """Killed while the second of three blocks is parsed; the second run keeps the first block."""
    output = tmp_path / "out.h5"
    code = f"""
import os, signal
from matris.data import prepare
write = prepare._write_part
def write_and_die(part, **options):
    if part[0].name == "000001.h5":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(part, **options)
prepare._write_part = write_and_die
prepare.prepare([{str(xyz)!r}], {str(output)!r}, prepare.PrepareOptions())
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not output.exists()
    first = tmp_path / "out.h5.parts" / "000000.h5"
    written = first.stat().st_mtime_ns
    seen = []
    from matris.data import prepare as module

    write = module._write_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_write_part", lambda part, **options: seen.append(_mtime(part[0])) or write(part, **options)
        )
        prepare([str(xyz)], output, PrepareOptions())
    assert seen == [written, None, None]
    prepare([str(xyz)], tmp_path / "clean.h5", PrepareOptions())
    assert_same_stores(output, tmp_path / "clean.h5")
    assert not first.parent.exists()


def _mtime(path):
    return path.stat().st_mtime_ns if path.exists() else None


def test_unfinished_work_with_other_options_is_not_used(xyz, tmp_path, caplog):
    parts = tmp_path / "out.h5.parts"
    parts.mkdir()
    (parts / "plan.json").write_text(json.dumps("of something else"))
    (parts / "000000.h5").write_bytes(b"rubbish")
    with caplog.at_level("INFO"):
        assert prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions()).num_frames == 70
    assert "other inputs or options; removed" in caplog.text


def test_again_is_a_no_op_and_other_inputs_are_refused(xyz, tmp_path):
    output = tmp_path / "out.h5"
    prepare([str(xyz)], output, PrepareOptions())
    before = output.stat().st_mtime_ns
    assert prepare([str(xyz)], output, PrepareOptions()).num_frames == 70
    assert output.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other inputs or with other options"):
        prepare([str(xyz)], output, PrepareOptions(three_body_cutoff=4.0))


def test_a_bad_frame_leaves_nothing(xyz, tmp_path):
    with open(xyz, "a") as file:
        file.write('1\nREF_energy=nan pbc="F F F"\nCu 0 0 0\n')
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"in\.xyz, frame 70 \(counted from 0\): energy .* is nan"):
            prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions(), num_workers=num_workers)
        assert os.listdir(tmp_path) == ["in.xyz"]
    report = prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions(), strict=False)
    assert report.num_frames == 70
    assert len(report.problems) == 1


@pytest.mark.parametrize(("name", "content"), [("vasprun.xml", "<modeling><a>"), ("OUTCAR", " vasp.6"), ("a.bz2", "?")])
def test_an_unreadable_file_leaves_nothing(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        prepare([str(tmp_path / name)], tmp_path / "out.h5", PrepareOptions())
    assert os.listdir(tmp_path) == [name]


def test_outputs_that_would_not_be_a_store(xyz, tmp_path):
    with pytest.raises(ValueError, match=r"si\.dat: must end in \.h5 or \.hdf5"):
        prepare([str(xyz)], tmp_path / "si.dat", PrepareOptions())
    (tmp_path / "out.h5").mkdir()
    with pytest.raises(ValueError, match=r"out\.h5: is a folder"):
        prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions())


def test_overlapping_atoms_are_named(tmp_path):
    (tmp_path / "a.xyz").write_text('2\npbc="F F F" energy=1\nCu 0 0 0\nCu 0 0 0\n')
    with pytest.raises(ValueError, match=r"a\.xyz:0: atoms 0 and 1"):
        prepare([str(tmp_path / "a.xyz")], tmp_path / "out.h5", PrepareOptions(wanted=("energy",)))


def test_wanted_label_found_nowhere(tmp_path):
    atoms = unlabelled()
    atoms.info["dft_energy"] = 1.0
    ase.io.write(tmp_path / "a.xyz", [atoms])
    paths = [str(tmp_path / "a.xyz")]
    with pytest.raises(
        ValueError, match=r"'energy', looked for under REF_energy, .*keys in the data: dft_energy.* --energy_key"
    ):
        prepare(paths, tmp_path / "out.h5", PrepareOptions(wanted=("energy",)))
    keys = LabelKeys(energy="dft_energy")
    with pytest.raises(ValueError, match="'stress'"):
        prepare(paths, tmp_path / "out.h5", PrepareOptions(keys=keys, wanted=("energy", "stress")))
    # A key that is given counts as wanted.
    with pytest.raises(ValueError, match="looked for under dft_magmoms"):
        prepare(paths, tmp_path / "out.h5", PrepareOptions(keys=LabelKeys(magmoms="dft_magmoms"), wanted=()))
    assert os.listdir(tmp_path) == ["a.xyz"]
    assert prepare(paths, tmp_path / "out.h5", PrepareOptions(keys=keys, wanted=("energy",))).num_frames == 1


def test_missing_labels_are_masked(tmp_path):
    images = [copper(0), unlabelled(1), copper(2)]
    del images[2].calc.results["stress"]
    ase.io.write(tmp_path / "a.xyz", images)
    prepare([str(tmp_path / "a.xyz")], tmp_path / "out.h5", PrepareOptions())
    reader = StoreReader(tmp_path / "out.h5")
    masks = reader.columns(0, 3).masks
    assert masks["energy"].tolist() == [True, False, True]
    assert masks["stress"].tolist() == [True, False, False]
    assert samples_of(reader.columns(1, 2))[0].labels.forces is None


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "a.xyz").write_text(content)
    with pytest.raises(ValueError, match="no structure at all"):
        prepare([str(tmp_path / "a.xyz")], tmp_path / "out.h5", PrepareOptions())


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        prepare([str(tmp_path / "a.xyz")], tmp_path / "out.h5", PrepareOptions())


def test_bad_options():
    with pytest.raises(ValueError, match="unknown labels"):
        PrepareOptions(wanted=("charges",))
    with pytest.raises(ValueError, match="task is ''"):
        PrepareOptions(task="")
    with pytest.raises(ValueError, match="at most pairwise_cutoff"):
        PrepareOptions(three_body_cutoff=7.0)


def test_two_processes_at_once(xyz, tmp_path):
    """One prepares, the other is refused or waits, as it asks."""
    parts = tmp_path / "out.h5.parts"
    parts.mkdir()
    code = f"""
import fcntl, os, time
fcntl.flock(os.open({str(parts)!r}, os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(0.5)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match="another process is at work there"):
        prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions())
    started = time.monotonic()
    assert prepare([str(xyz)], tmp_path / "out.h5", PrepareOptions(), wait=True).num_frames == 70
    assert time.monotonic() - started > 0.1
    holder.wait()
    holder.stdout.close()


def test_command(xyz, tmp_path, capsys):
    output = tmp_path / "deep" / "out.h5"
    assert cli.main([str(xyz), "--output", str(output), "--num_workers", "0", "--labels", "energy,stress"]) == 0
    assert "70 structures" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["none.xyz", "--output", str(output)])


def test_command_refuses_a_negative_number_of_processes(xyz, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main([str(xyz), "--output", str(tmp_path / "out.h5"), "--num_workers", "-3"])
    assert "'-3' is not a number of processes" in capsys.readouterr().err


def test_help_states_the_real_search_order():
    text = " ".join(cli.build_parser().format_help().split())
    for names in SEARCH_ORDER.values():
        assert f"default: the first of {', '.join(name for name in names if not name.startswith('calc.'))}, the" in text
