"""Chemical symbols by atomic number, without importing ASE."""

SYMBOLS: tuple[str, ...] = tuple(
    """X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb
    Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg
    Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts
    Og""".split()
)
"""`SYMBOLS[Z]` for Z = 1..118; `SYMBOLS[0]` is ASE's dummy "X"."""

MAX_Z = len(SYMBOLS) - 1
"""Largest atomic number (118, Og); a model may know fewer (`ModelConfig.num_elements`)."""

_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS) if number}


def number_of(symbol: str) -> int:
    """Atomic number of a chemical symbol.

    Raises:
        ValueError: the symbol is not one of H..Og.
    """
    if symbol not in _NUMBERS:
        raise ValueError(f"unknown element {symbol!r}: allowed are the symbols H to Og (Z = 1 to {MAX_Z})")
    return _NUMBERS[symbol]
