"""Pseudo-random orders of any number of records, of which any part is computed when it is needed, without a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WHOLE = 1 << 16  # records of which numpy's order is taken, and held
_ROUNDS = 6  # an even number, after which the parts of a value have changed places and are back


def shuffled(places: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """Records at some places of a random order of 0..count-1, (n,) int64.

    Up to `WHOLE` records the order is that of numpy's generator. Of more it is a Feistel network over the smallest
    power of two that holds them (Luby and Rackoff 1988), walked until it comes back below `count` (Black and Rogaway
    2002); as Mitchell et al. (arXiv 2106.06161) shuffle on GPUs.

    Args:
        places: (n,) int64, each in 0..count-1.
        count: number of records.
        seed: whole numbers, at least 0; another order for each.
    """
    if count <= WHOLE:
        return _numpy_order(count, tuple(seed))[places]
    bits = (count - 1).bit_length()
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    found = _network(places.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(found >= count)
    while len(outside):
        found[outside] = _network(found[outside], bits, keys)
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


@lru_cache(maxsize=64)  # of all groups, in two passes each; half a megabyte at most
def _numpy_order(count: int, seed: tuple[int, ...]) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(count)
    order.flags.writeable = False
    return order


def _network(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of 0..2^bits-1: in each round one part of the bits is changed by a function of the other."""
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    first, second = values >> low, values & ((one << low) - one)
    width, other = high, low  # of the two
    for key in keys:
        first, second = second, first ^ (_mixed(second + key) & ((one << width) - one))
        width, other = other, width
    return (first << low) | second


def _mixed(values: np.ndarray) -> np.ndarray:
    """Bits that depend on all bits of the values: the last steps of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
