"""Published model sizes by name. Imports nothing heavy."""

from __future__ import annotations

from matris.config import ModelConfig


def _mixture(
    *, num_layers: int, width: int, hidden: int, experts: int, topk: int, kv_channels: int = 64
) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=width,
        num_elements=118,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=hidden,
        kv_channels=kv_channels,
    )


PRESETS: dict[str, ModelConfig] = {
    "s": ModelConfig(num_layers=4),
    "m": ModelConfig(num_layers=6),
    "l": ModelConfig(num_layers=10),
    "moe-tiny": _mixture(num_layers=2, width=64, hidden=64, experts=8, topk=2, kv_channels=16),
    "moe-s": _mixture(num_layers=6, width=512, hidden=416, experts=48, topk=4),
    "moe-m": _mixture(num_layers=6, width=768, hidden=544, experts=56, topk=8),
    "moe-l": _mixture(num_layers=6, width=1024, hidden=1536, experts=72, topk=16),
}
"""MatRIS S, M and L of arXiv 2603.02002: 4 294 897, 6 344 433 and 10 443 505 parameters.

MatRIS-MoE S, M and L of arXiv 2604.15821, whose widths are not public: chosen so that total and active parameters are
those of the paper (1.09 / 0.19, 2.47 / 0.56 and 11.5 / 2.89 billion). `moe-tiny` is for tests and small data.
"""
