"""MatRIS as an ASE calculator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from matris.blocks.embedding import check_charge_and_spin
from matris.config import Precision
from matris.data.labels import read_charge_and_spin
from matris.elements import number_of
from matris.exported import load_model, read_config
from matris.graph.batch import collate_graphs
from matris.graph.build import build_graph
from matris.graph.structure import Structure
from matris.model import MatRIS

PRECISIONS = {"float32": Precision.fp32, "float64": Precision.fp64}


class MatRISCalculator(Calculator):
    """Energies, forces, stress and magnetic moments of an `ase.Atoms`, which is never edited.

    One evaluation gives every property; ASE keeps it until positions, numbers, cell or pbc change. The calculator can
    be pickled (its model travels with it) and gives the same numbers afterwards. Of a model with experts, read from a
    directory, only those are held that serve the elements seen so far; those of others are read when they come.

    Results: `energy` and `free_energy` (eV, equal: there are no electrons to smear), `energies` (N,) eV per atom,
    `forces` (N, 3) eV/A, `stress` (6,) eV/A^3 in the order xx yy zz yz xz xy, positive when tensile, and `magmoms` (N,)
    Bohr magnetons, if the model was trained on them. The stress of a slab or a wire is per volume of its
    cell, vacuum included, as electronic-structure codes give it. Without a periodic direction, or without a volume,
    there is none: asking for it raises ASE's `PropertyNotImplementedError`.

    Args:
        model: directory of a saved model, or a model; of a model a copy is taken, so later training does not matter.
        device: `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32`, or `float64` for vibrations, tight relaxations and other differences of small numbers.
        task: level of theory to predict; needed for models that know several.
        charge: total charge of every structure, e; None takes `atoms.info["charge"]`, if it is there.
        spin: spin multiplicity 2S + 1 of every structure; None takes `atoms.info["spin"]`, if it is there.

    Raises:
        ValueError: missing or damaged model, unknown dtype or task, a device that is not there; at evaluation: NaN
            positions, elements that the model was not trained on, a periodic direction without a volume, a charge or
            spin that is missing for a task that needs it, or that the model does not know.
    """

    implemented_properties: list[str]
    ignored_changes: ClassVar[set[str]] = {"initial_charges", "initial_magmoms"}

    def __init__(
        self,
        model: str | Path | MatRIS,
        device: str = "cpu",
        dtype: str = "float32",
        task: str | None = None,
        charge: float | None = None,
        spin: float | None = None,
    ) -> None:
        super().__init__()
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype is {dtype!r}: allowed are {', '.join(PRECISIONS)}")
        self.device = _find_device(device)
        self._source: Path | None = None  # of a model of which experts are read when they are needed
        self._loaded: set[int] = set()  # elements whose experts are here
        precision = PRECISIONS[dtype]
        if isinstance(model, MatRIS):
            self.model = MatRIS(model.hyper, precision=precision)
            self.model.load_state_dict(model.state_dict())
            self.model.predicts_magmoms = model.predicts_magmoms
            self.model.elements, self.model.elements_of_task = model.elements, dict(model.elements_of_task)
        else:
            # Of experts no more than some element needs: `_load_experts` reads the others when a structure has theirs.
            first = number_of(read_config(Path(model))["elements"][0])
            self.model = load_model(Path(model), precision=precision, elements=[first])
            if self.model.hyper.num_moe_experts:
                self._source, self._loaded = Path(model).resolve(), {first}
        self.model.to(self.device).eval()
        self.task, self.task_number = task, self.model.task_number(task)
        self.charge, self.spin = charge, spin
        if task is None and (charge is not None or spin is not None):
            raise ValueError(
                f"charge is {charge} and spin is {spin}: a model without tasks takes neither; leave them out"
            )
        if charge is not None and math.isnan(charge):
            raise ValueError("charge is nan: give a whole number of e, or leave it out")
        if spin == 0:
            raise ValueError("spin is 0: give a multiplicity, 1 for a singlet, 2 for a doublet, ..., or leave it out")
        check_charge_and_spin(0.0 if charge is None else charge, 0.0 if spin is None else spin)
        self.implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]
        if self.model.predicts_magmoms:
            self.implemented_properties.append("magmoms")

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluate every property at once (the arguments are ASE's)."""
        super().calculate(atoms, properties, system_changes)
        structure = Structure.from_atoms(self.atoms)
        self.model.check_elements(structure.numbers, self.task)
        self._load_experts(structure.numbers)
        charge, spin = self._charge_and_spin()
        has_stress = bool(structure.pbc.any()) and np.linalg.det(structure.cell) != 0.0
        if "stress" in properties and not has_stress:
            raise PropertyNotImplementedError(
                f"stress of a structure with pbc {structure.pbc.tolist()} and cell {structure.cell.tolist()}: it is a "
                "derivative per volume, so the structure must be periodic in a direction, and the cell have a volume"
            )
        hyper = self.model.hyper
        graph = build_graph(structure, pairwise_cutoff=hyper.pairwise_cutoff, three_body_cutoff=hyper.three_body_cutoff)
        batch = collate_graphs([graph], tasks=[self.task_number], charges=[charge], spins=[spin]).to(self.device)
        prediction = self.model(batch, stress=has_stress)
        reference = self.model.reference_of_atoms(batch)
        energy = prediction.energy.item()
        results: dict[str, Any] = {
            "energy": energy,
            "free_energy": energy,
            "energies": (prediction.energies + reference).detach().cpu().numpy(),
            "forces": prediction.forces.cpu().numpy(),
        }
        if prediction.magmoms is not None:
            results["magmoms"] = prediction.magmoms.cpu().numpy()
        if has_stress:
            results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].cpu().numpy())
        self.results = results

    def _load_experts(self, numbers: np.ndarray) -> None:
        """Reads the model anew with the experts of these elements too, if any are missing."""
        wanted = self._loaded.union(numbers.tolist())
        if self._source is not None and wanted != self._loaded:
            self.model = load_model(self._source, precision=self.model.precision, elements=sorted(wanted))
            self.model.to(self.device).eval()
            self._loaded = wanted

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last evaluation: ASE's list, and `info` for another charge or spin."""
        changes = super().check_state(atoms, tol)
        if self.task is not None and self.atoms is not None:
            before, now = read_charge_and_spin(self.atoms), read_charge_and_spin(atoms)
            if not np.array_equal(before, now, equal_nan=True):
                changes = [*changes, "info"]
        return changes

    def _charge_and_spin(self) -> tuple[float, float]:
        """Of the structure at hand: NaN and 0 where nothing is stated.

        Raises:
            ValueError: what the task needs is not stated, or such that the model does not know it.
        """
        if self.task is None:
            return math.nan, 0.0
        found = read_charge_and_spin(self.atoms)
        charge = found[0] if self.charge is None else float(self.charge)
        spin = found[1] if self.spin is None else float(self.spin)
        missing = {"charge": math.isnan(charge), "spin": spin == 0}
        for name in self.model.hyper.needs(self.task):
            if missing[name]:
                raise ValueError(
                    f"task {self.task} needs the {name} of a structure: give MatRISCalculator(..., {name}=...), "
                    f"--{name} on the command line, or set atoms.info[{name!r}]"
                )
        check_charge_and_spin(charge, spin)
        return charge, spin


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: allowed are cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device is {name!r}: torch finds {torch.cuda.device_count()} CUDA devices; use device='cpu'")
    return device
