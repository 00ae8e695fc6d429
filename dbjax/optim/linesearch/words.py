"""What every line search shares: its shape, its statuses and its final reckoning.

A line search is a pure state machine over scalars. `init(value, slope, step)` takes the
value and the slope at step 0 and the first step to try; then, until `state.done`, the
caller evaluates at `state.trial` and calls `step(state, value, slope)`. In the end
`state.trial` is the step to take, and unless `state.evaluations` is 0 it is also the
step evaluated last, so nobody needs to keep two gradients; it is 0 if nothing better
than the start was found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

# Of a search: what it found. Of its callers: see `status`.
SEARCHING = 0
FOUND = 1
"""The step meets the search's conditions."""
DECREASED = 2
"""The value falls, but no step tried meets all conditions."""
FAILED = 3
"""No step tried has a smaller value."""
NOT_DESCENT = 4
"""The slope at the start is not negative; nothing was evaluated."""
NOT_FINITE = 5
"""The start, or every step tried, has a value or slope that is not finite."""
INCONSISTENT = 6
"""No smaller value, and slopes that say there is: the gradient is not the value's."""
LOST = 7
"""No smaller value, and slopes that say there is, but no more than rounding hides."""


class SearchState(Protocol):
    """What callers read of any search's state; all are scalars."""

    @property
    def trial(self) -> jax.Array:
        """The step to evaluate at; when done, the step to take."""
        ...

    @property
    def done(self) -> jax.Array:
        """Whether the search has ended."""
        ...

    @property
    def status(self) -> jax.Array:
        """Int32, one of the constants above."""
        ...

    @property
    def evaluations(self) -> jax.Array:
        """Int32, evaluations so far."""
        ...


Scalar: TypeAlias = Any


class LineSearch(NamedTuple):
    """A line search: two pure functions of scalars.

    Attributes:
        init: `init(value, slope, step) -> state`.
        step: `step(state, value, slope) -> state`.
    """

    init: Callable[[Scalar, Scalar, Scalar], Any]
    step: Callable[[Any, Scalar, Scalar], Any]


class Point(NamedTuple):
    """A step, and the value and the slope there."""

    step: jax.Array
    value: jax.Array
    slope: jax.Array


def scalars(value: Scalar, slope: Scalar, step: Scalar) -> list[jax.Array]:
    """Give all three in one dtype, float32 at least, float64 if one of them is."""
    arrays = [jnp.asarray(x) for x in (value, slope, step)]
    strong = [x.dtype for x in arrays if not x.weak_type]
    dtype = jnp.result_type(jnp.float32, *strong)
    return [jax.lax.convert_element_type(x, dtype) for x in arrays]


def noise(value: jax.Array, value_rtol: float | None = None) -> jax.Array:
    """Give how far values near this one may differ by rounding alone.

    The default is `eps^(3/4)` of the value, 6e-6 in float32 and 2e-12 in float64. A sum
    of squared residuals is small where its terms have cancelled, so it is rounded by
    far more than its own epsilon.
    """
    if value_rtol is None:
        value_rtol = float(jnp.finfo(value.dtype).eps) ** 0.75
    return value_rtol * jnp.abs(value)


def see_through_noise(
    start: Point, now: Point, level: jax.Array, trusted: jax.Array
) -> Point:
    """Replace a value whose change is lost in rounding by one made from the slopes.

    The trapezoid `value0 + step (slope0 + slope) / 2` is consistent with the slopes, to
    which rounding does much less harm. Sufficient decrease then reads `slope <= (2
    c1 - 1) slope0`: the approximate Wolfe condition of Hager and Zhang (2005), 4.1.
    Not where the slopes are not to be trusted.
    """
    change = jnp.abs(now.value - start.value)
    lost = (change <= level) & (now.step * jnp.abs(start.slope) <= 100 * level)
    trapezoid = start.value + now.step * (start.slope + now.slope) / 2
    return now._replace(value=jnp.where(lost & trusted, trapezoid, now.value))


def failure(start: Point, now: Point, level: jax.Array, before: jax.Array) -> jax.Array:
    """Give the status to end with if nothing better than this step is found.

    If the slope has hardly changed the value must fall, or one of the two is wrong:
    the value by rounding, or else the gradient. A wrong gradient is wrong by some
    factor, however short the step; rounding shows as a rise out of all proportion to
    the slope, or as a change too small to tell, which leaves an earlier verdict.
    """
    change = now.value - start.value
    falls = (now.slope < 0) & (jnp.abs(now.slope - start.slope) <= -start.slope / 2)
    rises = (change > 0) & (change <= -100 * now.step * start.slope)
    told = jnp.abs(change) > 100 * level
    inconsistent = jnp.where(told, falls & rises, before == INCONSISTENT)
    verdict = jnp.where(falls, LOST, FAILED)
    verdict = jnp.where(inconsistent, INCONSISTENT, verdict)
    same = (change == 0) & (now.slope == start.slope)  # no parameter has moved
    return jnp.where(same, before, verdict).astype(jnp.int32)


def check_fractions(**limits: float) -> None:
    """Check constants of sufficient decrease and curvature at construction."""
    for name, value in limits.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}: allowed are numbers between 0 and 1")


def check_evaluations(max_evaluations: int) -> None:
    """Check the limit at construction."""
    if not max_evaluations >= 1:
        raise ValueError(f"max_evaluations={max_evaluations}: allowed are 1 and more")
