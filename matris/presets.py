"""Published model sizes by name. Imports nothing heavy."""

from __future__ import annotations

from matris.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    "s": ModelConfig(num_layers=4),
    "m": ModelConfig(num_layers=6),
    "l": ModelConfig(num_layers=10),
}
"""MatRIS S, M and L of arXiv 2603.02002: 4 294 897, 6 344 433 and 10 443 505 parameters."""
