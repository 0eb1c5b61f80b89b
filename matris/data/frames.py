"""Files as a stream of blocks of frames, and blocks as labelled structures.

One process cuts files into blocks, which is cheap (text is split, not parsed; databases give row numbers); any
process parses a block. So memory does not grow with the file and the parsing runs in parallel.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from janus.data.store import StoreReader
from matris.data.labels import LabelKeys, present_keys, read_charge_and_spin, read_labels
from matris.data.records import Sample, samples_of
from matris.graph.structure import Structure

if TYPE_CHECKING:
    from ase import Atoms

OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
BLOCK_BYTES = 8 * 1024**2  # of text, or about as much of `ase.Atoms`, beyond which a block ends
LMDB_RESERVED = (b"nextid", b"metadata", b"deleted_ids")


class FileKind(Enum):
    """How a file is read."""

    xyz = "extended XYZ"
    ase_db = "ASE database"
    aselmdb = "fairchem LMDB"
    store = "HDF5 store"
    ase = "any other format that ASE reads"


@dataclass(frozen=True, kw_only=True)
class FrameBlock:
    """Consecutive frames of one file, not parsed yet. Picklable.

    Attributes:
        path: the file.
        kind: its format.
        first: number of the first frame, from 0.
        frames: per frame its text (xyz), row key (databases), record number (store) or `ase.Atoms`.
        num_bytes: bytes of the file, as it lies on disk, since the block before; for progress.
    """

    path: str
    kind: FileKind
    first: int
    frames: tuple[Any, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame as a sample, where its labels came from, and every key that it has."""

    sample: Sample
    sources: dict[str, str]
    keys: frozenset[str]


def expand_path(path: str) -> list[str]:
    """The files behind a path: itself, or the `*.aselmdb` files of a folder, sorted.

    Raises:
        ValueError: does not exist, or a folder without such files.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    if not os.path.isdir(path):
        return [path]
    files = sorted(str(file) for file in Path(path).glob("*.aselmdb"))
    if not files:
        raise ValueError(f"{path}: a folder without *.aselmdb files; give the files themselves")
    return files


def refuse_idle_keys(paths: Sequence[str], keys: LabelKeys) -> None:
    """Stores hold labels that were found before, so keys act on none of them.

    Raises:
        ValueError: keys or a stress unit are given, and all files of all paths are stores.
    """
    files = [file for path in paths for file in expand_path(path)]
    if keys != LabelKeys() and all(file_kind(file) is FileKind.store for file in files):
        unset = asdict(LabelKeys())
        given = ", ".join(
            f"{name}={value.value if isinstance(value, Enum) else value}"
            for name, value in asdict(keys).items()
            if value != unset[name]
        )
        raise ValueError(
            f"label keys have no effect on stores ({given}; {', '.join(files[:3])}): leave them out, or prepare the "
            "original files with them"
        )


def file_kind(path: str) -> FileKind:
    """By the name alone."""
    name = Path(path).name.lower()
    for suffix in OPENERS:
        name = name.removesuffix(suffix)
    kinds = {
        ".xyz": FileKind.xyz,
        ".extxyz": FileKind.xyz,
        ".db": FileKind.ase_db,
        ".aselmdb": FileKind.aselmdb,
        ".h5": FileKind.store,
        ".hdf5": FileKind.store,
    }
    return kinds.get(Path(name).suffix, FileKind.ase)


def block_size(number: int) -> int:
    """Most frames in block `number` of a run: few at first, so that a small set still keeps all processes busy, up to
    4096, so that a large one does not become a million blocks."""
    return min(32 << (number // 64), 4096)


def iter_blocks(paths: list[str]) -> Iterator[FrameBlock]:
    """All frames of all files as blocks; the same paths always give the same blocks.

    Raises:
        ValueError: a file that cannot be read; names file and frame.
    """
    number = 0
    for path in paths:
        kind = file_kind(path)
        frames: list[Any] = []
        first, position, held = 0, 0, 0
        for frame, progress in _SPLITTERS[kind](path):
            frames.append(frame)
            held += _num_bytes(frame)
            if len(frames) == block_size(number) or held >= BLOCK_BYTES:
                yield FrameBlock(path=path, kind=kind, first=first, frames=tuple(frames), num_bytes=progress - position)
                number, first, position, held, frames = number + 1, first + len(frames), progress, 0, []
        if frames:
            rest = os.path.getsize(path) - position
            yield FrameBlock(path=path, kind=kind, first=first, frames=tuple(frames), num_bytes=rest)
            number += 1


def _num_bytes(frame: Any) -> int:
    """Roughly what a frame of a block holds in memory; row numbers hold nothing to speak of."""
    if isinstance(frame, str):
        return len(frame)
    return 0 if isinstance(frame, int | bytes) else 200 * len(frame)


def read_block(
    block: FrameBlock, keys: LabelKeys, task: str | None, split_key: str | None = None
) -> Iterator[Frame | ValueError]:
    """The frames of a block; one that cannot be used comes as the error that says why, with file and frame number.

    Args:
        keys: where the labels are.
        task: of all frames; None keeps the task of a store's record and means "default" elsewhere.
        split_key: name of the info entry that says which frames stay together when data sets are split.
    """
    if block.kind is FileKind.store:
        try:
            yield from _read_records(block, task, split_key)
        except ValueError as error:
            yield error
        return
    for number, outcome in enumerate(_PARSERS[block.kind](block), start=block.first):
        identifier = f"{block.path}:{number}"
        try:
            if isinstance(outcome, Exception):
                raise outcome
            yield _frame(outcome, identifier, keys, task or "default", split_key)
        except Exception as error:
            yield ValueError(f"{block.path}, frame {number} (counted from 0): {_reason(error)}")


def _reason(error: Exception) -> str:
    """On one line. Readers of other packages raise anything, so the type is part of it."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"unknown element or missing key {text}"
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _frame(atoms: Atoms, identifier: str, keys: LabelKeys, task: str, split_key: str | None) -> Frame:
    structure = Structure.from_atoms(atoms)
    found = read_labels(atoms, keys)
    charge, spin = read_charge_and_spin(atoms)
    sample = Sample(
        identifier=identifier,
        structure=structure,
        labels=found.labels,
        task=task,
        charge=charge,
        spin=spin,
        group=None if split_key is None else _group(atoms, split_key),
    )
    return Frame(sample=sample, sources=found.sources, keys=frozenset(present_keys(atoms)))


def _group(atoms: Atoms, split_key: str) -> str:
    value = atoms.info.get(split_key)
    if value is None or not str(value).strip():
        raise ValueError(
            f"no info entry {split_key!r}, by which the data are to be split (entries: "
            f"{', '.join(sorted(map(str, atoms.info))) or 'none'}): every frame needs one"
        )
    return " ".join(str(value).split())


def check_split_key(store: StoreReader, split_key: str) -> None:
    """Stores hold the groups of the key that they were prepared with.

    Raises:
        ValueError: another key, or none.
    """
    found = store.attributes.get("split_key")
    if len(store) and found != split_key:
        has = "no such key" if found is None else f"the key {found!r}"
        raise ValueError(
            f"{store.path}: to be split by {split_key!r}, but it was prepared with {has}: prepare it again from the "
            f"original files with --split_key {split_key}"
        )


def _split_xyz(path: str) -> Iterator[tuple[str, int]]:
    """Text of each frame and position in the (compressed) file."""
    number = 0
    with open(path, "rb") as raw:
        opener = OPENERS.get(Path(path).suffix.lower())
        try:
            with io.TextIOWrapper(opener(raw) if opener else raw, encoding="utf-8") as text:
                pending = text.readline()
                while pending:
                    lines = [pending]
                    if not pending.strip():
                        if text.read().strip():
                            raise ValueError("a blank line where the number of atoms should be")
                        return
                    if not pending.strip().isdecimal():
                        raise ValueError(f"{pending.strip()[:40]!r} where the number of atoms should be")
                    lines += [text.readline() for _ in range(int(pending) + 1)]
                    if not lines[-1]:
                        raise ValueError(f"the file ends within this frame of {int(pending)} atoms")
                    pending = text.readline()
                    while pending.lstrip().startswith("VEC"):  # cell vectors below the atoms, an old dialect
                        lines.append(pending)
                        pending = text.readline()
                    yield "".join(lines), raw.tell()
                    number += 1
        except (ValueError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}, frame {number} (counted from 0): {_reason(error)}") from error


def _parse_xyz(block: FrameBlock) -> Iterator[Atoms | Exception]:
    from ase.io.extxyz import read_xyz

    for text in block.frames:
        try:
            yield next(read_xyz(io.StringIO(text), index=slice(0, 1), properties_parser=_parse_comment))
        except Exception as error:
            yield error


def _parse_comment(line: str) -> dict[str, Any]:
    """ASE's parser, which accepts only nine values for `stress` and `virial`; six are as good."""
    from ase.io.extxyz import key_val_str_to_dict

    shielded = re.sub(r"(?<!\S)(stress|virial)\s*=", r"shielded_\1=", line)
    values = key_val_str_to_dict(shielded)
    for name in ("stress", "virial"):
        if (value := values.pop(f"shielded_{name}", None)) is not None:
            if not isinstance(value, np.ndarray) or value.shape not in ((6,), (9,)):
                raise ValueError(f"{name} is {value}: expected 9 or 6 numbers (xx yy zz yz xz xy)")
            values[name] = value.reshape(3, 3) if value.size == 9 else value
    return values


def _split_ase_db(path: str) -> Iterator[tuple[int, int]]:
    import ase.db

    size = os.path.getsize(path)
    try:
        with ase.db.connect(path) as database:
            count = len(database)
            for number, row in enumerate(database.select(columns=["id"], include_data=False)):
                yield row.id, size * (number + 1) // count
    except Exception as error:
        raise ValueError(f"{path}: not a readable ASE database ({_reason(error)})") from error


def _parse_ase_db(block: FrameBlock) -> Iterator[Atoms | Exception]:
    import ase.db

    with ase.db.connect(block.path) as database:
        for row_id in block.frames:
            try:
                yield _row_to_atoms(database.get(id=row_id))
            except Exception as error:
                yield error


def _open_lmdb(path: str) -> Any:
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading .aselmdb needs the package lmdb: pip install 'janus-matris[aselmdb]'"
        ) from error
    try:
        return lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{path}: not a readable LMDB file ({error})") from error


def _split_aselmdb(path: str) -> Iterator[tuple[bytes, int]]:
    size = os.path.getsize(path)
    with closing(_open_lmdb(path)) as environment, environment.begin() as transaction:
        # Keys are decimal row numbers as text, which the file sorts as text.
        try:
            rows = sorted(int(key) for key in transaction.cursor().iternext(values=False) if key not in LMDB_RESERVED)
        except Exception as error:
            raise ValueError(f"{path}: not an LMDB file of numbered rows ({_reason(error)})") from error
    for number, row in enumerate(rows):
        yield b"%d" % row, size * (number + 1) // len(rows)


def _parse_aselmdb(block: FrameBlock) -> Iterator[Atoms | Exception]:
    from ase.db.row import AtomsRow

    with closing(_open_lmdb(block.path)) as environment, environment.begin() as transaction:
        for key in block.frames:
            try:
                yield _row_to_atoms(AtomsRow({**json.loads(zlib.decompress(transaction.get(key))), "id": int(key)}))
            except Exception as error:
                yield error


def _row_to_atoms(row: Any) -> Atoms:
    """With the row's key-value pairs and data in `info`, where labels and charge may be."""
    atoms = row.toatoms()
    atoms.info.update(row.key_value_pairs)
    if isinstance(row.data, dict):
        atoms.info.update(row.data)
    return atoms


def _split_ase(path: str) -> Iterator[tuple[Atoms, int]]:
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    number = 0
    try:
        for atoms in ase.io.iread(path, ":"):
            yield atoms, 0
            number += 1
    except UnknownFileTypeError as error:
        raise ValueError(f"{path}: ASE does not know this file format ({error})") from error
    except Exception as error:
        raise ValueError(f"{path}, frame {number} (counted from 0): cannot be read: {_reason(error)}") from error


def _parse_ase(block: FrameBlock) -> Iterator[Atoms | Exception]:
    yield from block.frames


def _split_store(path: str) -> Iterator[tuple[int, int]]:
    size, count = os.path.getsize(path), len(StoreReader(path))
    for number in range(count):
        yield number, size * (number + 1) // count


def _read_records(block: FrameBlock, task: str | None, split_key: str | None) -> Iterator[Frame]:
    store = StoreReader(block.path)
    if split_key is not None:
        check_split_key(store, split_key)
    for sample in samples_of(store.columns(block.frames[0], block.frames[-1] + 1)):
        sample = sample if split_key is not None else replace(sample, group=None)
        labels = vars(sample.labels)
        sources = {name: "store" for name, value in labels.items() if value is not None}
        sample = sample if task is None else replace(sample, task=task)
        yield Frame(sample=sample, sources=sources, keys=frozenset(sources))


_SPLITTERS = {
    FileKind.xyz: _split_xyz,
    FileKind.ase_db: _split_ase_db,
    FileKind.aselmdb: _split_aselmdb,
    FileKind.store: _split_store,
    FileKind.ase: _split_ase,
}
_PARSERS = {
    FileKind.xyz: _parse_xyz,
    FileKind.ase_db: _parse_ase_db,
    FileKind.aselmdb: _parse_aselmdb,
    FileKind.ase: _parse_ase,
}
