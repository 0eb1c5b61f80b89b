import numpy as np
import pytest

from janus.data.cost import CostModel, fit_cost


def make_sizes(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    atoms = rng.integers(1, 200, count)
    return np.stack([atoms, atoms * rng.integers(10, 90, count), atoms * rng.integers(50, 2000, count)], axis=1)


@pytest.mark.parametrize("weights", [(3.0, 0.5, 0.02), (0.0, 0.5, 0.02), (0.0, 0.0, 0.1)])
def test_exact_times_are_fitted_exactly(weights):
    sizes = make_sizes(9)
    true = CostModel(constant=40.0, weights=weights)
    model, error = fit_cost(sizes, true.of_batches(sizes))
    assert error < 1e-9
    assert model.constant == pytest.approx(40.0)
    assert model.weights == pytest.approx(weights, abs=1e-9)


def test_no_coefficient_is_negative_and_the_error_is_that_of_the_fit():
    sizes = make_sizes(12)
    # Atoms make it faster, which no cost model believes.
    cost = 1000.0 + sizes @ (-3.0, 0.5, 0.02)
    model, error = fit_cost(sizes, cost)
    assert model.weights[0] == 0.0
    relative = model.of_batches(sizes) / cost - 1.0
    assert error == pytest.approx(np.sqrt(np.mean(relative**2)))
    assert error > 1e-3
    # No neighbour that is not negative either is better.
    for step in np.vstack([np.eye(4), -np.eye(4)]) * 1e-3:
        coefficients = np.array([model.constant, *model.weights]) * (1.0 + step)
        other = (coefficients[0] + sizes @ coefficients[1:]) / cost - 1.0
        assert np.sqrt(np.mean(other**2)) >= error * (1.0 - 1e-9)


def test_times_that_sizes_do_not_explain():
    sizes = make_sizes(6)
    found = fit_cost(np.zeros_like(sizes), np.ones(6))
    assert found is None


def test_records_without_cost_are_spread():
    model = CostModel(constant=1.0, weights=(0.0, 2.0))
    cost = model.of_records(np.array([[1, 0], [5, 10]]))
    assert cost[1] == 20.0
    assert 0.0 < cost[0] < 1e-3
    np.testing.assert_array_equal(model.of_batches(np.array([[1, 0], [5, 10]])), [1.0, 21.0])


@pytest.mark.parametrize(("constant", "weights"), [(-1.0, (1.0,)), (1.0, (0.0, 0.0)), (0.0, (float("nan"),))])
def test_refused_models(constant, weights):
    with pytest.raises(ValueError, match="one of the weights positive"):
        CostModel(constant=constant, weights=weights)
