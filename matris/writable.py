"""Whether files can be made somewhere, asked before the work and not at its end."""

from __future__ import annotations

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
