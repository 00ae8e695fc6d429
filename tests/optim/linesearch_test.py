import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize._dcsrch import DCSRCH

from dbjax.optim.linesearch import (
    backtracking,
    more_thuente,
    scale_by_line_search,
    words,
)

PLAIN_CODE = True

SEARCHES = {"more_thuente": more_thuente, "backtracking": backtracking}


# The test functions of Moré and Thuente (1994), section 5.
def first(t, beta=2.0):
    return -t / (t**2 + beta)


def second(t, beta=0.004):
    return (t + beta) ** 5 - 2 * (t + beta) ** 4


def third(t, beta=0.01, n=39):
    near = (t - 1) ** 2 / (2 * beta) + beta / 2
    base = jnp.where(jnp.abs(t - 1) <= beta, near, jnp.abs(t - 1))
    return base + 2 * (1 - beta) / (n * jnp.pi) * jnp.sin(n * jnp.pi / 2 * t)


def yanai(beta1, beta2):
    def gamma(beta):
        return jnp.sqrt(1 + beta**2) - beta

    def f(t):
        left = gamma(beta1) * jnp.sqrt((1 - t) ** 2 + beta2**2)
        return left + gamma(beta2) * jnp.sqrt(t**2 + beta1**2)

    return f


FUNCTIONS = {
    "1": (first, 0.1, 0.1001),
    "2": (second, 0.1, 0.1001),
    "3": (third, 0.1, 0.1001),
    "4": (yanai(0.001, 0.001), 1e-3, 1.001e-3),
    "5": (yanai(0.01, 0.001), 1e-3, 1.001e-3),
    "6": (yanai(0.001, 0.01), 1e-3, 1.001e-3),
}


def run(search, phi, step, dtype=None):
    """Drive a search from Python; gives its last state and the steps tried."""
    cast = (lambda x: x) if dtype is None else (lambda x: jnp.asarray(x, dtype))
    state, tried = search.init(*map(cast, phi(0.0)), step), []
    while not state.done:
        tried.append(float(state.trial))
        state = search.step(state, *map(cast, phi(tried[-1])))
    assert len(tried) == state.evaluations
    assert not tried or tried[-1] == state.trial  # what was evaluated last
    return state, tried


@functools.cache
def counted(f):
    with jax.enable_x64(True):
        grad = jax.jit(jax.value_and_grad(f))

        def phi(t):
            with jax.enable_x64(True):
                return tuple(map(float, grad(jnp.float64(t))))

        phi(0.0)
    return phi


@pytest.mark.parametrize("step", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_thuente_meets_its_conditions_and_needs_no_more_than_scipy(name, step):
    f, decrease, curvature = FUNCTIONS[name]
    phi = counted(f)
    with jax.enable_x64(True):
        search = more_thuente(
            decrease=decrease,
            curvature=curvature,
            interval=1e-12,
            max_evaluations=60,
        )
        state, tried = run(search, phi, step, np.float64)
    assert state.status == words.FOUND
    value, slope = phi(0.0)
    at = phi(tried[-1])
    assert at[0] <= value + decrease * tried[-1] * slope * (1 - 1e-12)
    assert abs(at[1]) <= curvature * abs(slope)
    theirs = []
    DCSRCH(
        lambda t: theirs.append(t) or phi(t)[0],
        lambda t: phi(t)[1],
        *(decrease, curvature, 1e-12, 0.0, 1e10),
    )(step, phi0=value, derphi0=slope, maxiter=100)
    assert len(tried) <= len(theirs)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_good_first_step_is_taken(name):
    phi = lambda t: ((t - 1.1) ** 2, 2 * (t - 1.1))  # noqa: E731
    state, tried = run(SEARCHES[name](), phi, 1.0)
    assert (state.status, tried) == (words.FOUND, [1.0])


def test_backtracking_shortens_by_the_parabola_within_limits():
    phi = lambda t: ((t - 1.0) ** 2, 2 * (t - 1.0))  # noqa: E731
    assert run(backtracking(), phi, 3.0)[1] == [3.0, 1.0]
    assert run(backtracking(), phi, 64.0)[1][:2] == [64.0, np.float32(6.4)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["value", "slope"])
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_not_finite_shortens_the_step(name, which, bad):
    def phi(t):
        value, slope = (t - 1.0) ** 2, 2 * (t - 1.0)
        if t > 2.5:
            return (bad, slope) if which == "value" else (value, bad)
        return value, slope

    state, tried = run(SEARCHES[name](), phi, 1000.0)
    assert state.status == words.FOUND
    assert tried[:3] == [1000.0, 100.0, 10.0]
    assert 0 < state.trial < 2


def test_a_wall_close_to_the_minimum_is_no_trap():
    """Beyond 1 nothing is finite, and the minimum lies at 0.97."""

    def phi(t):
        return ((t - 0.97) ** 2, 2 * (t - 0.97)) if t < 1 else (np.inf, np.inf)

    state, tried = run(more_thuente(curvature=0.1), phi, 4.0)
    assert state.status in (words.FOUND, words.DECREASED)
    assert phi(tried[-1])[0] < 0.1 * phi(0.0)[0]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    ("status", "phi"),
    [
        (words.NOT_DESCENT, lambda t: (1.0, 0.0)),
        (words.NOT_DESCENT, lambda t: (t, 1.0)),
        (words.NOT_FINITE, lambda t: (np.nan, -1.0)),
        (words.NOT_FINITE, lambda t: (0.0, np.nan)),
        (words.NOT_FINITE, lambda t: (0.0 if t == 0 else np.nan, -1.0)),
        (words.FAILED, lambda t: (0.0, -1.0) if t == 0 else (1.0 + t, 1.0)),
        (words.INCONSISTENT, lambda t: (1.0 + t, -1.0)),
        (words.INCONSISTENT, lambda t: (1.0 + t, -0.03)),
        (words.LOST, lambda t: (1.0 + 1e-4 * (t > 0), -1e-9)),
        (words.LOST, lambda t: (1e-20 * (1 + (t > 0)), -1e-23)),
    ],
)
def test_a_search_without_result_says_why_and_ends_at_the_start(name, status, phi):
    state, tried = run(SEARCHES[name](max_evaluations=7), phi, 1.0)
    assert (state.status, state.trial) == (status, 0)
    assert len(tried) <= 8


def test_a_value_that_falls_for_ever_is_followed_as_far_as_paid_for():
    phi = lambda t: (-t, -1.0)  # noqa: E731
    state, tried = run(more_thuente(max_evaluations=5), phi, 1.0)
    assert (state.status, len(tried)) == (words.DECREASED, 5)
    assert state.trial == max(tried) > 100
    state, tried = run(more_thuente(max_step=3.0), phi, 1.0)
    assert (state.status, state.trial) == (words.DECREASED, 3.0)


def test_the_best_step_is_evaluated_last():
    """Out of evaluations at a worse step: one more, at the best."""
    values = {0.0: (1.0, -1.0), 1.0: (0.5, -0.99)}
    phi = lambda t: values.get(t, (2.0, 1.0))  # noqa: E731
    state, tried = run(more_thuente(max_evaluations=3, interval=1e-3), phi, 1.0)
    assert state.status == words.DECREASED
    assert tried[0] == tried[-1] == state.trial == 1.0
    assert len(tried) == 4


def test_slopes_decide_where_values_drown_in_rounding():
    """A parabola on a large constant in float32: all values are equal."""

    def phi(t):
        return np.float32(1e6 + 1e-3 * (t - 0.5) ** 2), 2e-3 * (t - 0.5)

    assert len({phi(t)[0] for t in np.linspace(0, 1, 50)}) == 1
    state, tried = run(more_thuente(curvature=0.1), phi, 0.1)
    assert state.status == words.FOUND
    assert abs(phi(tried[-1])[1]) <= 0.1 * abs(phi(0.0)[1])


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_machine_in_jit_vmap_and_from_python(name):
    search = SEARCHES[name]()
    phi = lambda t: (jnp.cos(3 * t) + t**2, 2 * t - 3 * jnp.sin(3 * t) - 0.5)  # noqa: E731

    def whole(step):
        state = search.init(jnp.float32(1.0), jnp.float32(-0.5), step)
        return jax.lax.while_loop(
            lambda s: ~s.done, lambda s: search.step(s, *phi(s.trial)), state
        )

    steps = jnp.array([0.1, 1.0, 30.0])
    lanes = jax.jit(jax.vmap(whole))(steps)
    for i, step in enumerate(steps):
        state = search.init(1.0, -0.5, step)
        while not state.done:
            state = search.step(state, *phi(state.trial))
        assert jax.tree.structure(state) == jax.tree.structure(lanes)
        assert state.evaluations == lanes.evaluations[i]
        np.testing.assert_allclose(state.trial, lanes.trial[i], rtol=1e-5)


def test_the_machine_compiles_once():
    search = more_thuente.__wrapped__()
    for step in (1e-3, 1.0, 1e3):
        run(search, lambda t: ((t - 3.0) ** 2, 2 * (t - 3.0)), step, np.float32)
    assert search.step._cache_size() == search.init._cache_size() == 1


@pytest.mark.parametrize(
    ("make", "words_in_error"),
    [
        (lambda: more_thuente(decrease=0.0), "decrease=0.0"),
        (lambda: more_thuente(curvature=1.5), "curvature=1.5"),
        (lambda: more_thuente(decrease=0.5, curvature=0.4), "less than curvature=0.4"),
        (lambda: more_thuente(max_step=-1.0), "max_step=-1.0"),
        (lambda: more_thuente(max_evaluations=0), "max_evaluations=0"),
        (lambda: backtracking(decrease=1.0), "decrease=1.0"),
        (lambda: backtracking(max_evaluations=0), "max_evaluations=0"),
    ],
)
def test_bad_constants_are_named(make, words_in_error):
    with pytest.raises(ValueError, match=words_in_error):
        make()


def bowl(w, centre, scale=1.0):
    return scale * jnp.sum((w - centre) ** 2)


@pytest.mark.parametrize("step", [jax.jit, lambda f: f])
def test_the_transformation_hands_on_what_the_function_takes(step):
    rule = optax.chain(optax.sgd(0.1), scale_by_line_search(more_thuente()))
    params, centre = jnp.zeros(2), jnp.array([1.0, 2.0])
    value, grad = jax.value_and_grad(bowl)(params, centre)

    def update(state, centre):
        return rule.update(
            *(grad, state, params),
            **dict(value=value, grad=grad, value_fn=bowl, centre=centre, unknown=1),
        )

    updates, state = step(update)(rule.init(params), centre)
    assert optax.tree.get(state, "status") == words.FOUND
    np.testing.assert_allclose(
        optax.tree.get(state, "value"), bowl(params + updates, centre), rtol=1e-6
    )
    np.testing.assert_allclose(
        optax.tree.get(state, "grad"), jax.grad(bowl)(params + updates, centre)
    )


def test_the_transformation_names_what_is_missing():
    rule = scale_by_line_search(more_thuente())
    state = rule.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="needs value="):
        rule.update(jnp.ones(2), state, jnp.zeros(2))
    with pytest.raises(TypeError, match="scalar"):
        rule.update(
            *(-jnp.ones(2), state, jnp.zeros(2)),
            **dict(value=jnp.float32(0), grad=jnp.ones(2), value_fn=lambda w: w),
        )
