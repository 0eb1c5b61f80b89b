"""Optimizer, learning-rate schedule, clipping and exponential moving average."""

from janus.optim.adamw import MOMENTS, AdamWConfig, Backend, build_adamw, choose_backend, moments_of, restart
from janus.optim.clip import clip_gradients, gradient_norm, sum_of_squares
from janus.optim.ema import ExponentialMovingAverage
from janus.optim.schedule import DecayStyle, Schedule

__all__ = [
    "MOMENTS",
    "AdamWConfig",
    "Backend",
    "DecayStyle",
    "ExponentialMovingAverage",
    "Schedule",
    "build_adamw",
    "choose_backend",
    "clip_gradients",
    "gradient_norm",
    "moments_of",
    "restart",
    "sum_of_squares",
]
