"""A tiny model with random weights, saved once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from matris.config import ModelConfig, Precision
from matris.exported import save_model
from matris.model import MatRIS


@pytest.fixture(scope="session")
def tiny_model() -> MatRIS:
    """One layer of width 8, fp64, with reference energies of Cu, O and H."""
    config = ModelConfig(
        num_layers=1, hidden_size=8, readout_hidden_sizes=(8,), pairwise_cutoff=4.0, three_body_cutoff=3.0
    )
    model = MatRIS(config, precision=Precision.fp64, seed=0)
    model.set_reference_energies({29: -3.5, 8: -4.0, 1: -1.0})
    return model


@pytest.fixture(scope="session")
def tiny_model_directory(tiny_model: MatRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_model, directory, provenance={"made_by": "tests"})
    return directory
