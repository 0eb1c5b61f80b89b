"""Run by an interpreter that has the reference package: `FILE.pth.tar STRUCTURES.npz OUTPUT.npz`.

Energies (eV per atom), forces (eV/A) and stress (GPa) of each structure in fp64. Imports nothing of ours.
"""

import sys

import matris.graph.converter
import numpy as np
import torch
from ase import Atoms
from matris.model.model import MatRIS
from pymatgen.io.ase import AseAtomsAdaptor


def main(checkpoint: str, structures: str, output: str) -> None:
    torch.set_default_dtype(torch.float64)
    matris.graph.converter.datatype = torch.float64
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    MatRIS.from_dict(content)  # how the package loads a file; it rounds the frequencies of the bases
    model = MatRIS(**content["config"]).double()
    model.load_state_dict(content["state_dict"])
    if model.reference_energy is not None:
        model.reference_energy.float()  # its compositions are single precision
    given, results = np.load(structures), {}
    for name in sorted({key.split("/")[0] for key in given}):
        atoms = Atoms(
            numbers=given[f"{name}/numbers"], positions=given[f"{name}/positions"], cell=given[f"{name}/cell"], pbc=True
        )
        graph = model.graph_converter(AseAtomsAdaptor.get_structure(atoms))
        prediction = model([graph], task="efs")
        reference = prediction["ref_energy"]
        interaction = prediction["e"] - reference
        results[f"{name}/interaction_eV_per_atom"] = interaction.detach().numpy().reshape(-1)
        results[f"{name}/energy_eV_per_atom"] = prediction["e"].detach().numpy().reshape(-1)
        results[f"{name}/forces"] = prediction["f"][0].detach().numpy()
        results[f"{name}/stress_GPa"] = prediction["s"][0].detach().numpy()
    np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
