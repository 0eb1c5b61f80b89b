"""Where the labels of an `ase.Atoms` are found, in which unit, and what makes one invalid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from matris.graph.structure import Labels
from matris.units import GPA, KBAR

if TYPE_CHECKING:
    from ase import Atoms


class StressUnit(str, Enum):
    """Unit and sign of the stress in a file. Virials are always in eV, with virial = -volume * stress."""

    ev_per_a3 = "eV/A^3"
    gpa = "GPa"
    kbar_vasp = "kbar-vasp"  # as VASP prints it: compression positive

    @property
    def factor(self) -> float:
        """Multiply by this to get eV/A^3, positive when tensile."""
        return {StressUnit.ev_per_a3: 1.0, StressUnit.gpa: GPA, StressUnit.kbar_vasp: -KBAR}[self]


@dataclass(frozen=True, kw_only=True)
class LabelKeys:
    """Names of the labels in the files. A name given is the only one looked for; None searches `SEARCH_ORDER`.

    Attributes:
        energy: total energy, eV.
        forces: (N, 3) eV/A.
        stress: (3, 3), 9 or 6 values (xx yy zz yz xz xy) in `stress_unit`.
        virials: like stress, in eV; used where there is no stress.
        magmoms: (N,) Bohr magnetons.
        stress_unit: of every stress that is read; virials are in eV always.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virials: str | None = None
    magmoms: str | None = None
    stress_unit: StressUnit = StressUnit.ev_per_a3


# Own names first, then plain names, then what ASE >= 3.23 moves from info and arrays to the calculator on reading.
SEARCH_ORDER = {
    "energy": ("REF_energy", "energy", "calc.energy"),
    "forces": ("REF_forces", "forces", "calc.forces"),
    "stress": ("REF_stress", "REF_virials", "REF_virial", "stress", "virials", "virial", "calc.stress"),
    "magmoms": ("REF_magmoms", "magmoms", "calc.magmoms"),
}
CHARGE_KEYS = ("charge", "total_charge")
SPIN_KEYS = ("spin", "spin_multiplicity", "multiplicity")


@dataclass(frozen=True, kw_only=True)
class FoundLabels:
    """Labels of one frame, and for each one found the key it came from (or why it was put aside)."""

    labels: Labels
    sources: dict[str, str]


def read_labels(atoms: Atoms, keys: LabelKeys) -> FoundLabels:
    """Labels of one frame in eV, Angstrom and eV/A^3; what is missing is None.

    Forces are as stored: constraints of the file are not applied to them.

    Raises:
        ValueError: a label of the wrong shape, not finite, or a stress that is not symmetric; names key and value.
    """
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for label in SEARCH_ORDER:
        for key, source, value in _candidates(atoms, label, keys):
            is_virial = key == keys.virials or ("virial" in key.lower() and key != keys.stress)
            try:
                if label != "stress":
                    shape = {"energy": (), "forces": (len(atoms), 3), "magmoms": (len(atoms),)}[label]
                    found[label] = _numbers(value, shape)
                elif (volume := abs(np.linalg.det(atoms.cell.array))) == 0.0:
                    # Programs write zeros there; a structure without volume has no stress to learn.
                    source = f"{source}, put aside: no volume"
                elif is_virial:
                    found[label] = -_tensor(value) / volume
                else:
                    found[label] = _tensor(value) * keys.stress_unit.factor
            except ValueError as error:
                raise ValueError(f"{label} in {source} {error}") from None
            sources[label] = source
            break
    if "energy" in found:
        found["energy"] = float(found["energy"])
    return FoundLabels(labels=Labels(**found), sources=sources)


def read_charge_and_spin(atoms: Atoms) -> tuple[float, float]:
    """Total charge (e, NaN where not given) and spin multiplicity (0 where not given).

    Raises:
        ValueError: not one finite number.
    """
    values = []
    for names, missing in ((CHARGE_KEYS, math.nan), (SPIN_KEYS, 0.0)):
        name = next((name for name in names if atoms.info.get(name) is not None), None)
        try:
            values.append(missing if name is None else float(_numbers(atoms.info[name], ())))
        except ValueError as error:
            raise ValueError(f"info[{name!r}] {error}") from None
    return values[0], values[1]


def present_keys(atoms: Atoms) -> set[str]:
    """All names under which this frame has anything, for messages."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {*atoms.info, *(set(atoms.arrays) - {"numbers", "positions"}), *results}


def _candidates(atoms: Atoms, label: str, keys: LabelKeys) -> Iterator[tuple[str, str, Any]]:
    """(key, source, value) of every place that holds a label, best first."""
    results = atoms.calc.results if atoms.calc is not None else {}
    places = {"info": atoms.info, "arrays": atoms.arrays, "calc": results}
    explicit = [getattr(keys, label)] if label != "stress" else [keys.stress, keys.virials]
    if any(explicit):
        # ASE may have moved an explicit key too, so all places count.
        wanted = [(key, place) for key in explicit if key is not None for place in places]
    else:
        wanted = []
        for name in SEARCH_ORDER[label]:
            plain = name.removeprefix("calc.")
            wanted += [(plain, "calc")] if name != plain else [(plain, "info"), (plain, "arrays")]
    for key, place in wanted:
        value = places[place].get(key)
        if value is not None:
            yield key, f"{place}[{key!r}]", value


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"is {value!r}: not a number or an array of numbers") from None
    if array.size == 1 and shape == ():
        array = array.reshape(())
    if shape == array.shape[:1] and array.shape[1:] == (1,):
        array = array[:, 0]
    if array.shape != shape:
        raise ValueError(f"has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"is {array[where]}{f' at index {where}' if where else ''}: labels must be finite")
    return array


def _tensor(value: Any) -> np.ndarray:
    """(3, 3) symmetric, from (3, 3), 9 or Voigt 6 values."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"is {value!r}: not an array of numbers") from None
    if array.shape == (6,):
        array = array[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if array.shape not in ((9,), (3, 3)):
        raise ValueError(f"has shape {array.shape}: expected (3, 3), 9 or 6 values (xx yy zz yz xz xy)")
    array = _numbers(array.reshape(3, 3), (3, 3))
    difference = np.abs(array - array.T).max()
    if difference > 0.02 * np.abs(array).max():
        raise ValueError(f"is {array.tolist()}: not symmetric (differs by {difference:.3g} from its transpose)")
    return 0.5 * (array + array.T)
