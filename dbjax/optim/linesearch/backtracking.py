"""Backtracking to sufficient decrease (Armijo), as a state machine."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbjax.optim.linesearch import words
from dbjax.optim.linesearch.words import LineSearch, Point, Scalar


class BacktrackingState(NamedTuple):
    """Between two evaluations; see `words.SearchState` for the first four.

    Attributes:
        trial: the step to evaluate at; when done, the step to take.
        done: whether the search has ended.
        status: int32, a constant of `words`.
        evaluations: int32, evaluations so far.
        start: the point at step 0.
        failure: int32, the status to end with if nothing better is found.
        verdict: int32, the status to end with after step 0 is evaluated again;
            `SEARCHING` before that.
    """

    trial: jax.Array
    done: jax.Array
    status: jax.Array
    evaluations: jax.Array
    start: Point
    failure: jax.Array
    verdict: jax.Array


@functools.cache  # what is compiled for one search serves all that are equal
def backtracking(
    *,
    decrease: float = 1e-4,
    max_evaluations: int = 20,
    value_rtol: float | None = None,
) -> LineSearch:
    r"""Shorten the step until the value has decreased enough.

    .. math::
      \phi(t) \le \phi(0) + c_1 t \phi'(0)

    The next step is the minimiser of the parabola through the last value, kept between
    a tenth and a half of the last step; a tenth of it if that was not finite. It never
    gets longer than the first, and nothing is asked of the slope.

    Args:
        decrease: `c_1`, of sufficient decrease.
        max_evaluations: give up after so many.
        value_rtol: see `more_thuente`.

    Returns:
        A line search, with state `BacktrackingState`.

    Raises:
        ValueError: a constant is outside its range.

    References:
        Nocedal and Wright, Numerical Optimization (2006), sections 3.1 and 3.5.

    Examples:
        >>> from dbjax.optim.linesearch import backtracking
        >>> search = backtracking()
        >>> phi = lambda t: ((t - 3.0) ** 2, 2 * (t - 3.0))  # value and slope
        >>> state = search.init(*phi(0.0), 10.0)
        >>> while not state.done:
        ...     state = search.step(state, *phi(float(state.trial)))
        >>> print(float(state.trial), int(state.evaluations))
        3.0 2
    """
    words.check_fractions(decrease=decrease)
    words.check_evaluations(max_evaluations)

    def init(value: Scalar, slope: Scalar, step: Scalar = 1.0) -> BacktrackingState:
        value, slope, step = words.scalars(value, slope, step)
        finite = jnp.isfinite(value) & jnp.isfinite(slope)
        starts = finite & (slope < 0)
        failure = jnp.where(finite, words.NOT_DESCENT, words.NOT_FINITE)
        return BacktrackingState(
            trial=jnp.where(starts, step, 0),
            done=~starts,
            status=jnp.where(starts, words.SEARCHING, failure).astype(jnp.int32),
            evaluations=jnp.zeros([], jnp.int32),
            start=Point(jnp.zeros_like(value), value, slope),
            failure=jnp.asarray(words.LOST, jnp.int32),
            verdict=jnp.zeros([], jnp.int32),
        )

    def step(
        state: BacktrackingState, value: Scalar, slope: Scalar
    ) -> BacktrackingState:
        dtype = state.trial.dtype
        start, t = state.start, state.trial
        now = Point(t, jnp.asarray(value, dtype), jnp.asarray(slope, dtype))
        finite = jnp.isfinite(now.value) & jnp.isfinite(now.slope)
        level = words.noise(start.value, value_rtol)
        failure = words.failure(start, now, level, state.failure)
        failure = jnp.where(finite, failure, words.NOT_FINITE).astype(jnp.int32)
        trusted = failure != words.INCONSISTENT
        now = words.see_through_noise(start, now, level, trusted)
        found = finite & (now.value <= start.value + decrease * t * start.slope)
        evaluations = state.evaluations + 1

        ended = state.verdict != words.SEARCHING
        gives_up = ~found & (evaluations >= max_evaluations)
        verdict = jnp.where(gives_up, failure, state.verdict).astype(jnp.int32)

        bend = now.value - start.value - t * start.slope
        parabola = jnp.clip(-start.slope * t * t / (2 * bend), t / 10, t / 2)
        shorter = jnp.where(finite, parabola, t / 10)
        status = jnp.where(found, words.FOUND, words.SEARCHING)
        return BacktrackingState(
            trial=jnp.where(ended | found, t, jnp.where(gives_up, 0, shorter)),
            done=ended | found,
            status=jnp.where(ended, state.verdict, status).astype(jnp.int32),
            evaluations=evaluations,
            start=start,
            failure=failure,
            verdict=verdict,
        )

    return LineSearch(jax.jit(init), jax.jit(step))
