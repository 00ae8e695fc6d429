"""Locally connected layers against jax's own, which is slow; what sees what; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax.models.locally_connected import (
    Geometry,
    arrange,
    locally_connected,
    named_padding,
)

PLAIN_CODE = True


def textbook(x, weights, bias, stride, padding):
    """The layer with weights by position: gathers all patches, as flax does."""
    rows, cols, k, _, channels, maps = weights.shape
    kernel = weights.transpose(0, 1, 4, 2, 3, 5)
    y = jax.lax.conv_general_dilated_local(
        x.transpose(2, 0, 1, 3),
        kernel.reshape(rows, cols, k * k * channels, maps),
        (stride, stride),
        padding,
        (k, k),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.transpose(1, 2, 0, 3) + bias[:, :, None]


def example(below, patch, stride, channels, maps, batch, padding, dtype=np.float32):
    if isinstance(padding, str):
        padding = named_padding(padding, patch, stride)
    rows, cols = Geometry(below, patch, stride, padding).positions
    rng = np.random.default_rng(0)
    shapes = (
        (*below, batch, channels),
        (rows, cols, patch, patch, channels, maps),
        (rows, cols, maps),
        (rows, cols, batch, maps),
    )
    return padding, *(jnp.array(rng.standard_normal(s), dtype) for s in shapes)


@pytest.mark.parametrize(
    ("below", "patch", "stride", "channels", "maps", "batch", "padding"),
    [
        ((12, 11), 4, 1, 3, 5, 4, "VALID"),
        ((12, 11), 4, 1, 3, 5, 4, "SAME"),
        ((13, 12), 10, 1, 2, 3, 2, ((2, 3), (3, 2))),
        ((12, 13), 4, 2, 1, 8, 2, ((1, 0), (2, 3))),
        ((12, 14), 6, 3, 2, 2, 40, ((0, 3), (1, 2))),  # a large batch
        ((12, 12), 4, 4, 3, 5, 2, "SAME"),  # patches that touch
        ((5, 5), 4, 1, 1, 1, 1, "VALID"),  # fewer positions than a patch is wide
        ((4, 4), 4, 1, 1, 1, 1, ((2, 2), (3, 3))),  # more positions than columns
    ],
)
def test_values_and_gradients_are_those_of_the_textbook(
    below, patch, stride, channels, maps, batch, padding
):
    zeros, x, weights, bias, target = example(
        below, patch, stride, channels, maps, batch, padding
    )

    def ours(x, weights, bias):
        kernel = arrange(weights, stride=stride, left=zeros[1][0])
        y = locally_connected(x, kernel, bias, stride=stride, padding=padding)
        return jnp.vdot(y, target), y

    def theirs(x, weights, bias):
        y = textbook(x, weights, bias, stride, zeros)
        return jnp.vdot(y, target), y

    (_, y), gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(
        x, weights, bias
    )
    (_, expected), expected_gradients = jax.jit(
        jax.value_and_grad(theirs, (0, 1, 2), has_aux=True)
    )(x, weights, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_so_and_is_near():
    dtype = jnp.bfloat16
    zeros, x, weights, bias, _ = example((9, 9), 4, 1, 3, 5, 2, "SAME")
    expected = textbook(x, weights, bias, 1, zeros)
    x, weights, bias = (a.astype(dtype) for a in (x, weights, bias))
    kernel = arrange(weights, stride=1, left=zeros[1][0])

    @jax.jit
    def layer(x, kernel, bias):
        y, pull = jax.vjp(locally_connected, x, kernel, bias)
        return y, *pull(y)

    y, *gradients = layer(x, kernel, bias)
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0.1, atol=0.3)


def test_a_row_of_weights_acts_on_its_row_of_positions_only():
    _, x, weights, _, _ = example((9, 9), 4, 1, 3, 5, 2, "SAME")
    kernel = arrange(weights, stride=1, left=1)
    change = locally_connected(x, kernel.at[3].add(1.0)) - locally_connected(x, kernel)
    changed = np.abs(change).max(axis=(1, 2, 3)) > 0
    assert changed.tolist() == [i == 3 for i in range(9)]


def test_a_number_below_acts_on_the_positions_whose_patch_holds_it():
    _, x, weights, _, _ = example((12, 12), 4, 2, 1, 1, 1, "VALID")
    kernel = arrange(weights, stride=2, left=0)

    def layer(x):
        return locally_connected(x, kernel, stride=2, padding="VALID")

    change = np.abs(layer(x.at[5, 8].add(1.0)) - layer(x))[:, :, 0, 0] > 0
    assert np.argwhere(change).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]


def test_the_weights_are_not_copied():
    # Memory that the gradient needs besides its results, with 10x28 numbers a column.
    geometry = Geometry((20, 20), 10, 1, named_padding("SAME", 10, 1))
    kernel = jax.ShapeDtypeStruct(geometry.kernel_shape(28, 28), jnp.float32)
    x = jax.ShapeDtypeStruct((20, 20, 4, 28), jnp.float32)

    def loss(kernel, x):
        return jnp.sum(locally_connected(x, kernel) ** 2)

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, x).compile()
    temporary = memory.memory_analysis().temp_size_in_bytes
    assert temporary < 0.1 * 4 * kernel.size


@pytest.mark.parametrize(
    ("shapes", "kwargs", "message"),
    [
        (((3, 9, 1, 2), (9, 9, 8, 4, 5)), {}, "3x9 is smaller than the patch, 4x4"),
        (((9, 9, 2), (9, 9, 8, 4, 5)), {}, r"inputs must be \[H, W, B, C\]"),
        (
            ((9, 9, 1, 3), (9, 9, 8, 4, 5)),
            {},
            r"shape \(9, 9, 12, 4, 5\), got \(9, 9, 8",
        ),
        (
            ((9, 9, 1, 2), (9, 9, 8, 4, 5)),
            {"padding": "VALID"},
            r"shape \(6, 6, 8, 4, 5",
        ),
        (((9, 9, 1, 2), (9, 9, 8, 4, 5)), {"padding": "FULL"}, "'FULL': allowed are"),
        (((9, 9, 1, 2), (9, 9, 8, 4, 5)), {"stride": 0}, "stride=0: allowed"),
        (
            ((9, 9, 1, 2), (9, 9, 8, 4, 5)),
            {"padding": ((4, 0), (0, 0))},
            "from 0 to 3, less than the patch",
        ),
    ],
)
def test_errors_say_what_does_not_fit(shapes, kwargs, message):
    inputs, kernel = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        locally_connected(inputs, kernel, **kwargs)


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"bias must have shape \(9, 9, 5\), got \(5,"):
        locally_connected(
            jnp.zeros((9, 9, 1, 2)), jnp.zeros((9, 9, 8, 4, 5)), jnp.zeros(5)
        )
