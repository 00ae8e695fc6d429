import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax.optim import lbfgs, minimize
from dbjax.optim.status import (
    CONVERGED,
    INCONSISTENT,
    LIMIT,
    NOT_FINITE,
    SEARCH_FAILED,
    SMALL_STEP,
    status_of,
)

PLAIN_CODE = True


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(x):
    powers = x[1] ** jnp.arange(1, 4)
    return jnp.sum((jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - powers)) ** 2)


def powell_singular(x):
    first = (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2
    return first + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def wood(x):
    first = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    second = 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
    return first + second + 10 * (x[1] + x[3] - 2) ** 2 + 0.1 * (x[1] - x[3]) ** 2


def quadratic(x):
    return 0.5 * jnp.sum(jnp.logspace(-1, 2, x.size, dtype=x.dtype) * x * x)


# From Moré, Garbow and Hillstrom (1981), but for the quadratic.
PROBLEMS = {
    "rosenbrock": (rosenbrock, [-1.2, 1.0]),
    "extended rosenbrock": (rosenbrock, [-1.2, 1.0] * 5),
    "beale": (beale, [1.0, 1.0]),
    "powell singular": (powell_singular, [3.0, -1.0, 0.0, 1.0]),
    "wood": (wood, [-3.0, -1.0, -3.0, -1.0]),
    "quadratic": (quadratic, [1.0] * 20),
}


def any_problem(x, index):
    """One function for all problems, so that one compilation serves them all."""
    sizes = [len(start) for _, start in PROBLEMS.values()]
    branches = [
        lambda x, f=f, n=n: f(x[:n])
        for (f, _), n in zip(PROBLEMS.values(), sizes, strict=True)
    ]
    return jax.lax.switch(index, branches, x)


@functools.cache
def solver():
    return jax.jit(
        lambda x, index: minimize(any_problem, x, index, gradient_tolerance=1e-4)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_classic_problems_are_solved(dtype):
    with jax.enable_x64(dtype == "float64"):
        for index, (name, (_, start)) in enumerate(PROBLEMS.items()):
            x = np.zeros(max(len(start) for _, start in PROBLEMS.values()), dtype)
            x[: len(start)] = start
            result = solver()(x, index)
            message = result.message
            assert result.status == CONVERGED, f"{name}: {message}"
            assert float(result.value) < 1e-5, name
            assert result.params.dtype == dtype
            spent, steps = int(result.evaluations), int(result.iterations)
            assert spent < 1.4 * steps + 10, name


def test_a_batch_of_problems_where_one_fails():
    def f(x, scale):
        return scale * jnp.sum((x - 1) ** 2)

    scales = jnp.array([1.0, jnp.nan, 100.0])
    batch = jax.vmap(lambda s: minimize(f, jnp.zeros(2), s))(scales)
    assert batch.status.tolist() == [CONVERGED, NOT_FINITE, CONVERGED]
    np.testing.assert_allclose(batch.params, [[1, 1], [0, 0], [1, 1]], atol=1e-4)


START = np.array([-1.2, 0.5], np.float32)


@jax.custom_jvp
def lying(x, factor=-1.0):
    return jnp.sum(x**2)


@lying.defjvp
def _(primals, tangents):
    x, factor = primals
    return lying(x, factor), factor * jnp.vdot(2 * x, tangents[0])


def walled(x):
    """Not finite from 1 on, with the minimum just before."""
    return jnp.where(x[0] < 1, jnp.sum((x - 0.9) ** 2), jnp.nan) * 1e3


def walled_in(x):
    """Finite at the start alone, where it has a slope."""
    return jnp.where(jnp.all(x == START), jnp.sum(x), jnp.nan)


def kink(x):
    return jnp.sum(jnp.maximum(3 * x, -0.5 * x))


ENDS = {
    "constant": (CONVERGED, lambda x: 0.0 * jnp.sum(x)),
    "start not finite": (NOT_FINITE, lambda x: jnp.nan * jnp.sum(x)),
    "lying gradient": (INCONSISTENT, lambda x: lying(x, -1.0)),
    "gradient lying a little": (INCONSISTENT, lambda x: lying(x - 30, -0.05)),
    "falls for ever": (LIMIT, lambda x: -jnp.sum(x)),
    "kink at the start": (SEARCH_FAILED, lambda x: kink(x - START)),
    "kink on the way": (SMALL_STEP, lambda x: kink(x - 1)),
    "lost in rounding": (SMALL_STEP, lambda x: rosenbrock(3e3 * x) + 1e7),
    "a wall all around": (NOT_FINITE, walled_in),
    "limit": (LIMIT, rosenbrock),
    "a wall": (CONVERGED, walled),
    "at the minimum": (CONVERGED, lambda x: jnp.sum((x - START) ** 2)),
    "negative values": (CONVERGED, lambda x: jnp.sum((x - 1) ** 2) - 1e3),
}


def any_end(x, index):
    return jax.lax.switch(index, [f for _, f in ENDS.values()], x)


@functools.cache
def ender():
    return jax.jit(
        lambda index, limit: minimize(
            *(any_end, START, index),
            **dict(max_iterations=limit, gradient_tolerance=1e-2),
        )
    )


@pytest.mark.parametrize("name", ENDS)
def test_the_end_is_honest_and_no_worse_than_the_start(name):
    status, f = ENDS[name]
    result = ender()(list(ENDS).index(name), 3 if name == "limit" else 200)
    assert status_of(result.status) is status_of(status)
    assert jnp.isfinite(result.params).all()
    assert not result.value > f(START)
    if status != NOT_FINITE:
        np.testing.assert_allclose(result.value, f(result.params), rtol=1e-6)


@pytest.mark.parametrize(
    ("status", "rate", "f"),
    [
        (SMALL_STEP, 1e-4, lambda x: jnp.sum(x**2) + 1e6),
        (NOT_FINITE, 1e3, lambda x: jnp.sum(x**4)),
    ],
)
def test_the_end_is_honest_for_optimizers_without_a_search(status, rate, f):
    result = minimize(f, START, optimizer=optax.sgd(rate), gradient_tolerance=0.0)
    assert status_of(result.status) is status_of(status)
    assert jnp.isfinite(result.params).all()
    assert not result.value > f(START)


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_value_tolerance_is_a_share_of_the_absolute_value(offset):
    result = minimize(
        *(lambda x: rosenbrock(x) + offset, START),
        **dict(gradient_tolerance=0.0, value_tolerance=0.1),
    )
    assert status_of(result.status) is status_of(SMALL_STEP)
    assert 10 < result.evaluations < 60
    assert "stopped falling" in result.message


def test_a_run_goes_on_from_its_state_with_its_history():
    start = jnp.array([-1.2, 1.0] * 3)
    run = jax.jit(
        lambda x, state, limit: minimize(
            rosenbrock, x, state=state, max_iterations=limit
        )
    )
    first = run(start, lbfgs().init(start), 10)
    second = run(first.params, first.state, 10)
    whole = run(start, lbfgs().init(start), 20)
    np.testing.assert_allclose(second.value, whole.value, rtol=0.05)
    assert second.state[0].count == 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_iterations": -1},
        {"gradient_tolerance": -1e-5},
        {"gradient_tolerance": np.nan},
        {"value_tolerance": -0.1},
    ],
)
def test_bad_input_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}: allowed are"):
        minimize(rosenbrock, jnp.zeros(2), **wrong)
