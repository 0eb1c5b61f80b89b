"""torch's AdamW with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101); the learning rate comes from a `Schedule`.

    Attributes:
        weight_decay: decoupled weight decay.
        beta1, beta2, eps: moments' decay rates and the denominator's offset.
        decay_1d: whether 1-D parameters (biases, norms, basis frequencies) decay as well. Off: only matrices, gates
            of shape (1, width) and embedding tables do.
    """

    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay_1d: bool = False


def build_adamw(
    parameters: Mapping[str, nn.Parameter], config: AdamWConfig, *, ndims: Mapping[str, int] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: decayed and not.

    Args:
        ndims: number of dimensions by name, which decides on the decay; None for the parameters' own. Slices of
            parameters have one, whatever they are slices of.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    def decays(name: str) -> bool:
        return config.decay_1d or (trainable[name].ndim if ndims is None else ndims[name]) > 1

    decayed = [parameter for name, parameter in trainable.items() if decays(name)]
    spared = [parameter for name, parameter in trainable.items() if not decays(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
