"""Whether files can be made somewhere, asked before the work and not at its end."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Makes nothing that stays.

    Raises:
        ValueError: files cannot be written in `folder`, naming it and what is in the way.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: files cannot be written there ({existing}: {error.strerror})") from error


def writable_file(word: str) -> Path:
    """A path on the command line that a file can be written to."""
    path = Path(word)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{word}: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a directory: name a file to write")
    try:
        check_writable(path.parent)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
