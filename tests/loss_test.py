"""What is made of a user's loss, and what is said of one that will not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import loss as loss_lib
from dbjax.loss import all_finite, check_loss, make_gradient, make_loss

PARAMS = {"w": jnp.array([1.0, 2.0])}
BATCH = {"x": np.array([[1.0, 0.0], [3.0, 1.0]], np.float32)}


def square(params, batch):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def test_a_loss_is_a_scalar_whatever_it_returns_beside_it():
    plain = make_loss(square)(PARAMS, BATCH, 3)
    aux = make_loss(lambda p, b: (square(p, b), {"n": 2}), has_aux=True)
    assert plain == aux(PARAMS, BATCH, 3) == 13.0
    np.testing.assert_array_equal(
        make_gradient(square)(PARAMS, BATCH, 0, 0)["w"], [16.0, 5.0]
    )


def test_a_key_is_a_pure_function_of_seed_and_names():
    def draw(params, batch, key):
        return jax.random.uniform(key)

    loss = make_loss(draw, rng=True, seed=1)
    values = {
        float(loss(PARAMS, BATCH, *names))
        for names in [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(values) == 5
    assert loss(PARAMS, BATCH, 4, 2) == make_loss(draw, rng=True, seed=1)(
        PARAMS, BATCH, 4, 2
    )
    other = make_loss(draw, rng=True, seed=2)
    assert other(PARAMS, BATCH, 4, 2) != loss(PARAMS, BATCH, 4, 2)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 4), 2)
    assert loss(PARAMS, BATCH, 4, 2) == jax.random.uniform(key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_stands(shape, dtype, bad):
    """And numbers as large as there are, all of one sign, are finite."""
    tree = {"a": jnp.ones(3), "b": jnp.full(shape, jnp.finfo(dtype).max, dtype)}
    assert all_finite(tree)
    places = np.ndindex(shape) if shape else [()]
    for place in places:
        assert not all_finite(tree | {"b": tree["b"].at[place].set(bad)})


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        (lambda p, b: p["w"], {}, r"shape \(2,\)"),
        (lambda p, b: jnp.int32(3), {}, "int32"),
        (lambda p, b: (square(p, b), 1), {}, "tuple.*has_aux=True if"),
        (square, {"has_aux": True}, "must return .loss, aux."),
        (lambda p, b: (square(p, b), 1, 2), {"has_aux": True}, "must return .loss, aux."),
        (lambda p, b: ("a", 1), {"has_aux": True}, "must return a scalar|not a valid JAX"),
        (lambda p, b: square(p, b) * jnp.nan, {}, "gives nan"),
        (lambda p, b: square(p, b) + jnp.inf, {}, "gives inf"),
    ],
)  # fmt: skip
def test_a_loss_that_will_not_do_is_an_error(loss, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        check_loss(loss, PARAMS, BATCH, **options)


def test_where_finite_does_not_matter_nothing_is_computed():
    calls = []

    def loss(params, batch):
        calls.append(params["w"])
        return square(params, batch) * jnp.nan

    check_loss(loss, PARAMS, BATCH, finite=False)
    assert all(isinstance(x, jax.core.Tracer) for x in calls) and len(calls) == 1


def test_batches_differ_in_structure_shapes_and_dtypes():
    same = loss_lib.shapes_of(BATCH)
    assert same == loss_lib.shapes_of({"x": np.ones((2, 2), np.float32)})
    for other in (
        {"x": np.ones((3, 2), np.float32)},
        {"x": np.ones((2, 2), np.float64)},
        {"z": np.ones((2, 2), np.float32)},
    ):
        assert loss_lib.shapes_of(other) != same
