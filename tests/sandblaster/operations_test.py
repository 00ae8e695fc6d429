"""Coefficient-wise operations: what OWL-QN and bounds promise, number by number."""

import numpy as np
import pytest

from dbjax.sandblaster import operations

X = np.array([2.0, -3.0, 0.0, 0.0, 0.0, 0.0], np.float32)
G = np.array([1.0, 1.0, 3.0, -3.0, 0.5, -0.5], np.float32)


def test_pseudo_gradient_by_hand():
    got = operations.pseudo_gradient(X, G, np.float32(1.0))
    np.testing.assert_array_equal(got, [2.0, 0.0, 2.0, -2.0, 0.0, 0.0])


@pytest.mark.parametrize("seed", range(3))
def test_pseudo_gradient_is_the_steepest_one_sided_slope(seed):
    """Descent along its negative has the slope `-|pseudo|^2`, to first order."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(50) < 0.5, 0.0, rng.standard_normal(50))
    g, weight, h = rng.standard_normal(50), 0.7, 1e-7
    pseudo = np.asarray(operations.pseudo_gradient(x, g, weight), float)
    step = x - h * pseudo
    change = g * (step - x) + weight * (np.abs(step) - np.abs(x))
    np.testing.assert_allclose(change / h, -(pseudo**2), atol=1e-5)
    rest = pseudo == 0  # there, neither side descends
    assert np.all(np.abs(g[rest]) <= weight) and np.all(x[rest] == 0)


def test_orthant_align_and_projection_by_hand():
    pseudo = np.array([2.0, 0.0, 2.0, -2.0, 0.0, 0.0], np.float32)
    signs = operations.orthant(X, pseudo)
    np.testing.assert_array_equal(signs, [1, -1, -1, 1, 0, 0])
    direction = np.array([-1.0, 1.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    one, none = np.ones(6, np.float32), np.zeros(6, np.float32)
    np.testing.assert_array_equal(
        operations.align(direction, pseudo, one), [-1, 0, 0, 1, 0, 0]
    )
    np.testing.assert_array_equal(operations.align(direction, pseudo, none), direction)
    trial = np.array([-0.1, -1.0, -2.0, 2.0, 1.0, 0.0], np.float32)
    np.testing.assert_array_equal(
        operations.project_orthant(trial, signs, one), [0, -1, -2, 2, 0, 0]
    )
    np.testing.assert_array_equal(operations.project_orthant(trial, signs, none), trial)


def test_a_bound_holds_the_gradient_only_where_descent_would_cross_it():
    x = np.array([0.0, 0.0, 1.0, 1.0, 0.5], np.float32)
    g = np.array([1.0, -1.0, 1.0, -1.0, 1.0], np.float32)
    low, high = np.zeros(5, np.float32), np.ones(5, np.float32)
    got = operations.free_gradient(x, g, low, high)
    np.testing.assert_array_equal(got, [0, -1, 1, 0, 1])


def test_zero_forgets_even_what_is_not_finite():
    zero = operations.OPERATIONS["zero"].function(
        np.array([np.nan, np.inf], np.float32)
    )
    np.testing.assert_array_equal(zero, [0, 0])
