"""Shared fixtures. Tests run single-threaded, so that several of them can share a machine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_directory() -> Path:
    """Large reference and data files beside the repository or inside it; tests that need them are skipped elsewhere."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (root / "shared", root.parent / "shared"):
        if candidate.is_dir():
            return candidate
    pytest.skip("no directory `shared` beside the repository")
