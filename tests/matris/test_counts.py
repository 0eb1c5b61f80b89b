"""What a training step computes, counted: matrix-product FLOPs against the forward pass's."""

import pytest
import torch
from ase.build import bulk

from janus.ops import recompute
from matris.config import ModelConfig
from matris.model import MatRIS
from tests.matris.structures import TINY, batch_of, rattled
from tools.bench.products import count_flops

CONFIG = ModelConfig(**{**vars(TINY), "hidden_size": 32})


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

    one = count_flops(forward)
    assert 1.95 <= count_flops(forces) / one <= 2.0
    assert 5.8 <= count_flops(step) / one <= 6.05
    model.set_recompute("full")  # of blocks 1, 2, 3 and 6 forward passes, in place of 1, 1, 2 and 2
    assert 11.0 <= count_flops(step) / one <= 12.05


@pytest.mark.parametrize("num_layers", [2, 3])
def test_what_an_angle_keeps_until_the_second_backward_pass(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers per angle, in units of the width: what products make and take, and no result of anything cheaper.

    Of a block in the forward pass: both attentions' and refinements' inputs (2), logits (2), inner layers (4), core and
    gate (4), the hidden layer of the feed-forward net (1). In the force pass: what arrives at the hidden layers from
    behind (5), at the messages (2), and at the block's angles (2). The last block has no feed-forward net.
    """
    config = ModelConfig(**{**vars(CONFIG), "num_layers": num_layers})
    model, batch = MatRIS(config, seed=0), batch_of(rattled(bulk("Cu", cubic=True)), config=config)
    kept: dict[int, torch.Tensor] = {}
    pack = recompute._Recomputation.pack

    def watched(self: recompute._Recomputation, saved: torch.Tensor) -> object:
        packed = pack(self, saved)
        of_angles = saved.ndim == 2 and len(saved) == batch.num_angles and saved.shape[1] >= config.hidden_size
        if isinstance(packed, recompute._Kept) and of_angles:
            kept[saved.untyped_storage()._cdata] = saved
        return packed

    monkeypatch.setattr(recompute._Recomputation, "pack", watched)

    def units() -> int:
        found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return found // (batch.num_angles * config.hidden_size * 4)

    model.recompute_bytes = 0
    with torch.enable_grad():
        prediction = model(batch, create_graph=True)
    assert units() == (13 + 9) * num_layers - 4 + 2  # and the angles' embedding
    assert prediction.forces.requires_grad
