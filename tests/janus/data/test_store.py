import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from janus.data.store import SPARE_BYTES, Field, StoreReader, StoreWriter, gather, overview

FIELDS = (
    Field(name="position", dtype="float64", shape=(3,), axis="atom"),
    Field(name="force", dtype="float32", shape=(3,), axis="atom", optional=True),
    Field(name="energy", dtype="float64", optional=True),
    Field(name="size", dtype="int64", shape=(2,)),
    Field(name="name", dtype="uint8", axis="letter"),
)


def make_records(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        rows = int(rng.integers(0, 9))
        records.append(
            {
                "position": rng.normal(size=(rows, 3)),
                "force": None if i % 3 == 0 else rng.normal(size=(rows, 3)).astype(np.float32),
                "energy": None if i % 4 == 0 else rng.normal(),
                "size": (rows, i),
                "name": np.frombuffer(f"record {i}".encode(), np.uint8),
            }
        )
    return records


def write(path, records, chunk=7):
    with StoreWriter(path, FIELDS) as writer:
        for start in range(0, len(records), chunk):
            writer.append(records[start : start + chunk])
        writer.finish({"answer": 42})
    return StoreReader(path)


def assert_same(got, expected):
    for field in FIELDS:
        if expected[field.name] is None:
            assert got[field.name] is None
        else:
            np.testing.assert_array_equal(got[field.name], expected[field.name])


def test_round_trip(tmp_path):
    records = make_records(50)
    reader = write(tmp_path / "a.h5", records)
    assert (len(reader), reader.attributes, reader.fields) == (50, {"answer": 42}, FIELDS)
    for i in (0, 49, 13, 3):
        assert_same(reader[i], records[i])
    for got, expected in zip(reader.read(11, 29), records[11:29], strict=True):
        assert_same(got, expected)
    columns = reader.columns(0, 50)
    np.testing.assert_array_equal(columns.masks["energy"], [i % 4 != 0 for i in range(50)])
    np.testing.assert_array_equal(columns.values["size"], [record["size"] for record in records])
    np.testing.assert_array_equal(
        columns.values["position"], np.concatenate([record["position"] for record in records])
    )
    ranges = [(reader, 30, 33), (reader, 2, 3), (reader, 7, 9)]
    fields, masks = overview(ranges, ["size"], ["energy"])
    chosen = [30, 31, 32, 2, 7, 8]
    np.testing.assert_array_equal(fields["size"], [records[i]["size"] for i in chosen])
    assert masks["energy"].tolist() == [i % 4 != 0 for i in chosen]
    assert os.listdir(tmp_path) == ["a.h5"]
    reader.verify()


def test_joining_stores_equals_writing_one(tmp_path, monkeypatch):
    monkeypatch.setattr("janus.data.store.COPY_RECORDS", 4)
    records = make_records(20)
    parts = [write(tmp_path / "a.h5", records[:13]), write(tmp_path / "b.h5", records[13:])]
    with StoreWriter(tmp_path / "joined.h5", FIELDS) as writer:
        for part in parts:
            writer.append_store(part)
        writer.finish({})
    for got, expected in zip(StoreReader(tmp_path / "joined.h5").read(0, 20), records, strict=True):
        assert_same(got, expected)


def test_reader_is_picklable_and_reopens(tmp_path):
    reader = write(tmp_path / "a.h5", make_records(5))
    first = reader[2]
    assert_same(pickle.loads(pickle.dumps(reader))[2], first)


def test_wrong_shape_is_refused_and_nothing_is_left(tmp_path):
    record = {**make_records(2)[1], "force": np.zeros((100, 3))}
    with pytest.raises(ValueError, match="force"), StoreWriter(tmp_path / "a.h5", FIELDS) as writer:
        writer.append([record])
    assert os.listdir(tmp_path) == []


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=SPARE_BYTES))
    path = tmp_path / "a.h5"
    with pytest.raises(OSError, match="No space left on device: .*a.h5'"), StoreWriter(path, FIELDS) as writer:
        writer.append(make_records(3))
    assert not list(tmp_path.iterdir())


def test_index_out_of_range(tmp_path):
    reader = write(tmp_path / "a.h5", make_records(3))
    with pytest.raises(IndexError):
        reader[3]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not HDF5", "empty", "unfinished", "version"])
def test_damaged_store_is_refused(tmp_path, damage):
    path = tmp_path / "a.h5"
    records = make_records(400)
    write(path, records)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        # A byte of a position.
        needle = next(record["position"] for record in records[100:] if len(record["position"]))[0].tobytes()
        content[content.index(needle) + 5] ^= 1
        path.write_bytes(content)
    elif damage in ("not HDF5", "empty"):
        path.write_bytes(b"hello" if damage == "not HDF5" else b"")
    else:
        import h5py

        with h5py.File(path, "r+") as file:
            file.attrs["complete" if damage == "unfinished" else "version"] = 0
    with pytest.raises(ValueError, match=r"a\.h5: .*(corrupt or truncated|unfinished|version 0)"):
        StoreReader(path).verify()


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Whatever byte is damaged, reading either fails clearly or gives the true values."""
    path = tmp_path / "a.h5"
    records = make_records(10)
    write(path, records)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for position in [*range(60), *rng.integers(0, len(content), 200)]:
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            got = StoreReader(path).read(0, 10)
        except (ValueError, IndexError):
            noticed += 1
            continue
        for one, expected in zip(got, records, strict=True):
            assert_same(one, expected)
    assert noticed > 20


def test_a_killed_writer_leaves_no_store(tmp_path):
    code = f"""
import os, signal
from tests.janus.data.test_store import FIELDS, make_records
from janus.data.store import StoreWriter
writer = StoreWriter({str(tmp_path / "a.h5")!r}, FIELDS)
writer.append(make_records(100))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "a.h5").exists()
    write(tmp_path / "a.h5", make_records(3))  # and the next writer starts afresh
    assert os.listdir(tmp_path) == ["a.h5"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        StoreReader(tmp_path / "none.h5")


def test_a_record_is_read_with_one_read_of_each_table(tmp_path, monkeypatch):
    reader = write(tmp_path / "a.h5", make_records(5))
    reader[0]
    ranges = []
    dataset = type(reader._table(None).dataset)
    monkeypatch.setattr(dataset, "__getitem__", counted(dataset.__getitem__, ranges))
    reader[3]
    assert len(ranges) == 3  # records, atoms, letters
    reader.read(0, 5)
    assert len(ranges) == 3 + 3
    gather([(reader, index, index + 1) for index in (4, 0, 2, 3)])
    assert len(ranges) == 3 + 3 + 4 * 3


def test_gathered_records_are_those_that_were_asked_for(tmp_path):
    records = make_records(50)
    first, second = write(tmp_path / "a.h5", records[:20]), write(tmp_path / "b.h5", records[20:])
    chosen = np.random.default_rng(0).permutation(50)
    columns = gather([(first, i, i + 1) if i < 20 else (second, i - 20, i - 19) for i in chosen.tolist()])
    assert columns.num_records == 50
    for place, (i, atoms, letters) in enumerate(zip(chosen, columns.rows("atom"), columns.rows("letter"), strict=True)):
        own = {"position": atoms, "force": atoms, "energy": place, "size": place, "name": letters}
        got = {name: columns.values[name][where] for name, where in own.items()}
        missing = [name for name, mask in columns.masks.items() if not mask[place]]
        assert_same({**got, **dict.fromkeys(missing)}, records[i])
    assert columns.present("energy", range(50)) == [None if i % 4 == 0 else n for n, i in enumerate(chosen)]


def test_gathering_names_the_store_that_is_wrong(tmp_path):
    records = make_records(400)
    good, bad = write(tmp_path / "good.h5", records), write(tmp_path / "bad.h5", records)
    with pytest.raises(IndexError, match=r"400\.\.400 of .*bad\.h5, which has 400"):
        gather([(good, 0, 1), (bad, 400, 401)])
    with pytest.raises(IndexError, match=r"-1\.\.-1 of .*good\.h5"):
        gather([(good, -1, 0)])
    number = next(i for i in range(300, 400) if len(records[i]["position"]))
    content = bytearray(bad.path.read_bytes())
    content[content.index(records[number]["position"][0].tobytes()) + 5] ^= 1
    bad.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.h5: corrupt or truncated"):
        gather([(good, 0, 1), (StoreReader(bad.path), number, number + 1)])
    with StoreWriter(tmp_path / "other.h5", FIELDS[:-1]) as writer:
        writer.append([{name: value for name, value in records[0].items() if name != "name"}])
        writer.finish({})
    with pytest.raises(ValueError, match=r"other\.h5: its fields differ from those of .*good\.h5"):
        gather([(good, 0, 1), (StoreReader(tmp_path / "other.h5"), 0, 1)])


def test_a_damaged_description_is_refused(tmp_path):
    import h5py

    path = tmp_path / "a.h5"
    write(path, make_records(3))
    with h5py.File(path, "r+") as file:
        file.attrs["fields"] = file.attrs["fields"].replace("optional", "optio~al", 1)
    with pytest.raises(ValueError, match=r"a\.h5: corrupt or truncated store \(.*optio~al"):
        StoreReader(path)


def counted(function, calls):
    def counting(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counting


def test_what_is_cached_is_bounded(tmp_path):
    reader = write(tmp_path / "a.h5", make_records(5))
    assert reader._open_file().id.get_access_plist().get_cache()[2] == 1024 * 1024


def test_rows_of_other_fields_are_refused(tmp_path):
    import h5py

    path = tmp_path / "a.h5"
    write(path, make_records(3))
    with h5py.File(path, "r+") as file:
        shape = file["rows/atom"].shape
        del file["rows/atom"]
        file["rows/atom"] = np.zeros((shape[0], shape[1] + 1), np.uint8)
    with pytest.raises(ValueError, match=r"a\.h5: damaged store \(rows/atom has rows of other fields\)"):
        StoreReader(path)
    with h5py.File(path, "r+") as file:
        del file["rows/atom"]
        file["rows/atom"] = np.zeros((shape[0] + 1, shape[1]), np.uint8)
    with pytest.raises(ValueError, match=r"a\.h5: damaged store \(rows/atom has .* rows, expected"):
        StoreReader(path)
