import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax.optim import adagrad, scale_by_adagrad
from tests import textbook


def run(rule, params, gradients, step=jax.jit):
    """The plain optax loop: the parameters after every step, and the last state."""
    update = step(rule.update)
    state, seen = rule.init(params), []
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def normals(steps, shape, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


@pytest.mark.parametrize("step", [jax.jit, lambda f: f])
def test_equals_the_textbook(step):
    gradients = normals(30, (4, 3))
    gradients[:10, 0] = 0  # a coordinate that wakes up late
    start = np.ones((4, 3), np.float32)
    server = textbook.Adagrad(gamma=0.3)
    got, _ = run(adagrad(0.3), jnp.array(start), map(jnp.array, gradients), step)
    want = start.astype(np.float64)
    for now, g in zip(got, gradients, strict=True):
        want = server(want, g.astype(np.float64))
        np.testing.assert_allclose(now, want, rtol=2e-5, atol=2e-6)


def test_equals_optax_with_neither_accumulator_nor_epsilon():
    theirs = optax.chain(optax.scale_by_rss(0.0, 0.0), optax.scale(-0.1))
    gradients = [jnp.array(g) for g in normals(50, (7,))]
    got, _ = run(adagrad(0.1), jnp.zeros(7), gradients)
    want, _ = run(theirs, jnp.zeros(7), gradients)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-5)


WIDE = [-18, -7, -3, 0, 4, 18]
EXPONENTS = {"float16": WIDE[1:-1], "bfloat16": WIDE, "float32": WIDE}


@pytest.mark.parametrize("dtype", EXPONENTS)
def test_the_first_update_has_size_gamma(dtype):
    for exponent in EXPONENTS[dtype]:
        g = (jnp.array([3.0, -3.0]) * 10.0**exponent).astype(dtype)
        (got,), _ = run(adagrad(0.25), jnp.zeros(2, dtype), [g])
        np.testing.assert_allclose(got.astype("float32"), [-0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("g", [1e-30, 1e-20, 0.0])
def test_a_square_that_underflows_counts_as_zero(g):
    """The limit of the rule: no update until the sum of squares is representable."""
    (first, second), state = run(
        adagrad(1.0), jnp.zeros(1), [jnp.array([g]), jnp.array([2.0])]
    )
    assert first == 0
    np.testing.assert_allclose(second, -1.0, rtol=1e-6)


def test_a_square_that_overflows_stops_its_coordinate_alone():
    gradients = [jnp.array([1e20, 1.0]), jnp.array([1.0, 1.0])]
    got, _ = run(adagrad(1.0), jnp.zeros(2), gradients)
    np.testing.assert_allclose(got, [[0.0, -1.0], [0.0, -1.0 - 0.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rate_keeps_falling_in_16_bits(dtype):
    """K equal gradients: update K has size gamma / sqrt(K), for large K too."""
    rule, g = scale_by_adagrad(), jnp.full(1, 0.01, dtype)

    def body(state, _):
        updates, state = rule.update(g, state)
        return state, updates

    _, updates = jax.lax.scan(body, rule.init(g), length=10_000)
    assert updates.dtype == dtype
    np.testing.assert_allclose(updates[-1].astype("float32"), 0.01, rtol=5e-3)


def test_nan_is_not_hidden():
    got, _ = run(adagrad(1.0), jnp.zeros(1), [jnp.full(1, jnp.nan), jnp.ones(1)])
    assert jnp.isnan(jnp.stack(got)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_state_and_updates_keep_shape_and_dtype(dtype):
    params = {"w": jnp.ones((2, 3), dtype), "b": [jnp.ones((), dtype)]}
    rule = adagrad(0.1)
    state = rule.init(params)
    updates, after = jax.jit(rule.update)(params, state, params, value=1.0)
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert spec(after) == spec(state)
    assert spec(updates) == spec(params)
    donated = jax.jit(rule.update, donate_argnums=1)
    jax.block_until_ready(donated(params, rule.init(params)))


def test_is_elementwise_to_the_bit():
    """Any cut into shards gives the same bits."""
    gradients = normals(20, (103,))
    whole, _ = run(adagrad(0.1), jnp.zeros(103), map(jnp.array, gradients))
    for cuts in ([1], [50, 51], [3, 6, 11, 24, 48, 100]):
        edges = [0, *cuts, 103]
        parts = [
            run(adagrad(0.1), jnp.zeros(b - a), map(jnp.array, gradients[:, a:b]))[0]
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        np.testing.assert_array_equal(
            np.concatenate([part[-1] for part in parts]), whole[-1]
        )


def test_gamma_may_be_a_schedule_a_tracer_or_injected():
    gradients = [jnp.array([1.0]), jnp.array([1.0])]
    halving = adagrad(lambda count: 0.5**count)
    got, _ = run(halving, jnp.zeros(1), gradients)
    np.testing.assert_allclose(np.ravel(got), [-1, -1 - 0.5 * 0.5**0.5], rtol=1e-6)

    def last(gamma):
        return run(adagrad(gamma), jnp.zeros(1), gradients, step=lambda f: f)[0][-1]

    rates = jnp.array([0.1, 1.0])
    lanes = jax.jit(jax.vmap(last))(rates)
    np.testing.assert_allclose(lanes, jnp.stack([last(0.1), last(1.0)]), rtol=1e-6)

    injected = optax.inject_hyperparams(adagrad)(gamma=0.1)
    got, state = run(injected, jnp.zeros(1), gradients)
    np.testing.assert_allclose(got[-1], last(0.1), rtol=1e-6)
    assert state.hyperparams["gamma"] == jnp.float32(0.1)


@pytest.mark.parametrize("gamma", [0, -0.1, float("nan"), float("inf"), np.float32(0)])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match=f"gamma={gamma}.*positive"):
        adagrad(gamma)
