"""Ragged records in one HDF5 file: written once, read at random, checked by checksums.

A field has one entry per record (`axis=None`), or one per row of a named axis: record i owns the rows
`offsets[i]:offsets[i + 1]` of that axis, so records of any size lie back to back. Optional fields carry a mask.

Layout: `fields/<name>`, `masks/<name>`, `offsets/<axis>`, and root attributes. Chunks carry a Fletcher-32 checksum
and the file format (HDF5 1.10) checksums its own metadata, so a damaged file is noticed wherever it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT = "janus-store"
VERSION = 1
CHUNK_BYTES = 32 * 1024  # small, because a random read loads and checks whole chunks
COPY_RECORDS = 4096  # records held in memory at a time when stores are copied


@dataclass(frozen=True, kw_only=True)
class Field:
    """One column of a store.

    Attributes:
        name: unique.
        dtype: numpy dtype string.
        shape: of one entry.
        axis: None for one entry per record, otherwise the axis whose rows the entries are.
        optional: whether a record may lack it (None when read).
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    axis: str | None = None
    optional: bool = False


Record = Mapping[str, Any]
"""One value per field name; None for a missing optional one."""


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Consecutive records, field by field. Rows of absent optional fields are present and zero."""

    num_records: int
    values: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]  # rows of each record, per axis


class StoreWriter:
    """Writes `PATH.partial`, which becomes `PATH` in `finish` alone.

    As a context manager it removes the partial file when the block raises.
    """

    def __init__(self, path: Path | str, fields: Sequence[Field]) -> None:
        self.path = Path(path)
        self.fields = tuple(fields)
        self.num_records = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = h5py.File(self._partial, "w", libver=("v110", "v110"))
        for field in self.fields:
            self._create(f"fields/{field.name}", field.dtype, field.shape)
            if field.optional:
                self._create(f"masks/{field.name}", "uint8", ())
        self._rows = {axis: 0 for axis in _axes(self.fields)}
        for axis in self._rows:
            self._create(f"offsets/{axis}", "int64", ())
            _extend(self._file[f"offsets/{axis}"], np.zeros(1, np.int64))

    def append(self, records: Sequence[Record]) -> None:
        """Add records. One write per field, so give many at a time."""
        if records:
            self._append(_stack(records, self.fields))

    def append_store(self, reader: StoreReader) -> None:
        """Add all records of another store with the same fields."""
        if reader.fields != self.fields:
            raise ValueError(f"{reader.path}: its fields differ from those of {self.path}; prepare it again")
        for start in range(0, len(reader), COPY_RECORDS):
            self._append(reader.columns(start, min(start + COPY_RECORDS, len(reader))))

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Mark as complete with `attributes` (anything JSON knows), flush to disk, and rename into place."""
        self._file.attrs["format"] = FORMAT
        self._file.attrs["version"] = VERSION
        self._file.attrs["fields"] = json.dumps([asdict(field) for field in self.fields])
        self._file.attrs["attributes"] = json.dumps(dict(attributes))
        self._file.attrs["num_records"] = self.num_records
        self._file.attrs["complete"] = True
        self._file.close()
        with open(self._partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(self._partial, self.path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)

    def _create(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        self._file.create_dataset(
            name,
            shape=(0, *shape),
            maxshape=(None, *shape),
            chunks=(max(1, CHUNK_BYTES // row_bytes), *shape),
            dtype=dtype,
            fletcher32=True,
        )

    def _append(self, columns: _Columns) -> None:
        for name, values in columns.values.items():
            _extend(self._file[f"fields/{name}"], values)
        for name, mask in columns.masks.items():
            _extend(self._file[f"masks/{name}"], mask)
        for axis, counts in columns.counts.items():
            ends = self._rows[axis] + np.cumsum(counts)
            _extend(self._file[f"offsets/{axis}"], ends)
            self._rows[axis] = int(ends[-1])
        self.num_records += columns.num_records


class StoreReader:
    """Random access to a finished store. Picklable; each process opens the file for itself, on its first read.

    Raises:
        ValueError: not a store, unfinished, of another version, truncated or damaged; names the file and the reason.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._datasets: dict[str, h5py.Dataset] = {}  # looking one up by name takes longer than a read
        self._owner = 0
        self.fields: tuple[Field, ...]
        self.attributes: dict[str, Any]
        self._num_records: int
        with self._reading():
            file = self._open_file()
            if file.attrs.get("format") != FORMAT:
                raise ValueError(f"{self.path}: an HDF5 file, but not a store of this project")
            if not file.attrs.get("complete", False):
                raise ValueError(f"{self.path}: unfinished store; prepare it again")
            version = int(file.attrs["version"])
            if version != VERSION:
                raise ValueError(f"{self.path}: store version {version}, expected {VERSION}; prepare it again")
            self.fields = tuple(
                Field(**{**field, "shape": tuple(field["shape"])}) for field in json.loads(file.attrs["fields"])
            )
            self.attributes = json.loads(file.attrs["attributes"])
            self._num_records = int(file.attrs["num_records"])
            self._check_lengths()

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record; absent optional fields are None."""
        return self.read(index, index + 1)[0]

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Records start..stop-1, one read per field."""
        columns = self.columns(start, stop)
        ends = {axis: np.cumsum(counts) for axis, counts in columns.counts.items()}
        records = []
        for i in range(stop - start):
            record: dict[str, Any] = {}
            for field in self.fields:
                values = columns.values[field.name]
                if field.optional and not columns.masks[field.name][i]:
                    record[field.name] = None
                elif field.axis is None:
                    record[field.name] = values[i]
                else:
                    end = ends[field.axis][i]
                    record[field.name] = values[end - columns.counts[field.axis][i] : end]
            records.append(record)
        return records

    def column(self, name: str) -> np.ndarray:
        """All entries of a field that has one per record."""
        with self._reading():
            return self._dataset(f"fields/{name}")[:]

    def mask(self, name: str) -> np.ndarray:
        """Which records have an optional field, (num_records,) bool."""
        with self._reading():
            return self._dataset(f"masks/{name}")[:].astype(bool)

    def columns(self, start: int, stop: int) -> _Columns:
        """Records start..stop-1, field by field."""
        if not 0 <= start < stop <= self._num_records:
            raise IndexError(f"records {start}..{stop - 1} of {self.path}, which has {self._num_records}")
        with self._reading():
            bounds = {axis: self._dataset(f"offsets/{axis}")[start : stop + 1] for axis in _axes(self.fields)}
            values, masks = {}, {}
            for field in self.fields:
                first, last = (start, stop) if field.axis is None else bounds[field.axis][[0, -1]]
                values[field.name] = self._dataset(f"fields/{field.name}")[first:last]
                if field.optional:
                    masks[field.name] = self._dataset(f"masks/{field.name}")[start:stop]
            counts = {axis: np.diff(bound) for axis, bound in bounds.items()}
            return _Columns(num_records=stop - start, values=values, masks=masks, counts=counts)

    def verify(self) -> None:
        """Read everything once, so that every checksum is compared. Raises ValueError if one differs."""
        for start in range(0, len(self), COPY_RECORDS):
            self.columns(start, min(start + COPY_RECORDS, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_datasets": {}, "_owner": 0}

    def _dataset(self, name: str) -> h5py.Dataset:
        file = self._open_file()
        if name not in self._datasets:
            self._datasets[name] = file[name]
        return self._datasets[name]

    def _open_file(self) -> h5py.File:
        if self._file is None or self._owner != os.getpid():  # a handle must not be shared after a fork
            # Stores never change once in place, so no lock; many file systems of clusters have none.
            self._file, self._datasets = h5py.File(self.path, "r", locking=False), {}
            self._owner = os.getpid()
        return self._file

    def _check_lengths(self) -> None:
        rows: dict[str | None, int] = {None: self._num_records}
        for axis in _axes(self.fields):
            offsets = self._dataset(f"offsets/{axis}")
            if len(offsets) != self._num_records + 1:
                raise ValueError(f"{self.path}: damaged store (offsets/{axis} has {len(offsets)} entries)")
            rows[axis] = int(offsets[-1])
        for field in self.fields:
            length = len(self._dataset(f"fields/{field.name}"))
            if length != rows[field.axis]:
                raise ValueError(
                    f"{self.path}: damaged store ({field.name} has {length} rows, expected {rows[field.axis]})"
                )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Errors of HDF5 as ours."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path}: corrupt or truncated store ({' '.join(str(error).split())}); prepare it again or fetch "
                "a good copy"
            ) from error


def _axes(fields: Sequence[Field]) -> list[str]:
    return list(dict.fromkeys(field.axis for field in fields if field.axis is not None))


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    old = len(dataset)
    dataset.resize(old + len(values), axis=0)
    dataset[old:] = values


def _stack(records: Sequence[Record], fields: Sequence[Field]) -> _Columns:
    """Records to columns. The rows of an axis are counted on its first field, which must not be optional."""
    counts: dict[str, np.ndarray] = {}
    values, masks = {}, {}
    for field in fields:
        entries = [record[field.name] for record in records]
        if field.axis is not None and field.axis not in counts:
            counts[field.axis] = np.array([len(entry) for entry in entries], dtype=np.int64)
        arrays = []
        for i, entry in enumerate(entries):
            shape = field.shape if field.axis is None else (int(counts[field.axis][i]), *field.shape)
            array = np.zeros(shape, field.dtype) if entry is None and field.optional else np.asarray(entry, field.dtype)
            if array.shape != shape:
                raise ValueError(f"field {field.name!r} has shape {array.shape}, expected {shape}")
            arrays.append(array)
        values[field.name] = np.stack(arrays) if field.axis is None else np.concatenate(arrays)
        if field.optional:
            masks[field.name] = np.array([entry is not None for entry in entries], dtype=np.uint8)
    return _Columns(num_records=len(records), values=values, masks=masks, counts=counts)
