import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax.optim import StaleState, adagrad, delay_gradients, stale, stale_params
from dbjax.trace import DROPPED, PUSH, Trace
from tests import textbook


def curvature(params):
    """The gradient of a quadratic, another curvature for each leaf."""
    return {"a": params["a"] * 2.0, "b": params["b"] - 1.0}


START = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}


def run_stale(rule, steps, gradient=curvature, params=START):
    update, state, seen = jax.jit(rule.update), rule.init(params), [params]
    for _ in range(steps):
        g = gradient(stale_params(state, params))
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def run_delayed(rule, steps, gradient=curvature, params=START):
    update, state, seen = jax.jit(rule.update), rule.init(params), [params]
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_equals_textbook(got, old, rule, **keywords):
    for leaf, slope, shift in (("a", 2.0, 0.0), ("b", 1.0, 1.0)):
        want = textbook.delayed(
            lambda w, k=slope, s=shift: k * w - s,
            np.asarray(START[leaf], np.float64),
            old,
            rule(),
            **keywords,
        )
        np.testing.assert_allclose(
            [params[leaf] for params in got], want, rtol=1e-4, atol=1e-5
        )


RULES = {
    "sgd": (optax.sgd(0.1), lambda: textbook.sgd(0.1)),
    "adagrad": (adagrad(0.1), lambda: textbook.Adagrad(0.1)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("delay", [0, 1, 4])
def test_both_equal_the_textbook(rule, delay):
    ours, theirs = RULES[rule]
    delays = np.full(15, delay)
    got = run_stale(stale(ours, delay), 15)
    assert_equals_textbook(got, delays, theirs)
    got = run_delayed(delay_gradients(ours, delay), 15)
    assert_equals_textbook(got, delays, theirs, rest=True)


def test_delays_may_differ_per_step_and_the_last_one_holds():
    delays = [0, 9, 0, 3, 1, 2]
    got = run_stale(stale(optax.sgd(0.1), np.array(delays)), 10)
    assert_equals_textbook(got, [*delays, 2, 2, 2, 2], RULES["sgd"][1])


def test_a_trace_gives_its_delays():
    delays = [0, 1, 1, 0, 3, 2]
    by_array = run_stale(stale(adagrad(0.1), delays), 6)
    by_trace = run_stale(stale(adagrad(0.1), Trace.from_delays(delays)), 6)
    assert_equal(by_trace, by_array)


@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_no_delay_is_the_plain_loop_to_the_bit(wrap):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    loop = run_stale if wrap is stale else run_delayed
    assert_equal(loop(wrap(inner, 0), 20), run_delayed(inner, 20))


def growth(run, tau, step_size):
    """How much the error on a quadratic grows per step, in the long run."""
    steps = 4000
    rule = run["wrap"](optax.sgd(step_size), tau)

    def body(carry, _):
        params, state = carry
        g = stale_params(state, params) if run["ask"] else params
        updates, state = rule.update(g, state, params)
        return (optax.apply_updates(params, updates), state), params

    with jax.enable_x64(True):
        start = jnp.ones((), jnp.float64)
        _, seen = jax.lax.scan(body, (start, rule.init(start)), length=steps)
    size = np.abs(np.asarray(seen)).reshape(4, -1).max(axis=1)
    return (size[3] / size[1]) ** (2 / steps)


@pytest.mark.parametrize("tau", [0, 1, 2, 5, 10])
@pytest.mark.parametrize(
    "run",
    [{"wrap": stale, "ask": True}, {"wrap": delay_gradients, "ask": False}],
    ids=["stale", "delay_gradients"],
)
def test_stability_limit_of_delayed_gradient_descent(run, tau):
    """Theory: w[t+1] = w[t] - a w[t - tau] is stable below 2 sin(pi / (4 tau + 2)).

    The error then shrinks or grows by the largest root of z^(tau+1) = z^tau - a.
    """
    limit = 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
    for factor in (0.98, 1.02):
        a = factor * limit
        roots = np.roots([1, -1, *[0] * (tau - 1), a] if tau else [1, a - 1])
        rate = growth(run, tau, a)
        assert (rate < 1) == (factor < 1)
        np.testing.assert_allclose(rate, np.abs(roots).max(), atol=1e-4)


def remember():
    """An optimizer that says what it was given."""

    def update(updates, state, params=None, *, staleness, stale_params, **extra):
        return updates, (staleness, stale_params)

    return optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros([], jnp.int32), params), update
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        lambda inner: optax.chain(optax.clip(10.0), inner),
    ],
)
def test_the_inner_optimizer_is_told_its_staleness(wrap):
    rule = wrap(stale(optax.chain(remember(), optax.sgd(0.1)), 2))
    params, state, seen = START, rule.init(START), [START]
    for t in range(5):
        updates, state = rule.update(curvature(params), state, params)
        (found,) = [
            node
            for node in jax.tree.leaves(
                state, is_leaf=lambda x: isinstance(x, StaleState)
            )
            if isinstance(node, StaleState)
        ]
        staleness, old = found.inner_state[0]
        assert staleness == min(t, 2)
        assert_equal(old, seen[t - min(t, 2)])
        params = optax.apply_updates(params, updates)
        seen.append(params)


def test_the_inner_optimizer_rests_until_the_line_is_full():
    rule = delay_gradients(optax.adam(0.1), 3)
    state = start = rule.init(START)
    for _ in range(3):
        updates, state = rule.update(START, state, START)
        assert_equal(state.inner_state, start.inner_state)
        assert_equal(updates, jax.tree.map(jnp.zeros_like, START))
    _, state = rule.update(START, state, START)
    assert optax.tree.get(state.inner_state, "ScaleByAdamState").count == 1


INNERS = [optax.sgd(0.1, momentum=0.9), adagrad(0.1), optax.adam(1e-3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_state_is_stable_and_donatable_from_the_first_step(wrap, inner, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), START)
    rule = wrap(inner, 3)
    state = rule.init(params)
    spec = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    update = jax.jit(rule.update, donate_argnums=1)
    for _ in range(5):
        updates, state = update(params, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == spec
    assert jax.tree.map(lambda x: x.dtype, updates) == {"a": dtype, "b": dtype}
    assert update._cache_size() == 1


@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_shared_buffers_of_the_inner_optimizer_are_separated(wrap):
    rule = wrap(optax.lbfgs(linesearch=None), 1)
    state = rule.init(START)
    jax.jit(rule.update, donate_argnums=1)(START, state, START)


@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_scan_and_vmap_equal_the_loop(wrap):
    rule = wrap(adagrad(0.1), 2)

    def body(carry, _):
        params, state = carry
        at = stale_params(state, params) if wrap is stale else params
        updates, state = rule.update(curvature(at), state, params)
        return (optax.apply_updates(params, updates), state), None

    def last(params):
        return jax.lax.scan(body, (params, rule.init(params)), length=8)[0][0]

    loop = run_stale if wrap is stale else run_delayed
    two = [START, jax.tree.map(lambda x: 2 * x, START)]
    lanes = jax.jit(jax.vmap(last))(jax.tree.map(lambda *x: jnp.stack(x), *two))
    for i, start in enumerate(two):
        want = loop(rule, 8, params=start)[-1]
        got = jax.tree.map(lambda x, i=i: x[i], lanes)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, want
        )


@pytest.mark.parametrize(
    ("error", "words", "delays"),
    [
        (ValueError, r"delays\[0\]=-1", -1),
        (ValueError, r"delays\[2\]=-3", [0, 1, -3]),
        (ValueError, "shape .0,", np.zeros(0, int)),
        (ValueError, "shape .2, 1.", np.zeros((2, 1), int)),
        (TypeError, "delays=1.5", 1.5),
        (TypeError, "delays='3'", "3"),
    ],
)
def test_bad_delays_are_named(error, words, delays):
    with pytest.raises(error, match=words):
        stale(optax.sgd(0.1), delays)


def test_bad_use_is_named():
    rule = stale(optax.sgd(0.1), 1)
    state = rule.init(START)
    with pytest.raises(ValueError, match="params="):
        rule.update(START, state)
    with pytest.raises(ValueError, match="holds 0 StaleState"):
        stale_params(optax.sgd(0.1).init(START), START)
    with pytest.raises(ValueError, match="holds 2 StaleState"):
        stale_params((state, state), START)
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(lambda d: stale(optax.sgd(0.1), d).init(START))(1)
    with pytest.raises(ValueError, match="delay=-1"):
        delay_gradients(optax.sgd(0.1), -1)
    with pytest.raises(TypeError):
        delay_gradients(optax.sgd(0.1), 1.0)


def changed(trace, **columns):
    return Trace.from_columns(trace.header, **trace.columns() | columns)


def test_a_trace_that_is_not_one_delay_per_step_is_refused():
    trace = Trace.from_delays([0, 1, 1])
    pushes = trace.kind == PUSH
    for wrong in ({"count": 2 * pushes}, {"status": DROPPED * pushes}):
        with pytest.raises(ValueError, match="several gradients or were not taken"):
            stale(optax.sgd(0.1), changed(trace, **wrong))


def test_shards_of_different_staleness_need_replay():
    """Two replicas whose pushes reach two shards in opposite orders."""
    trace = Trace.from_columns(
        {"replicas": 2, "shards": 2},
        kind=np.full(4, PUSH),
        time=np.arange(4.0),
        replica=[0, 1, 1, 0],
        shard=[0, 1, 0, 1],
        version=[1, 1, 2, 2],
        base=0,
        count=1,
        id=0,
    )
    assert trace.staleness().tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"push 0 .*\[0, 1\].* use dbjax.replay"):
        stale(optax.sgd(0.1), trace)
    with pytest.raises(ValueError, match="did not reach a shard"):
        stale(optax.sgd(0.1), trace.take(slice(3)))
