"""Clipping of the gradient of the global batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their common 2-norm is at most `max_norm`; 0 never scales.

    Expects gradients that are already summed over ranks, hence equal on all of them. A norm that is not finite scales
    nothing: the caller must look at it.

    Returns:
        The norm before clipping, a scalar.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]))
    if max_norm > 0.0:
        scale = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), 1.0)
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for dtype, group in by_type.items():
            torch._foreach_mul_(group, scale.to(dtype))
    return norm
