"""The strong Wolfe search of Moré and Thuente, as a state machine."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbjax.optim.linesearch import words
from dbjax.optim.linesearch.words import LineSearch, Point, Scalar


class MoreThuenteState(NamedTuple):
    """Between two evaluations; see `words.SearchState` for the first four.

    Attributes:
        trial: the step to evaluate at; when done, the step to take.
        done: whether the search has ended.
        status: int32, a constant of `words`.
        evaluations: int32, evaluations so far.
        start: the point at step 0.
        best: the end of the interval with the smallest value.
        other: the other end, once there is one.
        bracketed: whether a minimiser is known to lie between the two.
        first_stage: until a step with enough decrease and a rising slope was seen.
        widths: the interval's width, after the last two steps.
        ceiling: steps from here on are not finite, or not allowed.
        failure: int32, the status to end with if nothing better is found.
        verdict: int32, the status to end with after the best step is evaluated again;
            `SEARCHING` before that.
    """

    trial: jax.Array
    done: jax.Array
    status: jax.Array
    evaluations: jax.Array
    start: Point
    best: Point
    other: Point
    bracketed: jax.Array
    first_stage: jax.Array
    widths: tuple[jax.Array, jax.Array]
    ceiling: jax.Array
    failure: jax.Array
    verdict: jax.Array


@functools.cache  # what is compiled for one search serves all that are equal
def more_thuente(
    *,
    decrease: float = 1e-4,
    curvature: float = 0.9,
    interval: float = 0.1,
    max_step: float = 1e10,
    max_evaluations: int = 20,
    value_rtol: float | None = None,
) -> LineSearch:
    r"""Search for a step that meets the strong Wolfe conditions.

    .. math::
      \phi(t) \le \phi(0) + c_1 t \phi'(0), \qquad |\phi'(t)| \le c_2 |\phi'(0)|

    Steps are chosen by safeguarded cubic and quadratic interpolation. A step whose
    value or slope is not finite lowers the ceiling, and the next is ten times shorter.
    Where the change of the value is lost in rounding, as near the minimum in float32,
    the slopes decide (`words.see_through_noise`).

    Args:
        decrease: `c_1`, of sufficient decrease.
        curvature: `c_2`, larger than `decrease`; 0.9 suits quasi-Newton directions,
          0.1 conjugate gradients.
        interval: stop when the interval is narrower than this share of its upper end.
        max_step: no longer step is tried.
        max_evaluations: give up after so many, and take the best step.
        value_rtol: how far the values of two equal points may differ by rounding,
          relative to the value; the dtype's `eps^(3/4)` if not given.

    Returns:
        A line search, with state `MoreThuenteState`.

    Raises:
        ValueError: a constant is outside its range.

    References:
        Moré and Thuente, Line search algorithms with guaranteed sufficient decrease,
        ACM TOMS 20 (1994); Hager and Zhang, A new conjugate gradient method with
        guaranteed descent, SIAM J. Optim. 16 (2005).

    Examples:
        >>> from dbjax.optim.linesearch import more_thuente
        >>> search = more_thuente()
        >>> phi = lambda t: ((t - 3.0) ** 2, 2 * (t - 3.0))  # value and slope
        >>> state = search.init(*phi(0.0), 1e-3)
        >>> while not state.done:
        ...     state = search.step(state, *phi(float(state.trial)))
        >>> print(round(float(state.trial), 3), int(state.evaluations))
        0.341 5
    """
    words.check_fractions(decrease=decrease, curvature=curvature, interval=interval)
    words.check_evaluations(max_evaluations)
    if not decrease < curvature:
        raise ValueError(f"decrease={decrease}: allowed is less than {curvature=}")
    if not max_step > 0:
        raise ValueError(f"max_step={max_step}: allowed are positive numbers")

    def init(value: Scalar, slope: Scalar, step: Scalar = 1.0) -> MoreThuenteState:
        value, slope, step = words.scalars(value, slope, step)
        start = Point(jnp.zeros_like(value), value, slope)
        finite = jnp.isfinite(value) & jnp.isfinite(slope)
        starts = finite & (slope < 0)
        failure = jnp.where(finite, words.NOT_DESCENT, words.NOT_FINITE)
        wide = jnp.full_like(value, max_step)
        return MoreThuenteState(
            trial=jnp.where(starts, jnp.minimum(step, wide), 0),
            done=~starts,
            status=jnp.where(starts, words.SEARCHING, failure).astype(jnp.int32),
            evaluations=jnp.zeros([], jnp.int32),
            start=start,
            best=start,
            other=start,
            bracketed=jnp.zeros([], bool),
            first_stage=jnp.ones([], bool),
            widths=(wide, 2 * wide),
            ceiling=wide,
            failure=jnp.asarray(words.LOST, jnp.int32),
            verdict=jnp.zeros([], jnp.int32),
        )

    def step(state: MoreThuenteState, value: Scalar, slope: Scalar) -> MoreThuenteState:
        dtype = state.trial.dtype
        now = Point(state.trial, jnp.asarray(value, dtype), jnp.asarray(slope, dtype))
        finite = jnp.isfinite(now.value) & jnp.isfinite(now.slope)
        state = state._replace(evaluations=state.evaluations + 1)
        moved = _choose(finite, narrow(state, now), shrink(state))
        ended = state._replace(done=jnp.ones([], bool), status=state.verdict)
        return _choose(state.verdict != words.SEARCHING, ended, moved)

    def shrink(state: MoreThuenteState) -> MoreThuenteState:
        """Go back from a step that is not finite."""
        trial = state.best.step + (state.trial - state.best.step) / 10
        failure = jnp.asarray(words.NOT_FINITE, jnp.int32)
        shorter = state._replace(ceiling=state.trial, trial=trial, failure=failure)
        stuck = state.trial - state.best.step <= interval * state.trial
        return give_up(shorter, state.trial, stuck, finite=False)

    def narrow(state: MoreThuenteState, now: Point) -> MoreThuenteState:
        """Take in a finite point, and stop or choose the next step."""
        level = words.noise(state.start.value, value_rtol)
        failure = words.failure(state.start, now, level, state.failure)
        trusted = failure != words.INCONSISTENT
        now = words.see_through_noise(state.start, now, level, trusted)
        required = decrease * state.start.slope
        enough = now.value <= state.start.value + now.step * required
        flat = jnp.abs(now.slope) <= curvature * -state.start.slope
        at_limit = (now.step >= max_step) & enough & (now.slope <= required)
        found = state._replace(
            done=jnp.ones([], bool),
            status=jnp.where(flat, words.FOUND, words.DECREASED).astype(jnp.int32),
        )

        first_stage = state.first_stage & ~(enough & (now.slope >= 0))
        # In the first stage a point that is low, but not low enough, is judged by how
        # far it lies above the line of sufficient decrease.
        tilt = jnp.where(first_stage & ~enough & (now.value <= state.best.value), 1, 0)
        trial, best, other, bracketed = _interpolate(
            _tilt(state.best, -tilt * required),
            _tilt(state.other, -tilt * required),
            _tilt(now, -tilt * required),
            state.bracketed,
            _limits(state, now),
        )
        best, other = (_tilt(p, tilt * required) for p in (best, other))

        width = jnp.abs(other.step - best.step)
        slow = bracketed & (width >= 0.66 * state.widths[1])
        trial = jnp.where(slow, best.step + (other.step - best.step) / 2, trial)
        widths = jnp.where(bracketed, width, state.widths[0])
        widths = widths, jnp.where(bracketed, state.widths[0], state.widths[1])
        low = jnp.minimum(best.step, other.step)
        high = jnp.where(bracketed, jnp.maximum(best.step, other.step), state.ceiling)
        halfway = (best.step + high) / 2
        limited = high < max_step  # by a bracket, or by a step that was not finite
        trial = jnp.where(limited & ~((trial > low) & (trial < high)), halfway, trial)
        trial = jnp.minimum(trial, max_step)
        narrowed = jnp.where(bracketed, high - low, high - best.step)
        stuck = limited & (narrowed <= interval * high)
        stuck |= bracketed & ((trial <= low) | (trial >= high))
        moved = state._replace(
            trial=trial,
            best=best,
            other=other,
            bracketed=bracketed,
            first_stage=first_stage,
            widths=widths,
            failure=failure,
        )
        moved = give_up(moved, now.step, stuck, finite=True)
        return _choose(enough & (flat | at_limit), found, moved)

    def give_up(
        state: MoreThuenteState, last: jax.Array, stuck: jax.Array, finite: bool
    ) -> MoreThuenteState:
        """End with the best step where nothing more can be gained, or paid for."""
        ends = stuck | (state.evaluations >= max_evaluations)
        lower = (state.best.step > 0) & (state.best.value < state.start.value)
        verdict = jnp.where(lower, words.DECREASED, state.failure).astype(jnp.int32)
        step = jnp.where(lower, state.best.step, 0)
        at_once = jnp.asarray(finite) & (step == last)
        ended = state._replace(
            trial=step,
            done=at_once,
            status=jnp.where(at_once, verdict, words.SEARCHING).astype(jnp.int32),
            verdict=verdict,
        )
        return _choose(ends, ended, state)

    return LineSearch(jax.jit(init), jax.jit(step))


def _choose(
    condition: jax.Array, a: MoreThuenteState, b: MoreThuenteState
) -> MoreThuenteState:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _tilt(point: Point, slope: jax.Array) -> Point:
    """Add a line through the origin."""
    return Point(point.step, point.value + point.step * slope, point.slope + slope)


def _limits(state: MoreThuenteState, now: Point) -> tuple[jax.Array, jax.Array]:
    """Where the next step may lie."""
    a, b = state.best.step, state.other.step
    low = jnp.where(state.bracketed, jnp.minimum(a, b), now.step + 1.1 * (now.step - a))
    high = jnp.where(state.bracketed, jnp.maximum(a, b), now.step + 4 * (now.step - a))
    return low, high


def _cubic(a: Point, b: Point) -> tuple[jax.Array, jax.Array]:
    """Give `r`: the cubic through both has its minimiser at `b + r (a - b)`.

    Also whether the cubic has one that lies beyond `b`, or anywhere at all.
    """
    theta = 3 * (a.value - b.value) / (b.step - a.step) + a.slope + b.slope
    scale = jnp.maximum(jnp.maximum(jnp.abs(theta), jnp.abs(a.slope)), jnp.abs(b.slope))
    scaled = (theta / scale) ** 2 - (a.slope / scale) * (b.slope / scale)
    root = scale * jnp.sqrt(jnp.maximum(scaled, 0))
    root = jnp.where(b.step > a.step, -root, root)
    r = (root - b.slope + theta) / (root - b.slope + root + a.slope)
    return r, (r < 0) & (root != 0)


def _interpolate(
    best: Point,
    other: Point,
    now: Point,
    bracketed: jax.Array,
    limits: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, Point, Point, jax.Array]:
    """The four cases of Moré and Thuente, section 4 (MINPACK-2's dcstep)."""
    low, high = limits
    away = now.step - best.step
    r, beyond = _cubic(best, now)
    cubic = now.step - r * away
    secant = now.step + now.slope / (now.slope - best.slope) * -away

    # 1. A higher value: the minimum is bracketed. The cubic, or halfway to the
    # quadratic if that is closer to the best step.
    drop = (best.value - now.value) / away + best.slope
    quadratic = best.step + best.slope / drop / 2 * away
    closer = jnp.abs(cubic - best.step) < jnp.abs(quadratic - best.step)
    higher = jnp.where(closer, cubic, cubic + (quadratic - cubic) / 2)

    # 2. A lower value and a slope of the other sign: bracketed too. The farther.
    farther = jnp.abs(cubic - now.step) > jnp.abs(secant - now.step)
    opposite = jnp.where(farther, cubic, secant)

    # 3. Lower, same sign, flatter: the cubic if it has a minimum beyond this step.
    edge = jnp.where(away > 0, high, low)
    reach = jnp.where(beyond, cubic, edge)
    nearer = jnp.abs(reach - now.step) < jnp.abs(secant - now.step)
    inside = jnp.where(nearer, reach, secant)
    guard = now.step + 0.66 * (other.step - now.step)
    inside = jnp.where(away > 0, jnp.minimum(guard, inside), jnp.maximum(guard, inside))
    outside = jnp.clip(jnp.where(nearer, secant, reach), low, high)
    flatter = jnp.where(bracketed, inside, outside)

    # 4. Lower, same sign, no flatter: towards the other end, or as far as allowed.
    r_other, _ = _cubic(other, now)
    towards = now.step + r_other * (other.step - now.step)
    steeper = jnp.where(bracketed, towards, edge)

    is_higher = now.value > best.value
    is_opposite = now.slope * jnp.sign(best.slope) < 0
    is_flatter = jnp.abs(now.slope) < jnp.abs(best.slope)
    trial = jnp.where(
        is_higher,
        higher,
        jnp.where(is_opposite, opposite, jnp.where(is_flatter, flatter, steeper)),
    )

    def choose(condition: jax.Array, a: Point, b: Point) -> Point:
        return Point(*(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True)))

    swap = choose(is_opposite, best, other)
    return (
        trial,
        choose(is_higher, best, now),
        choose(is_higher, now, swap),
        bracketed | is_higher | is_opposite,
    )
