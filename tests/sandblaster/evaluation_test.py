"""The batch by portions equals the batch as a whole, whoever computes what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbjax
from dbjax.sandblaster import vectors
from dbjax.sandblaster.evaluation import InProcess
from dbjax.server.layout import Layout
from tests.problems import EXAMPLES, PARAMS, X, Y, flat, loss_fn

WHOLE = {"x": X, "y": Y}
VALUE, GRADIENT = jax.value_and_grad(loss_fn)(PARAMS, WHOLE)


def make(portion_size, shards=1, **keywords):
    data = dbjax.from_arrays(WHOLE, batch_size=1, portion_size=portion_size)
    ours = vectors.on_shards(Layout.of(PARAMS, shards))
    ours.put("params", PARAMS)
    return ours, InProcess(loss_fn, data, ours, **keywords)


@pytest.mark.parametrize(
    ("portion_size", "shards", "replicas", "push_every"),
    [(EXAMPLES, 1, 1, 1), (7, 1, 1, 1), (7, 3, 4, 2), (1, 2, 5, 100), (5, 4, 30, 3)],
)
def test_equals_the_whole_batch(portion_size, shards, replicas, push_every):
    """Also where the last portion is short: portions count by their examples."""
    ours, batch = make(portion_size, shards, replicas=replicas, push_every=push_every)
    for _ in range(2):
        value = batch.evaluate("params", "gradient")
        np.testing.assert_allclose(value, VALUE, 1e-6)
        got = flat(ours.get("gradient"))
        np.testing.assert_allclose(got, flat(GRADIENT), 1e-4, 1e-6)
    assert batch.evaluations == 2


def test_the_value_does_not_depend_on_who_computes_what():
    values = {make(5, replicas=r)[1].evaluate("params", "g") for r in (1, 2, 7, 40)}
    assert len(values) == 1


def test_gradient_descent_in_five_lines():
    """The coordinator holds scalars only, and still gets down to the optimum."""
    ours, batch = make(10, shards=3, replicas=4)
    values = [batch.evaluate("params", "gradient")]
    for _ in range(150):
        ours.combine("params", {"params": 1.0, "gradient": -1.0})
        values.append(batch.evaluate("params", "gradient"))
    assert np.all(np.diff(values) <= 1e-6) and values[-1] < 1e-3 * values[0]
    assert ours.dots([("gradient", "gradient")])[0] < 1e-6


def test_a_loss_that_is_not_finite_is_said_and_leaves_no_trace():
    ours, batch = make(10, shards=2, replicas=2)
    ours.put("broken", jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS))
    assert np.isnan(batch.evaluate("broken", "gradient"))
    np.testing.assert_allclose(batch.evaluate("params", "gradient"), VALUE, 1e-6)
    assert np.isfinite(flat(ours.get("gradient"))).all()


def test_an_empty_batch_is_an_error():
    class Empty:
        num_portions = 0

    with pytest.raises(ValueError, match="must not be empty"):
        InProcess(loss_fn, Empty(), vectors.in_process())
