"""Orders that are computed, place by place."""

import numpy as np
import pytest

from janus.data.shuffle import WHOLE, shuffled


@pytest.mark.parametrize("count", [1, 2, 7, WHOLE, WHOLE + 1, 2 * WHOLE - 1, 2 * WHOLE, 2 * WHOLE + 1, 5 * WHOLE + 77])
def test_every_record_has_one_place(count):
    order = shuffled(np.arange(count), count, (3, 1))
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    some = np.random.default_rng(0).integers(0, count, 50)
    np.testing.assert_array_equal(shuffled(some, count, (3, 1)), order[some])
    if count > 7:
        assert (shuffled(some, count, (3, 2)) != order[some]).mean() > 0.9
        assert (shuffled(some, count, (4, 1)) != order[some]).mean() > 0.9


def test_few_records_have_the_order_of_numpy():
    np.testing.assert_array_equal(shuffled(np.arange(50), 50, (3, 1)), np.random.default_rng([3, 1]).permutation(50))


def test_computed_orders_are_as_even_as_numpys():
    """Chi-square of what a random order has evenly: pairs of place and record, and the way from one to the next."""
    count, bins = 3 * WHOLE + 5, 40
    places = np.arange(count)

    def chi_square(order: np.ndarray) -> tuple[float, float]:
        pairs = np.bincount(places * bins // count * bins + order * bins // count, minlength=bins**2)
        steps = np.bincount(np.diff(order) % count * bins // count, minlength=bins)
        return tuple(
            float(((found - found.mean()) ** 2 / found.mean()).sum() / (len(found) - 1)) for found in (pairs, steps)
        )

    computed = np.array([chi_square(shuffled(places, count, (seed, 0))) for seed in range(8)])
    assert (abs(computed[:, 0] - 1.0) < 6.0 * (2.0 / bins**2) ** 0.5).all(), computed
    assert (abs(computed[:, 1] - 1.0) < 6.0 * (2.0 / bins) ** 0.5).all(), computed
    assert min(chi_square(places)) > 100.0
