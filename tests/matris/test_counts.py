"""What a training step computes, counted: matrix-product FLOPs against the forward pass's."""

import torch
from ase.build import bulk
from torch.utils.flop_counter import FlopCounterMode

from matris.config import ModelConfig
from matris.model import MatRIS
from tests.matris.structures import TINY, batch_of, rattled

CONFIG = ModelConfig(**{**vars(TINY), "hidden_size": 32})


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_step_costs_six_forward_passes():
    """One forward, one force pass, four in the second backward: nothing twice, no weight gradient in the force pass."""
    model = MatRIS(CONFIG, seed=0)
    model.readout.magmom.requires_grad_(False)
    batch = batch_of(rattled(bulk("Cu", cubic=True)), config=CONFIG)

    def forward() -> None:
        with torch.no_grad():
            model(batch, forces=False, stress=False)

    def forces() -> None:
        model(batch)

    def step() -> None:
        prediction = model(batch, create_graph=True)
        loss = prediction.energy.sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        loss.backward()

    one = count(forward)
    assert 1.95 <= count(forces) / one <= 2.0
    assert 5.8 <= count(step) / one <= 6.05
