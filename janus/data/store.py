"""Ragged records in one HDF5 file: written once, read at random, checked by checksums.

A field has one entry per record (`axis=None`), or one per row of a named axis: record i owns a range of rows of that
axis, so records of any size lie back to back. Optional fields carry a mask.

Layout: a table for the records, `records`, one for each axis, `rows/<axis>`, and root attributes. A record is a row of
the first and consecutive rows of each other, so reading one at random takes as many reads as there are tables, whatever
the number of fields. A row is its fields, packed, as bytes: HDF5 takes several times as long for a compound type.
Chunks carry a Fletcher-32 checksum and the file format (HDF5 1.10) checksums its own metadata, so a damaged file is
noticed wherever it is read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

FORMAT = "janus-store"
VERSION = 3
CHUNK_BYTES = 16 * 1024  # of new files; small, because a random read loads and checks whole chunks
CACHE_BYTES = 1024 * 1024  # of chunks, for each table of an open store: every process of every rank has its own
SPARE_BYTES = 1 << 24  # that a disk must have beyond what is written now: other processes write too
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
class Columns:
    """Records field by field.

    Attributes:
        num_records: n.
        values: of each field, (n, *shape), or the rows of all records, one record after the other; zero where a record
            lacks the field.
        masks: of each optional field, (n,) uint8: which records have it.
        counts: of each axis, (n,) int64: rows of each record.
    """

    num_records: int
    values: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    def rows(self, axis: str) -> list[slice]:
        """Which rows of an axis are whose, one slice per record."""
        ends = accumulate(self.counts[axis].tolist(), initial=0)
        return [slice(start, end) for start, end in pairwise(ends)]

    def present(self, name: str, values: Iterable[Any]) -> list[Any]:
        """One value per record, None in place of those of the records that lack the optional field `name`."""
        return [value if there else None for value, there in zip(values, self.masks[name].tolist(), strict=True)]


class StoreWriter:
    """Writes `PATH.partial`, which becomes `PATH` in `finish` alone.

    As a context manager it removes the partial file when the block raises.

    Raises:
        OSError: the disk is full, told before anything is damaged.
    """

    def __init__(self, path: Path | str, fields: Sequence[Field]) -> None:
        self.path = Path(path)
        self.fields = tuple(fields)
        self.num_records = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = h5py.File(self._partial, "w", libver=("v110", "v110"))
        for axis in (None, *_axes(self.fields)):
            width = _row_type(self.fields, axis).itemsize
            self._file.create_dataset(
                _table_name(axis),
                shape=(0, width),
                maxshape=(None, width),
                chunks=(max(1, CHUNK_BYTES // width), width),
                dtype="uint8",
                fletcher32=True,
            )

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

    def _append(self, columns: Columns) -> None:
        self._check_space(columns)
        records = np.zeros(columns.num_records, _row_type(self.fields, None))
        for name, mask in columns.masks.items():
            records[_mask_name(name)] = mask
        for axis, counts in columns.counts.items():
            table = self._file[_table_name(axis)]
            ends = len(table) + np.cumsum(counts)
            records[_bounds_name(axis)] = np.column_stack([ends - counts, ends])
            rows = np.zeros(int(counts.sum()), _row_type(self.fields, axis))
            self._fill(rows, columns, axis)
            _extend(table, rows)
        self._fill(records, columns, None)
        _extend(self._file[_table_name(None)], records)
        self.num_records += columns.num_records

    def _check_space(self, columns: Columns) -> None:
        """Before HDF5 meets the full disk: it then cannot close the file, and may end the process.

        Raises:
            OSError: the rows would leave less than `SPARE_BYTES` on the disk.
        """
        rows = {None: columns.num_records} | {axis: int(counts.sum()) for axis, counts in columns.counts.items()}
        size = sum(count * _row_type(self.fields, axis).itemsize for axis, count in rows.items())
        if shutil.disk_usage(self.path.parent).free < size + SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _fill(self, rows: np.ndarray, columns: Columns, axis: str | None) -> None:
        for field in self.fields:
            if field.axis == axis:
                rows[field.name] = columns.values[field.name]


class StoreReader:
    """Random access to a finished store. Picklable; each process opens the file for itself, on its first read.

    Raises:
        ValueError: not a store, unfinished, of another version, truncated or damaged; names the file and the reason.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._tables: dict[str | None, _Table] = {}  # by axis; looking one up by name takes longer than a read
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
                raise ValueError(
                    f"{self.path}: store version {version}, expected {VERSION}; remove it and prepare it again"
                )
            self.fields = self._described(file.attrs["fields"])
            self.attributes = json.loads(file.attrs["attributes"])
            self._num_records = int(file.attrs["num_records"])
            self._axes = _axes(self.fields)
            self._check_tables()

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record; absent optional fields are None."""
        return self.read(index, index + 1)[0]

    def read(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Records start..stop-1, one read per table. Their arrays are parts of common ones, without overlap."""
        columns = self.columns(start, stop)
        rows = {axis: columns.rows(axis) for axis in self._axes}
        found = []
        for field in self.fields:
            column = columns.values[field.name]
            values: Iterable[Any]
            if field.axis is not None:
                values = [column[own] for own in rows[field.axis]]
            else:
                values = column if field.shape else column.tolist()
            found.append(columns.present(field.name, values) if field.optional else values)
        names = [field.name for field in self.fields]
        return [dict(zip(names, values, strict=True)) for values in zip(*found, strict=True)]

    def columns(self, start: int, stop: int) -> Columns:
        """Records start..stop-1, field by field, one read per table."""
        return gather([(self, start, stop)])

    def verify(self) -> None:
        """Read everything once, so that every checksum is compared. Raises ValueError if one differs."""
        for start in range(0, len(self), COPY_RECORDS):
            self.columns(start, min(start + COPY_RECORDS, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_tables": {}, "_owner": 0}

    def _table(self, axis: str | None) -> _Table:
        with self._reading():
            file = self._open_file()
            if axis in self._tables:
                return self._tables[axis]
            table = _Table(file[_table_name(axis)], _row_type(self.fields, axis))
            if table.dataset.shape[1:] != (table.dtype.itemsize,):
                raise ValueError(f"{self.path}: damaged store ({_table_name(axis)} has rows of other fields)")
            self._tables[axis] = table
            return table

    def _open_file(self) -> h5py.File:
        if self._file is None or self._owner != os.getpid():  # a handle must not be shared after a fork
            # Stores never change once in place, so no lock; many file systems of clusters have none.
            self._file, self._tables = h5py.File(self.path, "r", locking=False, rdcc_nbytes=CACHE_BYTES), {}
            self._owner = os.getpid()
        return self._file

    def _described(self, text: str) -> tuple[Field, ...]:
        """Fields from JSON, which has no checksum of its own."""
        try:
            return tuple(Field(**{**field, "shape": tuple(field["shape"])}) for field in json.loads(text))
        except TypeError as error:
            raise self._damaged(error) from error

    def _check_tables(self) -> None:
        expected: dict[str | None, int] = {None: self._num_records}
        last = self._table(None).read(self._num_records - 1, self._num_records) if self._num_records else None
        for axis in self._axes:
            expected[axis] = 0 if last is None else int(last[_bounds_name(axis)][0, 1])
        for name, rows in expected.items():
            length = len(self._table(name).dataset)
            if length != rows:
                raise ValueError(f"{self.path}: damaged store ({_table_name(name)} has {length} rows, expected {rows})")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Errors of HDF5 as ours."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())
        return ValueError(f"{self.path}: corrupt or truncated store ({reason}); prepare it again or fetch a good copy")


Range: TypeAlias = tuple[StoreReader, int, int]
"""Records, or rows of a table: of which store, the first, and where they end."""


def gather(ranges: Sequence[Range]) -> Columns:
    """Records of stores with the same fields, at least one, range after range; one read per table and range.

    Raises:
        ValueError: stores with other fields than the first one's; as `StoreReader`.
        IndexError: a record that its store does not have.
    """
    first = ranges[0][0]
    for store in {store for store, _, _ in ranges}:
        if store is not first and store.fields != first.fields:
            raise ValueError(f"{store.path}: its fields differ from those of {first.path}; prepare it again")
    for store, start, stop in ranges:
        if not 0 <= start < stop <= len(store):
            raise IndexError(f"records {start}..{stop - 1} of {store.path}, which has {len(store)}")
    records = _read_rows(None, ranges)
    tables: dict[str | None, np.ndarray] = {None: records}
    counts = {}
    for axis in _axes(first.fields):
        bounds = records[_bounds_name(axis)]
        counts[axis] = bounds[:, 1] - bounds[:, 0]
        tables[axis] = _read_rows(axis, _row_ranges(ranges, bounds))
    # Copies: what lies inside of rows is neither contiguous nor aligned.
    return Columns(
        num_records=len(records),
        values={field.name: tables[field.axis][field.name].copy() for field in first.fields},
        masks={field.name: records[_mask_name(field.name)] for field in first.fields if field.optional},
        counts=counts,
    )


def overview(
    ranges: Sequence[Range], fields: Sequence[str] = (), masks: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fields with one entry per record, (n, ...), and masks of others, (n,) bool, of records, range after range."""
    rows = _read_rows(None, ranges)
    return {name: rows[name].copy() for name in fields}, {name: rows[_mask_name(name)].astype(bool) for name in masks}


def _read_rows(axis: str | None, ranges: Sequence[Range]) -> np.ndarray:
    """Rows start..stop-1 of that table of each store, one range after the other, (n,) of the type of a row."""
    tables = {store: store._table(axis) for store in {store for store, _, _ in ranges}}
    parts = []
    for store, start, stop in ranges:
        try:
            parts.append(tables[store].dataset[start:stop])
        except OSError as error:
            raise store._damaged(error) from error
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).view(tables[ranges[0][0]].dtype)[:, 0]


def _row_ranges(records: Sequence[Range], bounds: np.ndarray) -> list[Range]:
    """Rows of an axis that belong to each range of records, from first row and end of every record, (n, 2)."""
    stores = [store for store, _, _ in records]
    if len(records) < len(bounds):
        counts = np.array([stop - start for _, start, stop in records])
        ends = np.cumsum(counts)
        bounds = np.column_stack([bounds[ends - counts, 0], bounds[ends - 1, 1]])
    return [(store, start, stop) for store, (start, stop) in zip(stores, bounds.tolist(), strict=True)]


class _Table:
    """Rows of an axis, or the records."""

    def __init__(self, dataset: h5py.Dataset, dtype: np.dtype[Any]) -> None:
        self.dataset, self.dtype = dataset, dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, (stop - start,) of `dtype`."""
        return self.dataset[start:stop].view(self.dtype)[:, 0]


def _axes(fields: Sequence[Field]) -> list[str]:
    return list(dict.fromkeys(field.axis for field in fields if field.axis is not None))


def _table_name(axis: str | None) -> str:
    return "records" if axis is None else f"rows/{axis}"


def _mask_name(field: str) -> str:
    return f"mask/{field}"


def _bounds_name(axis: str) -> str:
    return f"bounds/{axis}"


def _row_type(fields: Sequence[Field], axis: str | None) -> np.dtype[Any]:
    """Of an axis; of records with masks, and first row and end on each axis. Packed, little-endian."""
    members: list[Any] = [(field.name, field.dtype, field.shape) for field in fields if field.axis == axis]
    if axis is None:
        members += [(_mask_name(field.name), "uint8") for field in fields if field.optional]
        members += [(_bounds_name(name), "int64", (2,)) for name in _axes(fields)]
    return np.dtype(members).newbyteorder("<")


def _extend(table: h5py.Dataset, rows: np.ndarray) -> None:
    old = len(table)
    table.resize(old + len(rows), axis=0)
    table[old:] = rows.view(np.uint8).reshape(len(rows), -1) if len(rows) else np.empty((0, table.shape[1]), np.uint8)


def _stack(records: Sequence[Record], fields: Sequence[Field]) -> Columns:
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
    return Columns(num_records=len(records), values=values, masks=masks, counts=counts)
