"""NVIDIA's fused AdamW in place of torch's: chosen, refused, and the same update and checkpoint state.

Neither library is installed where these tests run, nor is a GPU there: stand-ins have the constructors of the real
ones, keep what they keep where they keep it, and leave out what their kernels leave out.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from janus.optim import MOMENTS, AdamWConfig, adamw, build_adamw, moments_of, restart
from janus.optim.adamw import Backend


class _FusedAdam(torch.optim.Optimizer):
    """What both have in common: a step count in each group, moments in float32, float32 weights."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert group["params"], "both take the device from the first parameter of a group"
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in given:
                assert parameter.dtype == torch.float32
                if not self.state[parameter]:
                    self.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            if not given or given[-1].numel() == 0:
                return  # kernels are launched at the last piece of the last tensor
            for parameter in given:
                self._update(parameter, group)

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        mean, square = (self.state[parameter][moment] for moment in MOMENTS)
        (beta1, beta2), step, gradient = group["betas"], group["step"], parameter.grad
        assert gradient is not None
        assert (group["bias_correction"], self.adam_w_mode) == (True, 1)  # type: ignore[attr-defined]
        mean.copy_(beta1 * mean + (1.0 - beta1) * gradient)
        square.copy_(beta2 * square + (1.0 - beta2) * gradient * gradient)
        denominator = (square / (1.0 - beta2**step)).sqrt() + group["eps"]
        change = mean / (1.0 - beta1**step) / denominator + group["weight_decay"] * parameter
        parameter.sub_(group["lr"] * change)


class _Apex(_FusedAdam):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert (amsgrad, capturable, master_weights) == (False, False, False)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)


class _TransformerEngine(_FusedAdam):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ) -> None:
        assert (amsgrad, capturable, master_weights) == (False, False, False)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)


def _install(monkeypatch: pytest.MonkeyPatch, *names: str, apex_extensions: bool = True) -> None:
    """Those of the two that are named; the other one is missing."""
    modules: dict[str, ModuleType | None] = {
        "transformer_engine.pytorch.optimizers": None,
        "apex.optimizers": None,
        "apex.multi_tensor_apply": None,
    }
    if "te" in names:
        modules["transformer_engine.pytorch.optimizers"] = found = ModuleType("transformer_engine.pytorch.optimizers")
        found.FusedAdam = _TransformerEngine  # type: ignore[attr-defined]
        modules |= {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    if "apex" in names:
        modules["apex.optimizers"] = found = ModuleType("apex.optimizers")
        found.FusedAdam = _Apex  # type: ignore[attr-defined]
        modules["apex.multi_tensor_apply"] = apply = ModuleType("apex.multi_tensor_apply")
        apply.multi_tensor_applier = ModuleType("applier")  # type: ignore[attr-defined]
        apply.multi_tensor_applier.available = apex_extensions
        modules["apex"] = ModuleType("apex")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights count as being on a GPU."""
    monkeypatch.setattr(adamw, "_device_type", lambda parameter: "cuda")


def _weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A matrix, a bias, and slices with nothing in them, last of their groups."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"matrix": (4, 3), "bias": (5,), "empty_matrix": (0, 3), "empty_bias": (0,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def _steps(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], first: int, count: int) -> None:
    """With gradients that depend on the step alone, and another learning rate each time."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        ((), torch.optim.AdamW),
        (("apex",), _Apex),
        (("te",), _TransformerEngine),
        (("apex", "te"), _TransformerEngine),
    ],
)
@pytest.mark.usefixtures("on_cuda")
def test_auto_takes_the_first_that_is_there(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], wanted: type
) -> None:
    _install(monkeypatch, *installed)
    assert type(build_adamw(_weights(), AdamWConfig())) is wanted
    assert type(build_adamw(_weights(), AdamWConfig(backend="torch"))) is torch.optim.AdamW


@pytest.mark.usefixtures("on_cuda")
def test_apex_can_be_asked_for_beside_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex", "te")
    assert type(build_adamw(_weights(), AdamWConfig(backend="apex"))) is _Apex


def test_auto_is_torch_where_the_others_cannot_update(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "apex", "te")
    assert type(build_adamw(_weights(), AdamWConfig())) is torch.optim.AdamW  # on CPU
    monkeypatch.setattr(adamw, "_device_type", lambda parameter: "cuda")
    assert type(build_adamw(_weights(torch.float64), AdamWConfig())) is torch.optim.AdamW
    _install(monkeypatch, "apex", apex_extensions=False)
    assert type(build_adamw(_weights(), AdamWConfig())) is torch.optim.AdamW


@pytest.mark.parametrize("backend", ["apex", "te"])
def test_what_is_asked_for_and_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    config = AdamWConfig(backend=backend)
    _install(monkeypatch, "apex", "te")
    with pytest.raises(ValueError, match=rf"optim.backend is {backend}, .* CUDA, but the weights are on cpu: choose"):
        build_adamw(_weights(), config)
    monkeypatch.setattr(adamw, "_device_type", lambda parameter: "cuda")
    with pytest.raises(ValueError, match=rf"optim.backend is {backend}, .* weights are torch.float64: choose"):
        build_adamw(_weights(torch.float64), config)
    _install(monkeypatch)
    with pytest.raises(ValueError, match=rf"optim.backend is {backend}, but .*FusedAdam cannot be used .*install it"):
        build_adamw(_weights(), config)
    _install(monkeypatch, "apex", apex_extensions=False)
    with pytest.raises(ValueError, match="without its CUDA extensions|transformer_engine"):
        build_adamw(_weights(), config)


@pytest.mark.parametrize("backend", ["apex", "te"])
@pytest.mark.usefixtures("on_cuda")
def test_updates_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Also of weights before which empty slices lie, at which NVIDIA's kernels would never be launched."""
    _install(monkeypatch, backend)
    settings = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
    exact, weights = _weights(torch.float64), _weights()
    _steps(build_adamw(exact, AdamWConfig(backend="torch", **settings)), exact, 0, 5)  # type: ignore[arg-type]
    optimizer = build_adamw(weights, AdamWConfig(backend=backend, **settings))  # type: ignore[arg-type]
    _steps(optimizer, weights, 0, 5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), exact[name].detach(), rtol=1e-5, atol=1e-6)
    assert float((weights["matrix"] - _weights()["matrix"]).detach().abs().min()) > 1e-3


@pytest.mark.parametrize("before", ["torch", "apex", "te"])
@pytest.mark.parametrize("after", ["torch", "apex", "te"])
@pytest.mark.usefixtures("on_cuda")
def test_state_passes_from_any_backend_to_any(monkeypatch: pytest.MonkeyPatch, before: Backend, after: Backend) -> None:
    """Moments and step are all there is, by parameter and in its shape; with the same one, it goes on bit by bit."""
    _install(monkeypatch, "apex", "te")
    straight, weights = _weights(), _weights()
    _steps(build_adamw(straight, AdamWConfig(backend=before)), straight, 0, 6)
    first = build_adamw(weights, AdamWConfig(backend=before))
    _steps(first, weights, 0, 3)
    second = build_adamw(weights, AdamWConfig(backend=after))
    restart(second, 3)
    for weight in weights.values():
        source, target = moments_of(first, weight), moments_of(second, weight)
        for moment in MOMENTS:
            assert source[moment].shape == target[moment].shape == weight.shape
            target[moment].copy_(source[moment])
    _steps(second, weights, 3, 3)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, straight[name], rtol=1e-5, atol=1e-6)
        assert before != after or torch.equal(weight, straight[name])


@pytest.mark.parametrize("backend", ["torch", "apex", "te"])
@pytest.mark.usefixtures("on_cuda")
def test_restart_at_no_step_forgets_everything(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    _install(monkeypatch, "apex", "te")
    straight, weights = _weights(), _weights()
    _steps(build_adamw(straight, AdamWConfig(backend=backend)), straight, 0, 2)
    optimizer = build_adamw(weights, AdamWConfig(backend=backend))
    _steps(optimizer, weights, 4, 3)
    with torch.no_grad():
        for name, weight in _weights().items():
            weights[name].copy_(weight)
    restart(optimizer, 0)
    assert not optimizer.state
    _steps(optimizer, weights, 0, 2)
    assert all(torch.equal(weights[name], straight[name]) for name in weights)


@pytest.mark.usefixtures("on_cuda")
def test_a_rank_may_hold_nothing_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "te")
    weights = {name: weight for name, weight in _weights().items() if name.startswith("empty")}
    optimizer = build_adamw(weights, AdamWConfig(backend="te"))
    _steps(optimizer, weights, 0, 1)
    assert all(moments_of(optimizer, weight)["exp_avg"].shape == weight.shape for weight in weights.values())
