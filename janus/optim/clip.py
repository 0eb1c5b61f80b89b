"""Clipping of the gradient of the global batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together, a float64 scalar; of those of this rank, whatever others have."""
    return sum_of_squares(_gradients(parameters)).sqrt()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements of all tensors, a float64 scalar, in a few operations for however many tensors.

    Squares of norms, which are in the formats of the tensors, are summed in float64.
    """
    norms = [torch.stack(torch._foreach_norm(same)).double() for same in _by_type(tensors).values()]
    return torch.cat(norms).square().sum()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, norm: Tensor | None = None) -> Tensor:
    """Scales all gradients in place so that their common 2-norm is at most `max_norm`; 0 never scales.

    Expects gradients that are already summed over ranks. A norm that is not finite scales nothing: the caller must look
    at it.

    Args:
        norm: that of the whole gradient, where these are a part of it; None computes it.

    Returns:
        The norm before clipping, a scalar.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters) if norm is None else norm
    if max_norm > 0.0:
        scale = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), 1.0)
        for dtype, group in _by_type(_gradients(parameters)).items():
            torch._foreach_mul_(group, scale.to(dtype))
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _by_type(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """In the groups that torch's operations for many tensors take."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return found
