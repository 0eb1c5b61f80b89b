"""AdamW with weight decay where it belongs, by torch or by NVIDIA's fused kernels where these are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Backend: TypeAlias = Literal["auto", "torch", "apex", "te"]
"""Whose kernels update the weights; `auto`: of te, apex and torch the first that can."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What every backend keeps of each parameter, in its shape."""

_MODULES: dict[Backend, str] = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}
_INSTALL: dict[Backend, str] = {
    "te": "install it, pip install transformer-engine[pytorch]",
    "apex": "install it from github.com/NVIDIA/apex with its CUDA extensions (the apex of PyPI is something else)",
}


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101); the learning rate comes from a `Schedule`.

    Attributes:
        weight_decay: decoupled weight decay.
        beta1, beta2, eps: moments' decay rates and the denominator's offset.
        decay_1d: whether 1-D parameters (biases, norms, basis frequencies) decay as well. Off: only matrices, gates
            of shape (1, width) and embedding tables do.
        backend: whose kernels.
    """

    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay_1d: bool = False
    backend: Backend = "auto"


def build_adamw(
    parameters: Mapping[str, nn.Parameter], config: AdamWConfig, *, ndims: Mapping[str, int] | None = None
) -> Optimizer:
    """AdamW over the trainable parameters, in two groups: decayed and not.

    Args:
        ndims: number of dimensions by name, which decides on the decay; None for the parameters' own. Slices of
            parameters have one, whatever they are slices of.

    Raises:
        ValueError: the backend that was asked for is missing, or cannot update such parameters.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    def decays(name: str) -> bool:
        return config.decay_1d or (trainable[name].ndim if ndims is None else ndims[name]) > 1

    decayed = [parameter for name, parameter in trainable.items() if decays(name)]
    spared = [parameter for name, parameter in trainable.items() if not decays(name)]
    groups = [(decayed, config.weight_decay), (spared, 0.0)]
    settings: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
    chosen = choose_backend(config.backend, trainable.values())
    fused = None if chosen == "torch" else _import(chosen)
    # NVIDIA's launch nothing at all where the last tensor of a list is empty, as slices of parameters may be.
    full = [([parameter for parameter in group if parameter.numel()], decay) for group, decay in groups]
    if fused is not None and (kept := _groups(full)):
        return fused(kept, adam_w_mode=True, bias_correction=True, **settings)
    return torch.optim.AdamW(_groups(groups), fused=True, **settings)


def moments_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """`MOMENTS` of one of its parameters, after the first step. An empty one has empty ones, known to it or not."""
    if parameter.numel() == 0:
        return {moment: parameter.detach() for moment in MOMENTS}
    return optimizer.state[parameter]


def restart(optimizer: Optimizer, step: int) -> None:
    """As after so many steps, with moments of zero for the caller to fill in; after no step there are none."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # torch counts steps beside each parameter, the others in the group.
        by_group = not isinstance(optimizer, torch.optim.AdamW)
        if by_group:
            group["step"] = step
        for parameter in group["params"] if step > 0 else ():
            state = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            if not by_group:
                state["step"] = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = state


def _groups(groups: list[tuple[list[nn.Parameter], float]]) -> list[dict[str, Any]]:
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def choose_backend(backend: Backend, parameters: Iterable[nn.Parameter]) -> Backend:
    """`torch`, `te` or `apex`, as far as this process can tell: what is installed may differ between machines.

    Raises:
        ValueError: it was asked for and cannot be had.
    """
    if backend == "torch":
        return backend
    obstacle = _obstacle(list(parameters))
    if backend == "auto":
        return "torch" if obstacle is not None else next(filter(_is_there, _MODULES), "torch")
    if obstacle is not None:
        raise ValueError(f"optim.backend is {backend}, {obstacle}: choose torch, or auto")
    try:
        _import(backend)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"optim.backend is {backend}, but {_MODULES[backend]}.FusedAdam cannot be used ({error}): "
            f"{_INSTALL[backend]}; or choose torch, or auto"
        ) from error
    return backend


def _is_there(name: Backend) -> bool:
    try:
        _import(name)
    except (ImportError, OSError, RuntimeError):  # not there, or made for another torch or CUDA
        return False
    return True


def _obstacle(parameters: list[nn.Parameter]) -> str | None:
    """Why NVIDIA's kernels cannot update them."""
    devices = {_device_type(parameter) for parameter in parameters}
    if devices - {"cuda"}:
        return f"whose kernels are for CUDA, but the weights are on {', '.join(sorted(devices))}"
    dtypes = {parameter.dtype for parameter in parameters}
    if dtypes - {torch.float32}:
        return f"whose kernels keep moments in float32, but weights are {', '.join(sorted(map(str, dtypes)))}"
    return None


def _device_type(parameter: Tensor) -> str:
    return parameter.device.type


def _import(name: Backend) -> Callable[..., Optimizer]:
    module = import_module(_MODULES[name])
    if name == "apex" and not import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
        raise ImportError("apex was installed without its CUDA extensions")
    found: Callable[..., Optimizer] | None = getattr(module, "FusedAdam", None)
    if found is None:
        raise ImportError(f"{module.__name__} has no FusedAdam")
    return found
