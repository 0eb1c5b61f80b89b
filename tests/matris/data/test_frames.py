import gzip
import json
import lzma
import zlib

import ase.db
import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms

from matris.data.frames import FrameBlock, block_size, iter_blocks, read_block, refuse_idle_keys
from matris.data.labels import LabelKeys, StressUnit
from matris.data.prepare import PrepareOptions, prepare
from tests.matris.data.frames_of import copper, unlabelled


def read_all(*paths, keys=None, task=None):
    frames = []
    for block in iter_blocks([str(path) for path in paths]):
        assert isinstance(block, FrameBlock)
        frames += read_block(block, keys or LabelKeys(), task)
    return frames


def read_good(*paths, **options):
    frames = read_all(*paths, **options)
    for frame in frames:
        if isinstance(frame, ValueError):
            raise frame
    return frames


def write_lmdb(path, images, info=None):
    """As fairchem writes them: row number as key, zlib-compressed JSON of the row as value."""
    lmdb = pytest.importorskip("lmdb", reason="the extra aselmdb is not installed")
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment, environment.begin(write=True) as writer:
        for number, atoms in enumerate(images, start=1):
            row = ase.db.row.AtomsRow(atoms)
            skipped = ("id", "cell", "positions", "numbers", "pbc", "forces", "stress", "constraints")
            values = {k: row[k] for k in row.__dict__ if k[0] != "_" and k not in row._keys and k not in skipped}
            arrays = {k: np.asarray(row[k]).tolist() for k in ("cell", "positions", "numbers", "pbc") if k in row}
            labels = {k: np.asarray(row[k]).tolist() for k in ("forces", "stress") if k in row}
            record = {**values, **arrays, **labels, "data": info or {}}
            writer.put(str(number).encode(), zlib.compress(json.dumps(record, default=float).encode()))
        writer.put(b"nextid", zlib.compress(json.dumps(len(images) + 1).encode()))
        writer.put(b"metadata", zlib.compress(b"{}"))


@pytest.mark.parametrize(
    "name", ["a.xyz", "a.extxyz", "a.xyz.gz", "a.xyz.xz", "a.xyz.bz2", "a.db", "a.traj", "a.aselmdb"]
)
def test_every_format_gives_the_same(tmp_path, name):
    images = [copper(seed, repeat=1 + seed % 2) for seed in range(12)]
    images[3].set_constraint(FixAtoms([0]))
    path = tmp_path / name
    if name.endswith("db") and "lmdb" not in name:
        with ase.db.connect(path) as database:
            for atoms in images:
                database.write(atoms)
    elif name.endswith(".aselmdb"):
        write_lmdb(path, images)
    else:
        ase.io.write(path, images)
    frames = read_good(path)
    assert len(frames) == 12
    # Text has eight decimals.
    tolerance = {"rtol": 0, "atol": 1e-8 if "xyz" in name else 1e-14}
    for number, (frame, atoms) in enumerate(zip(frames, images, strict=True)):
        sample = frame.sample
        assert sample.identifier == f"{path}:{number}"
        np.testing.assert_array_equal(sample.structure.numbers, atoms.numbers)
        np.testing.assert_allclose(sample.structure.positions, atoms.positions, **tolerance)
        np.testing.assert_allclose(sample.structure.cell, atoms.cell.array, **tolerance)
        np.testing.assert_allclose(sample.labels.energy, atoms.calc.results["energy"], **tolerance)
        np.testing.assert_allclose(sample.labels.forces, atoms.calc.results["forces"], **tolerance)
        np.testing.assert_allclose(
            sample.labels.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atoms.calc.results["stress"], **tolerance
        )


def test_aselmdb_folder_in_order_of_numbers(tmp_path):
    write_lmdb(tmp_path / "data.0000.aselmdb", [copper(seed) for seed in range(11)], info={"charge": -2, "spin": 3})
    write_lmdb(tmp_path / "data.0001.aselmdb", [copper(20)])
    report = prepare([str(tmp_path)], tmp_path / "out.h5", PrepareOptions())
    assert report.num_frames == 12
    frames = read_good(tmp_path / "data.0000.aselmdb")
    energies = [frame.sample.labels.energy for frame in frames]
    assert energies == [copper(seed).calc.results["energy"] for seed in range(11)]
    assert (frames[0].sample.charge, frames[0].sample.spin) == (-2.0, 3.0)


def test_missing_lmdb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (tmp_path / "a.aselmdb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"janus-matris\[aselmdb\]"):
        read_all(tmp_path / "a.aselmdb")


def test_row_data_of_a_database(tmp_path):
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(unlabelled(), total_charge=1, data={"REF_energy": -3.5, "REF_forces": np.ones((4, 3))})
    (frame,) = read_good(tmp_path / "a.db")
    assert frame.sample.labels.energy == -3.5
    assert frame.sample.labels.forces.sum() == 12.0
    assert frame.sample.charge == 1.0


def test_store_as_input_keeps_everything(tmp_path):
    images = [copper(seed) for seed in range(5)]
    images[2].calc = None
    ase.io.write(tmp_path / "a.xyz", images)
    prepare([str(tmp_path / "a.xyz")], tmp_path / "a.h5", PrepareOptions(task="pbe"))
    original = read_good(tmp_path / "a.xyz")
    for got, expected in zip(read_good(tmp_path / "a.h5"), original, strict=True):
        assert got.sample.identifier == expected.sample.identifier
        assert got.sample.task == "pbe"
        assert got.sample.labels.energy == expected.sample.labels.energy
        np.testing.assert_array_equal(got.sample.structure.positions, expected.sample.structure.positions)
    assert read_good(tmp_path / "a.h5", task="other")[0].sample.task == "other"


def test_blocks_follow_file_order_and_are_the_same_again(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [unlabelled() for _ in range(block_size(0) * 2 + 3)])
    ase.io.write(tmp_path / "b.xyz.gz", [unlabelled()])
    paths = [str(tmp_path / "a.xyz"), str(tmp_path / "b.xyz.gz")]
    blocks = list(iter_blocks(paths))
    assert [(block.first, len(block.frames)) for block in blocks] == [(0, 32), (32, 32), (64, 3), (0, 1)]
    assert sum(block.num_bytes for block in blocks) == sum(
        (tmp_path / name).stat().st_size for name in ("a.xyz", "b.xyz.gz")
    )
    assert blocks == list(iter_blocks(paths))


def test_large_frames_make_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("matris.data.frames.BLOCK_BYTES", 1000)
    for name in ("a.xyz", "a.traj"):
        ase.io.write(tmp_path / name, [unlabelled() for _ in range(12)])
        blocks = list(iter_blocks([str(tmp_path / name)]))
        assert 2 <= max(len(block.frames) for block in blocks) <= 4
        assert sum(len(block.frames) for block in blocks) == 12


@pytest.mark.parametrize("values", ["0.1 0.2 0.3 0.04 0.05 0.06", "0.1 0.06 0.05 0.06 0.2 0.04 0.05 0.04 0.3"])
def test_six_and_nine_stress_values_in_extended_xyz(tmp_path, values):
    path = tmp_path / "a.xyz"
    path.write_text(f'1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 stress="{values}"\nCu 0 0 0\n')
    (frame,) = read_good(path)
    expected = [[0.1, 0.06, 0.05], [0.06, 0.2, 0.04], [0.05, 0.04, 0.3]]
    np.testing.assert_allclose(frame.sample.labels.stress, expected)


GOOD = '2\nProperties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=1.0 pbc="F F F"\nC 0 0 0 0 0 0\nO 0 0 1.1 0 0 0\n'


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (GOOD.replace("1.0 pbc", "nan pbc"), "energy in info.* is nan"),
        (GOOD.replace("1.0 pbc", "-inf pbc"), "energy in info.* is -inf"),
        (GOOD.replace("1.1 0 0 0", "1.1 0 nan 0"), r"forces .* is nan at index \(1, 1\)"),
        (GOOD.replace("O 0 0 1.1", "O 0 nan 1.1"), "position of atom 1"),
        (GOOD.replace("O 0", "Xx 0"), "unknown element .*Xx"),
        (GOOD.replace("O 0", "X 0"), "atomic number 0"),
        (GOOD.replace("0 0 0 0 0 0", "0 0 0 0 0"), "length 6 .* 7 fields"),
        (GOOD.replace("O 0 0", "O zero 0"), "zero"),
        (GOOD.replace("1.0 pbc", "1.0 stress=7 pbc"), "stress is 7"),
    ],
)
def test_bad_frames_are_named(tmp_path, frame, message):
    path = tmp_path / "a.xyz"
    path.write_text(GOOD + frame + GOOD)
    first, second, third = read_all(path)
    assert isinstance(second, ValueError)
    assert str(second).startswith(f"{path}, frame 1 (counted from 0): ")
    with pytest.raises(ValueError, match=message):
        raise second
    assert not isinstance(first, ValueError)
    assert not isinstance(third, ValueError)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", GOOD + "2\ncomment\nC 0 0 0\n", "frame 1 .*ends within this frame of 2 atoms"),
        ("a.xyz", GOOD + "hello\n", "frame 1 .*'hello' where the number"),
        ("a.xyz", GOOD + "\n" + GOOD, "frame 1 .*blank line"),
        ("a.xyz.gz", gzip.compress(GOOD.encode() * 999)[:-20], "frame .*end-of-stream"),
        ("a.xyz.gz", b"not gzip", "frame 0 .*gzip"),
        ("a.xyz.bz2", b"not bzip2", "frame 0 .*OSError"),
        ("a.xyz.xz", lzma.compress(GOOD.encode() * 999)[:-40], "frame .*end-of-stream"),
        ("a.unknown", b"\x00\x01", "does not know this file format"),
        ("a.h5", b"hello", "corrupt or truncated"),
        ("a.db", b"hello" * 999, "not a readable ASE database"),
        ("a.aselmdb", b"hello" * 999, "not a readable LMDB file"),
        ("vasprun.xml", "<modeling><a>", "frame 0 .*ParseError: no element found"),
        ("OUTCAR", " vasp.6", "frame 0 .*ParseError: Incomplete OUTCAR"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if "lmdb" in name:
        pytest.importorskip("lmdb", reason="the extra aselmdb is not installed")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_whatever_a_reader_raises_is_named(tmp_path, monkeypatch):
    def reader(*_):
        yield unlabelled()
        raise ModuleNotFoundError("No module\nnamed 'gpaw'")

    monkeypatch.setattr("ase.io.iread", reader)
    (tmp_path / "a.gpw").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.gpw, frame 1 .*: ModuleNotFoundError: No module named 'gpaw'"):
        read_all(tmp_path / "a.gpw")


def test_idle_keys_are_named_as_the_user_gave_them(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no effect on stores \(stress_unit=GPa; .*a\.h5\)"):
        refuse_idle_keys([str(tmp_path / "a.h5")], LabelKeys(stress_unit=StressUnit.gpa))


def test_trailing_blank_lines_are_fine(tmp_path):
    (tmp_path / "a.xyz").write_text(GOOD + "\n\n")
    assert len(read_good(tmp_path / "a.xyz")) == 1
