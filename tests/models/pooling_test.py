"""Pooling and contrast normalisation against plain loops over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax.models.pooling import l2_pool, normalize_contrast


def activations(rows=6, cols=8, batch=2, maps=3):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, cols, batch, maps)).astype(np.float32)


def textbook_pool(x, size, stride):
    before = (size - stride) // 2
    after = size - stride - before
    padded = np.pad(x, ((before, after), (before, after), (0, 0), (0, 0)))
    rows, cols = x.shape[0] // stride, x.shape[1] // stride
    y = np.empty((rows, cols, *x.shape[2:]))
    for r in range(rows):
        for q in range(cols):
            i, j = r * stride, q * stride
            seen = padded[i : i + size, j : j + size]
            y[r, q] = np.sqrt(1e-6 + np.mean(seen**2, axis=(0, 1)))
    return y


def textbook_normalize(x, window):
    reach = window // 2
    offsets = np.arange(-reach, reach + 1)
    g = np.exp(-0.5 * (offsets / (window / 4)) ** 2)
    g = np.outer(g, g) / np.sum(np.outer(g, g))

    def local(values):
        around = ((reach, reach), (reach, reach), (0, 0), (0, 0))
        padded = np.pad(values, around)
        y = np.empty((*values.shape[:3], 1))
        for r in range(values.shape[0]):
            for q in range(values.shape[1]):
                seen = padded[r : r + window, q : q + window]
                y[r, q, :, 0] = np.einsum("ij,ijbc->b", g, seen) / values.shape[3]
        return y

    v = x - local(x)
    return v / np.maximum(0.01, np.sqrt(local(v**2)))


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 1), (4, 2), (5, 2), (1, 1)])
def test_pools(size, stride):
    x = activations()
    y = l2_pool(jnp.array(x), size=size, stride=stride)
    np.testing.assert_allclose(y, textbook_pool(x, size, stride), rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_contrast(window):
    x = activations()
    y = normalize_contrast(jnp.array(x), window=window)
    np.testing.assert_allclose(y, textbook_normalize(x, window), rtol=1e-4, atol=1e-5)


def test_contrast_does_not_depend_on_brightness_and_scale():
    x = jnp.array(activations(16, 16))
    y = normalize_contrast(x, window=3)
    other = normalize_contrast(5 + 3 * x, window=3)
    # Away from the border, where neither sees the zeros beyond it.
    np.testing.assert_allclose(y[2:-2, 2:-2], other[2:-2, 2:-2], rtol=1e-3, atol=1e-4)
    assert 0.8 < float(jnp.std(y)) < 1.25


def test_gradients_are_finite_where_all_is_zero():
    def total(x):
        return jnp.sum(normalize_contrast(l2_pool(x, size=2, stride=2), window=3))

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.zeros((4, 4, 1, 2)))).all()


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        (l2_pool, {"size": 2, "stride": 3}, "size=2, stride=3"),
        (l2_pool, {"size": 4, "stride": 4}, "must divide the 6 rows and 8 columns"),
        (normalize_contrast, {"window": 4}, "window=4: allowed are odd"),
    ],
)
def test_errors_say_what_does_not_fit(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.array(activations()), **kwargs)
