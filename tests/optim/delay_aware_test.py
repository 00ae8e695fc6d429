"""Delay-aware rules: the plain rule without delay, their textbooks with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.optim import (
    adadelay,
    compensate_delay,
    predict_params,
    scale_by_gap,
    scale_by_staleness,
    stale,
    stale_params,
    without_prediction,
)
from tests.problems import DATA, PARAMS, loss_fn

RATE, MOMENTUM = 0.05, optax.sgd(0.05, momentum=0.9)


def _plain_adadelay():
    def rate(count):
        return 1.0 / (8.0 + 2.0 * jnp.sqrt(count.astype(jnp.float32)))

    return optax.sgd(rate)


# name -> rule, what it asks for, the rule that it is where nothing is stale
RULES = {
    "staleness-aware": (
        optax.chain(scale_by_staleness(), optax.sgd(RATE)),
        ("staleness",),
        optax.sgd(RATE),
    ),
    "DynSGD": (
        optax.chain(scale_by_staleness(1), dbjax.adagrad(RATE)),
        ("staleness",),
        dbjax.adagrad(RATE),
    ),
    "DC-ASGD-c": (
        optax.chain(compensate_delay(0.5), optax.sgd(RATE)),
        ("stale_params",),
        optax.sgd(RATE),
    ),
    "DC-ASGD-a": (
        optax.chain(compensate_delay(2.0, decay=0.95), MOMENTUM),
        ("stale_params",),
        MOMENTUM,
    ),
    "gap-aware": (
        optax.chain(scale_by_gap(RATE), MOMENTUM),
        ("stale_params",),
        MOMENTUM,
    ),
    "AdaDelay": (adadelay(8.0, 2.0), ("staleness",), _plain_adadelay()),
    "prediction": (predict_params(MOMENTUM, delay=0), (), MOMENTUM),
    # lambda 0, whatever the delay
    "DC-ASGD-c, 0": (
        optax.chain(compensate_delay(0.0), optax.sgd(RATE)),
        ("stale_params",),
        optax.sgd(RATE),
    ),
}


def _assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want
    )


def _loop(rule, delays, steps=12):
    """Somebody's own loop."""

    @jax.jit
    def step(params, state, batch):
        g = jax.grad(loss_fn)(stale_params(state, params), batch)
        updates, state = rule.update(g, state, params)
        return optax.apply_updates(params, updates), state

    rule = stale(rule, delays)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = rule.init(params)
    for i in range(steps):
        params, state = step(params, state, DATA.batch(0, i))
    return params


@pytest.mark.parametrize("name", RULES)
def test_without_delay_each_is_the_plain_rule_in_a_loop(name):
    rule, _, plain = RULES[name]
    _close(_loop(rule, 0), _loop(plain, 0))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_without_delay_each_is_the_plain_rule_in_downpour(name, shards):
    rule, provide, plain = RULES[name]
    problem = loss_fn, PARAMS, DATA
    size = {"replicas": 1, "steps": 12, "shards": shards}
    want = dbjax.downpour.train(*problem, optimizer=plain, **size)
    got = dbjax.downpour.train(*problem, optimizer=rule, provide=provide, **size)
    # The twins of these compute the same numbers elsewhere in the program.
    same = _close if name in ("AdaDelay", "prediction") else _assert_equal
    same(got.params, want.params)


def test_a_lambda_of_zero_is_the_plain_rule_whatever_the_delay():
    rule, provide, plain = RULES["DC-ASGD-c, 0"]
    problem, size = (loss_fn, PARAMS, DATA), {"replicas": 5, "steps": 20}
    want = dbjax.downpour.train(*problem, optimizer=plain, **size)
    got = dbjax.downpour.train(*problem, optimizer=rule, provide=provide, **size)
    _assert_equal(got.params, want.params)


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n][1]])
def test_runs_replay_to_the_same_bits_and_compiled_to_rounding(name):
    rule, provide, plain = RULES[name]
    problem = loss_fn, PARAMS, DATA
    optimizer = {"optimizer": rule, "provide": provide}
    run = dbjax.downpour.train(*problem, **optimizer, replicas=4, shards=2, steps=24)
    again = dbjax.replay(run.trace, *problem, **optimizer)
    _assert_equal(again.params, run.params)
    compiled = dbjax.replay(run.trace, *problem, **optimizer, exact=False)
    _close(compiled.params, run.params)
    if not name.endswith(" 0"):  # it must matter
        other = dbjax.replay(run.trace, *problem, optimizer=plain)
        assert not np.array_equal(other.params["w"], run.params["w"])


# Textbooks: the step that is taken, by hand, in float64.


def _by_hand(rule):
    """Give `step(g, w, old, tau, t)` of a rule, for one number after another."""
    seen = {"m": 0.0, "m_adaptive": 0.0}

    def gap(g, w, old, tau, t):
        seen["m"] = 0.999 * seen["m"] + 0.001 * g * g
        c = RATE * (np.sqrt(seen["m"] / (1 - 0.999 ** (t + 1))) + 1e-8)
        return -RATE * g / (1 + abs(w - old) / c)

    def adaptive(g, w, old, tau, t):
        seen["m_adaptive"] = 0.95 * seen["m_adaptive"] + 0.05 * g * g
        lam = 2.0 / np.sqrt(seen["m_adaptive"] + 1e-7)
        return -RATE * (g + lam * g * g * (w - old))

    return {
        "SA": lambda g, w, old, tau, t: -RATE * g / max(1, tau),
        "Dyn": lambda g, w, old, tau, t: -RATE * g / (tau + 1),
        "DC-c": lambda g, w, old, tau, t: -RATE * (g + 0.5 * g * g * (w - old)),
        "DC-a": adaptive,
        "gap": gap,
        "AdaDelay": lambda g, w, old, tau, t: -g / (8.0 + 2.0 * np.sqrt(t + tau)),
    }[rule]


TEXTBOOK = {
    "SA": optax.chain(scale_by_staleness(), optax.sgd(RATE)),
    "Dyn": optax.chain(scale_by_staleness(1), optax.sgd(RATE)),
    "DC-c": optax.chain(compensate_delay(0.5), optax.sgd(RATE)),
    "DC-a": optax.chain(compensate_delay(2.0, decay=0.95), optax.sgd(RATE)),
    "gap": optax.chain(scale_by_gap(RATE), optax.sgd(RATE)),
    "AdaDelay": adadelay(8.0, 2.0),
}


@pytest.mark.parametrize("delay", [1, 4])
@pytest.mark.parametrize("name", TEXTBOOK)
def test_with_delay_each_is_its_textbook(name, delay):
    rule, step = stale(TEXTBOOK[name], delay), _by_hand(name)
    update, params = jax.jit(rule.update), jnp.array(3.0)
    state, ws = rule.init(params), [3.0]
    for t in range(20):
        g = 2.0 * stale_params(state, params) - 1.0
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        tau = min(t, delay)
        old = ws[t - tau]
        ws.append(ws[t] + step(2.0 * old - 1.0, ws[t], old, tau, t))
        np.testing.assert_allclose(params, ws[-1], rtol=1e-4)


@pytest.mark.parametrize("delay", [1, 3])
def test_prediction_shows_where_parameters_will_be(delay):
    inner = optax.sgd(0.01, momentum=0.9)
    rule = predict_params(inner, delay)
    shown = true = jnp.array(3.0)
    state, inner_state = rule.init(shown), inner.init(true)
    last = 0.0
    for _ in range(20):
        g = jnp.cos(true + delay * last)  # taken ahead
        last, inner_state = inner.update(g, inner_state, true)
        true = true + last
        updates, state = rule.update(jnp.cos(shown), state, shown)
        shown = shown + updates
        np.testing.assert_allclose(without_prediction(state, shown, delay), true, 1e-5)


def test_prediction_widens_what_is_stable_under_delay():
    def ends(rule):
        rule = stale(rule, 4)
        update, params = jax.jit(rule.update), jnp.array(1.0)
        state = rule.init(params)
        for _ in range(300):
            updates, state = update(stale_params(state, params), state, params)
            params = optax.apply_updates(params, updates)
        return abs(float(params))

    inner = optax.sgd(0.03, momentum=0.9)
    assert ends(inner) > 1.0
    assert ends(predict_params(inner, 4)) < 1e-3


@pytest.mark.parametrize("make", [compensate_delay, scale_by_gap])
def test_means_of_small_floats_are_kept_in_larger_ones(make):
    params = jnp.ones(3, jnp.bfloat16)
    rule = make(0.1, decay=0.95)
    state = rule.init(params)
    updates, state = rule.update(params, state, params, stale_params=0.5 * params)
    assert updates.dtype == jnp.bfloat16
    assert state.mean_square.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_staleness(-1), "offset=-1"),
        (lambda: compensate_delay(-0.5), "lam=-0.5"),
        (lambda: compensate_delay(1.0, decay=1.0), "decay=1.0"),
        (lambda: scale_by_gap(0.0), "learning_rate=0.0"),
        (lambda: scale_by_gap(0.1, eps=0.0), "eps=0.0"),
        (lambda: adadelay(0.0, 1.0), "smoothness=0.0"),
        (lambda: adadelay(1.0, -1.0), "c=-1.0"),
        (lambda: predict_params(optax.sgd(0.1), -1), "delay=-1"),
    ],
)
def test_values_that_are_not_allowed_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n][1]])
def test_what_is_not_provided_is_asked_for(name):
    rule, provide, _ = RULES[name]
    with pytest.raises(ValueError, match=f"asks for {provide[0]}.*provide="):
        dbjax.downpour.train(loss_fn, PARAMS, DATA, optimizer=rule, replicas=2, steps=4)
