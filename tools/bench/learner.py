"""What updates the model of a benchmark: as in a run, with all of a run's work in it."""

from __future__ import annotations

from janus.optim import AdamWConfig, Schedule
from janus.sharding import Policy
from janus.training.learner import Learner
from matris.model import MatRIS


def learner_of(model: MatRIS, *, policy: Policy = "regather") -> Learner:
    """Of energies, forces and stress: AdamW, clipping and an average of the weights, on the ranks of the model's mesh.

    The readout of magnetic moments is frozen, and steps are small: updates are timed, and should change little.

    Args:
        model: on its device, before its weights are shared out.
        policy: of weights that a shard axis shares.
    """
    model.readout.magmom.requires_grad_(False)
    return Learner(
        model,
        AdamWConfig(),
        Schedule(lr=1e-6, num_steps=1000),
        ema_decay=0.999,
        clip_grad=1.0,
        mesh=model.mesh,
        units=model.sharding_units(),
        experts=model.expert_sites(),
        policy=policy,
    )
