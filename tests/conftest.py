"""Shared fixtures. Tests run single-threaded, so that several of them can share a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is loaded. Some tests fork, and a child that inherits a thread pool without its threads waits for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_directory() -> Path:
    """Large reference and data files beside the repository or inside it; tests that need them are skipped elsewhere."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (root / "shared", root.parent / "shared"):
        if candidate.is_dir():
            return candidate
    pytest.skip("no directory `shared` beside the repository")
