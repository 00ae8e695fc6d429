"""Which rules keep a NaN for good; a wrong yes would let one go unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.downpour.lasting import is_sound, not_finite_lasts

PARAMS = {"w": np.ones((5, 3), np.float32), "b": np.zeros(3, np.float32)}


def frozen_bias():
    return optax.masked(optax.sgd(0.1), {"w": True, "b": False})


def mostly():
    """Takes no notice of every second gradient."""
    return optax.GradientTransformation(
        lambda params: 0,
        lambda g, n, params=None: (jax.tree.map(lambda x: -x * (n % 2), g), n + 1),
    )


def compensated():
    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, state, params=None, *, stale_params, **extra: (
            jax.tree.map(
                lambda g, w, old: -0.1 * (g + w - old), g, params, stale_params
            ),
            state,
        ),
    )


@pytest.mark.parametrize(
    "rule",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        dbjax.adagrad(0.1),
        optax.adam(0.1),
        optax.adamw(0.1),
        optax.rmsprop(0.1),
        optax.sgd(lambda count: 0.1 / (1 + count)),
        mostly(),  # 0 * NaN is NaN
    ],
)
def test_stays(rule):
    assert not_finite_lasts(rule, PARAMS)


@pytest.mark.parametrize(
    "rule",
    [
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),  # infinity becomes 1
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.chain(optax.zero_nans(), optax.sgd(0.1)),
        optax.chain(frozen_bias(), optax.masked(optax.set_to_zero(), {"w": False, "b": True})),
        optax.set_to_zero(),
    ],
)  # fmt: skip
def test_goes_away(rule):
    assert not not_finite_lasts(rule, PARAMS)


def test_the_rule_gets_what_it_asks_for():
    assert not_finite_lasts(compensated(), PARAMS, ("stale_params",))


def test_narrow_parameters():
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    assert not_finite_lasts(dbjax.adagrad(0.1), narrow)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_only_floats_are_looked_at(value):
    tree = {"count": jnp.zeros((2, 2), jnp.int32), "w": jnp.full((2, 3), value)}
    assert bool(is_sound(tree, ())) == np.isfinite(value)
