"""Files of simulations: one structure in; a directory out that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms


def read_structure(path: Path, index: int = -1) -> Atoms:
    """One structure of any file that ASE reads.

    Args:
        path: the file.
        index: which structure, where a file has several; -1 is the last.

    Raises:
        OSError: the file cannot be opened.
        ValueError: ASE cannot read it, or it has no such structure.
    """
    from ase.io import read

    if not path.is_file():
        raise FileNotFoundError(f"no structure file {path}")
    try:
        return read(path, index=index)
    except OSError:
        raise
    except Exception as error:  # each of ASE's readers fails in its own way
        raise ValueError(
            f"{path}: ASE cannot read structure {index} of it ({type(error).__name__}: {error})"
        ) from error


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
