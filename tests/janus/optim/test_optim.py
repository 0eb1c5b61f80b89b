"""Schedules against their formulas, clipping, weight-decay groups and the moving average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from janus.optim import AdamWConfig, DecayStyle, ExponentialMovingAverage, Schedule, build_adamw, clip_gradients


def test_cosine_with_warm_up() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_steps=4, num_steps=14)
    assert [schedule.rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule.rate(4) == 1.0
    assert schedule.rate(9) == pytest.approx(0.55)
    assert schedule.rate(13) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)))
    assert schedule.rate(14) == schedule.rate(99) == 0.1


def test_wsd() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.2, warmup_steps=2, decay_steps=4, num_steps=10, style=DecayStyle.wsd)
    assert [schedule.rate(step) for step in range(2, 7)] == [1.0] * 5
    assert schedule.rate(7) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule.rate(10) == 0.2


def test_constant() -> None:
    schedule = Schedule(lr=1.0, warmup_steps=1, num_steps=3, style=DecayStyle.constant)
    assert [schedule.rate(step) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr 0.0"),
        ({"min_lr": 2.0}, "min_lr 2.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"warmup_steps": 11}, "warm-up of 11 steps"),
        ({"warmup_steps": 6, "decay_steps": 5, "style": DecayStyle.wsd}, "decay of 5 steps"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{"lr": 1.0, "num_steps": 10, **settings})  # type: ignore[arg-type]


def test_clipping_scales_to_the_norm_or_not_at_all() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]

    def give() -> None:
        parameters[0].grad = torch.tensor([3.0, 0.0])
        parameters[1].grad = torch.tensor([4.0], dtype=torch.float64)

    give()
    assert clip_gradients(parameters, 0.5) == 5.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.4], dtype=torch.float64))
    for max_norm in (0.0, 6.0):
        give()
        assert clip_gradients(parameters, max_norm) == 5.0
        assert parameters[1].grad.item() == 4.0
    parameters[0].grad = torch.tensor([float("inf"), 1.0])
    assert not clip_gradients(parameters, 1.0).isfinite()
    assert parameters[0].grad[1] == 1.0


def test_one_dimensional_parameters_do_not_decay() -> None:
    model = nn.Linear(2, 3)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.register_parameter("frozen", frozen)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for decay_1d in (False, True):
        optimizer = build_adamw(dict(model.named_parameters()), AdamWConfig(weight_decay=0.5, decay_1d=decay_1d))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before["weight"] * (0.9025 if decay_1d else 0.95))
        torch.testing.assert_close(model.bias.detach(), before["bias"] * (0.95 if decay_1d else 1.0))
        assert torch.equal(frozen, before["frozen"])


def test_moving_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ExponentialMovingAverage(dict(model.named_parameters()), 0.5)
    nn.init.ones_(model.weight)
    ema.update(1)  # decay 2/11 early on
    assert ema.average["weight"].item() == pytest.approx(9 / 11)
    ema.update(1000)
    assert ema.average["weight"].item() == pytest.approx(10 / 11)
    with ema.applied():
        assert model.weight.item() == pytest.approx(10 / 11)
    assert model.weight.item() == 1.0
    with pytest.raises(ValueError, match="EMA decay is 1"):
        ExponentialMovingAverage(dict(model.named_parameters()), 1.0)
