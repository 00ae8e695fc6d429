import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax import schedules
from dbjax.optim import (
    StaleState,
    adadelay,
    adagrad,
    delay_gradients,
    scale_by_staleness,
    stale,
    stale_params,
)
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
@pytest.mark.parametrize("delays", [3, {"a": 0, "b": 2}])
@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_state_is_stable_and_donatable_from_the_first_step(wrap, delays, inner, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), START)
    rule = wrap(inner, delays)
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


@pytest.mark.parametrize("delays", [2, {"a": 0, "b": 3}])
@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_scan_and_vmap_equal_the_loop(wrap, delays):
    rule = wrap(adagrad(0.1), delays)

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
        (ValueError, "delays=-1: allowed are integers from 0", -1),
        (ValueError, r"delays\[2\]=-3", [0, 1, -3]),
        (ValueError, "shape .0,", np.zeros(0, int)),
        (ValueError, "shape .2, 1.", np.zeros((2, 1), int)),
        (TypeError, "delays=1.5", 1.5),
        (TypeError, "delays='3'", "3"),
        (TypeError, r"delays\['b'\]=0.5", {"a": 1, "b": 0.5}),
        (ValueError, r"delays\['a'\]=-2", {"a": -2, "b": 0}),
        (ValueError, r"delays\['a'\]\[1\]=-2", {"a": [0, -2], "b": 0}),
        (ValueError, "holds no delay", {}),
        (ValueError, "holds no delay", None),
        (ValueError, "fits an int32", 2**31),
        (ValueError, "delays must be a prefix .*'a', 'b'", {"a": 1, "c": 0}),
        (ValueError, r"delays\('b'\)=-1", lambda path: {"a": 1, "b": -1}[path]),
        (TypeError, r"delays\('a'\)=None", lambda path: None),
    ],
)
def test_bad_delays_are_named(error, words, delays):
    with pytest.raises(error, match=words):
        stale(optax.sgd(0.1), delays).init(START)
    with pytest.raises(error, match=words.replace("delays", "delay")):
        delay_gradients(optax.sgd(0.1), delays).init(START)


@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_a_list_that_may_be_steps_or_leaves_is_refused(wrap):
    params = [jnp.zeros(2), jnp.zeros(3)]
    with pytest.raises(ValueError, match="one per step or one per entry"):
        wrap(optax.sgd(0.1), [1, 0]).init(params)
    wrap(optax.sgd(0.1), np.array([1, 0])).init(params)
    wrap(optax.sgd(0.1), [1, 0, 1]).init(params)


# delays of leaves

DEEP = {"layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}] * 2, "head": jnp.ones(4)}


def slopes(params):
    """Every leaf's gradient depends on all leaves, as in a network."""
    total = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))
    return jax.tree.map(lambda x: 0.3 * x + 0.1 * total, params)


RUNS = [(stale, run_stale), (delay_gradients, run_delayed)]


@pytest.mark.parametrize("delays", [0, 3, [0, 1, 0, 2, 1]])
@pytest.mark.parametrize(("wrap", "run"), RUNS)
def test_equal_delays_of_all_leaves_are_the_delay_of_all_to_the_bit(wrap, run, delays):
    rule = optax.adam(0.1)
    want = run(wrap(rule, delays), 8, slopes, DEEP)
    same = jax.tree.map(lambda leaf: delays, DEEP)
    for of_leaves in (same, {"layers": delays, "head": delays}, lambda path: delays):
        assert_equal(run(wrap(rule, of_leaves), 8, slopes, DEEP), want)


@pytest.mark.parametrize("seed", range(2))
def test_each_leaf_is_seen_at_its_own_age(seed):
    """The textbook: w[t+1] = w[t] - a gradient(each leaf of w[t - its delay])."""
    rng = np.random.default_rng(seed)
    treedef = jax.tree.structure(DEEP)
    constant = rng.integers(0, 5, treedef.num_leaves)
    varying = [rng.integers(0, 6, 9) for _ in range(treedef.num_leaves)]
    for delays in (constant.tolist(), varying):
        got = run_stale(
            stale(optax.sgd(0.1), treedef.unflatten(delays)), 12, slopes, DEEP
        )
        seen = [jax.tree.leaves(DEEP)]
        for t in range(12):
            old = []
            for leaf, delay in enumerate(delays):
                entry = np.atleast_1d(delay)
                late = min(entry[min(t, len(entry) - 1)], t)
                old.append(seen[t - late][leaf])
            g = jax.tree.leaves(slopes(treedef.unflatten(old)))
            seen.append([w - 0.1 * d for w, d in zip(seen[t], g, strict=True)])
        for one, want in zip(got, seen, strict=True):
            for a, b in zip(jax.tree.leaves(one), want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_leaf_keeps_no_more_versions_than_its_own_delay():
    delays = {"layers": [{"w": 4, "b": np.array([9, 2])}, 1], "head": 0}
    history = stale(optax.sgd(0.1), delays).init(DEEP).history
    states = delay_gradients(optax.sgd(0.1), delays).init(DEEP)
    assert [jnp.shape(x)[0] for x in jax.tree.leaves(history)] == [0, 2, 4, 1, 1]
    lines = [[len(x) for x in jax.tree.leaves(state.line)] for state in states]
    assert lines == [[0], [1, 1], [4], [2]]


@pytest.mark.parametrize("inner", [optax.adam(0.1), adagrad(0.1)])
def test_gradients_of_leaves_of_one_delay_have_an_optimizer_of_their_own(inner):
    """As each stage of a pipeline has; nobody waits for another one's line."""
    delays = {"a": 0, "b": 3}
    got = run_delayed(delay_gradients(inner, delays), 12)
    for leaf, delay in delays.items():  # `curvature` does not mix leaves
        alone = run_delayed(delay_gradients(inner, delay), 12)
        for one, want in zip(got, alone, strict=True):
            np.testing.assert_allclose(one[leaf], want[leaf], rtol=1e-5)


def test_an_array_of_delays_is_taken_at_its_word():
    """Where no line is filling, an old gradient is one at old parameters."""
    delays = np.array([0, 1, 0, 3, 1, 2])
    for of in (delays, {"a": delays, "b": 0}):
        old = run_stale(stale(adagrad(0.1), of), 10)
        assert_equal(run_delayed(delay_gradients(adagrad(0.1), of), 10), old)
    rests = run_delayed(delay_gradients(optax.sgd(0.1), np.array([2, 2, 0])), 4)
    assert_equal(rests[2], START)
    assert_equal(rests[2:], run_delayed(optax.sgd(0.1), 2))


def test_extra_arguments_are_of_the_leaves_they_go_with():
    def update(g, state, params=None, *, old, value, **extra):
        return jax.tree.map(lambda g, w, o: g + value * (w - o), g, params, old), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    rule = delay_gradients(inner, {"a": 0, "b": 1})
    old = jax.tree.map(jnp.zeros_like, START)
    updates, _ = rule.update(START, rule.init(START), START, old=old, value=2.0)
    assert_equal(updates, {"a": 3 * START["a"], "b": 0 * START["b"]})


def test_the_inner_optimizer_is_told_the_staleness_of_each_leaf():
    rule = stale(optax.chain(remember(), optax.sgd(0.1)), {"a": 2, "b": 1})
    state, params, seen = rule.init(START), START, [START]
    state = state._replace(inner_state=((state.delay, START), state.inner_state[1]))
    for t in range(4):
        updates, state = rule.update(curvature(params), state, params)
        staleness, old = state.inner_state[0]
        assert staleness == {"a": min(t, 2), "b": min(t, 1)}
        assert_equal(old["a"], seen[t - min(t, 2)]["a"])
        assert_equal(old["b"], seen[t - min(t, 1)]["b"])
        params = optax.apply_updates(params, updates)
        seen.append(params)


@pytest.mark.parametrize("rule", [scale_by_staleness(1), adadelay(2.0, 0.5)])
def test_delay_aware_rules_take_the_staleness_of_each_leaf(rule):
    delays = {"a": 3, "b": 1}
    got = run_stale(stale(optax.chain(rule, optax.sgd(0.1)), delays), 9)
    for leaf, delay in delays.items():
        alone = run_stale(stale(optax.chain(rule, optax.sgd(0.1)), delay), 9)
        assert_equal([x[leaf] for x in got], [x[leaf] for x in alone])


@pytest.mark.parametrize("wrap", [stale, delay_gradients])
def test_a_pipeline_has_the_delay_of_each_stage(wrap):
    def rank_of(path):
        return 2 if path == "head" else int(path.split("/")[1])

    layer = {"w": 2, "b": 2}, {"w": 1, "b": 1}
    want = wrap(adagrad(0.1), {"layers": [*layer], "head": 0})
    run = run_stale if wrap is stale else run_delayed
    got = run(wrap(adagrad(0.1), schedules.pipeline(3, rank_of)), 8, slopes, DEEP)
    assert_equal(got, run(want, 8, slopes, DEEP))


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
