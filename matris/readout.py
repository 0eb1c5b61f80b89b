"""From atom features to energies and magnetic moments."""

from __future__ import annotations

from torch import Tensor

from matris.blocks.module import MLP, MatRISConfig, MegatronModule, Norm


class Readout(MegatronModule):
    """E_i = MLP(norm(h_i)) (before the energy scale) and |MLP(norm(h_i))|, the magnetic moment in Bohr magnetons."""

    def __init__(self, config: MatRISConfig) -> None:
        super().__init__(config)
        width = config.model.hidden_size
        self.norm = Norm(config, config.model.norm_type, width)
        self.energy = MLP(config, (width, *config.model.readout_hidden_sizes, 1), bias=True)
        self.magmom = MLP(config, (width, 2 * width, 1), bias=True)

    def forward(self, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width) to energies (N,) and magnetic moments (N,)."""
        atoms = self.norm(atoms)
        return self.energy(atoms).squeeze(1), self.magmom(atoms).squeeze(1).abs()
