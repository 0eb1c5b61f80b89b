"""Units: eV, Angstrom, eV/Angstrom, eV/Angstrom^3, Bohr magneton; the conversions below are the only ones."""

GPA = 1.0 / 160.21766208
"""eV/A^3 per GPa (CODATA value that the released MatRIS models were trained with)."""

KBAR = 0.1 * GPA
"""eV/A^3 per kbar. VASP prints stress in kbar with the opposite sign (compression positive)."""

MILLI = 1000.0
"""meV per eV."""
