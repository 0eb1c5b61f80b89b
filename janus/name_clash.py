"""The names `janus` and `matris` are taken on PyPI by other projects; installed beside ours, files of both mix."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

FOREIGN_DISTRIBUTIONS = ("janus", "matris")


def check_name_clash(search_path: Iterable[str] | None = None) -> None:
    """Refuse to work beside the PyPI distributions `janus` (a queue) and `matris` (the reference package).

    Reads directory listings only: importlib.metadata would cost more than the rest of our own import.

    Args:
        search_path: directories to look in; `sys.path` by default.

    Raises:
        ImportError: naming the distribution, where it is and what to uninstall.
    """
    for directory in sys.path if search_path is None else search_path:
        try:
            entries = os.listdir(directory or ".")
        except OSError:  # sys.path may name zip files and directories that do not exist
            continue
        for entry in entries:
            name = entry.partition("-")[0].lower()
            if name in FOREIGN_DISTRIBUTIONS and entry.endswith((".dist-info", ".egg-info")):
                raise ImportError(
                    f"the PyPI distribution {name!r} ({os.path.join(directory, entry)}) uses the same import name as a "
                    f"package of janus-matris; run `pip uninstall {name}` and then "
                    "`pip install --force-reinstall --no-deps janus-matris` (from a clone: `pip install -e .`), "
                    "or install janus-matris in its own environment"
                )
