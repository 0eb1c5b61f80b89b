"""Files of simulations: one structure in; a directory out that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from matris.writable import check_writable

if TYPE_CHECKING:
    from ase import Atoms


def read_structure(path: Path, index: int = -1) -> Atoms:
    """One structure of any file that ASE reads.

    Args:
        path: the file.
        index: which structure, where a file has several; -1 is the last.

    Raises:
        OSError: the file is not there or may not be read.
        ValueError: ASE cannot read it, or it has no such structure.
    """
    from ase.io import read
    from ase.io.formats import UnknownFileTypeError, filetype

    if not path.is_file():
        raise FileNotFoundError(f"no structure file {path}")
    with open(path, "rb"):  # says so if it may not be read; what fails afterwards is the content
        pass
    kind = "any format that it knows"
    try:
        kind = filetype(str(path))
        # A slice, because an index beyond the first structure is the first one to some of the readers.
        frames = read(path, index=slice(index, index + 1 if index >= 0 else None), format=kind)
    except UnknownFileTypeError as error:
        raise ValueError(f"{path}: ASE does not recognise its format ({error})") from error
    except Exception as error:  # each of ASE's readers fails in its own way
        reason = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__} in its reader"
        raise ValueError(
            f"{path}: ASE cannot read it as {kind}; it is damaged or of another format ({reason})"
        ) from error
    if not frames and index in (0, -1):
        raise ValueError(f"{path}: ASE finds no complete structure in it, read as {kind}")
    if len(frames) < max(1, -index):
        raise ValueError(f"{path} has no structure {index}: it has fewer (they count from 0; -1 is the last)")
    return frames[0]


@contextmanager
def output_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory to write in, `PATH.partial`, that becomes `path` when the block ends well.

    After an error or Ctrl-C it stays under that name with what there is by then, or goes if there is nothing.

    Args:
        path: directory of the results; it may exist, then files of the same names are replaced one by one.
        overwrite: whether `path` and `PATH.partial` may exist.

    Raises:
        ValueError: one of them exists and `overwrite` is not set.
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    for existing in (path, partial):
        if existing.exists() and not overwrite:
            raise ValueError(f"{existing} exists: choose another --output, or give --overwrite")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: --output is a directory")
    if partial.exists():
        shutil.rmtree(partial)
    check_writable(path.parent)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        if not any(partial.iterdir()):
            partial.rmdir()
        raise
    if path.exists():
        for file in partial.iterdir():
            os.replace(file, path / file.name)
        partial.rmdir()
    else:
        os.rename(partial, path)
