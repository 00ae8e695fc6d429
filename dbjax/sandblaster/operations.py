"""Functions of vectors, coefficient by coefficient, that shards know by name.

Each takes arrays of one shape, then numbers, and gives an array of that shape; none
looks at another coefficient, so the result does not depend on the split over shards.
For OWL-QN see Andrew and Gao, "Scalable training of L1-regularized log-linear models",
ICML 2007, section 3.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Operation(NamedTuple):
    """A function and how many vectors and numbers it takes."""

    function: Callable[..., Array]
    vectors: int
    scalars: int = 0


def pseudo_gradient(x: Array, g: Array, weight: Array) -> Array:
    r"""The steepest one-sided derivative of `f(x) + weight |x|_1`.

    `g + weight sign(x)` where `x` is not 0; there it is `g + weight` if that is
    negative, `g - weight` if that is positive, and 0 between (equation 4).
    """
    at_zero = jnp.sign(g) * jnp.maximum(jnp.abs(g) - weight, 0)
    return jnp.where(x == 0, at_zero, g + weight * jnp.sign(x))


def orthant(x: Array, pseudo: Array) -> Array:
    """The signs to stay with: those of `x`, and where it is 0 those of the descent."""
    return jnp.where(x == 0, -jnp.sign(pseudo), jnp.sign(x))


def align(direction: Array, pseudo: Array, weight: Array) -> Array:
    """The direction, but 0 where it does not descend along a penalised coefficient."""
    off = (weight > 0) & (direction * pseudo >= 0)
    return jnp.where(off, jnp.zeros_like(direction), direction)


def project_orthant(x: Array, signs: Array, weight: Array) -> Array:
    """`x`, but 0 where a penalised coefficient has not the given sign."""
    crossed = (weight > 0) & (jnp.sign(x) != signs)
    return jnp.where(crossed, jnp.zeros_like(x), x)


def weigh(x: Array, weight: Array) -> Array:
    """What times `x` is `weight |x|`."""
    return weight * jnp.sign(x)


def free_gradient(x: Array, g: Array, lower: Array, upper: Array) -> Array:
    """The gradient, but 0 where a bound is reached and descent would cross it."""
    return free_direction(g, x, g, lower, upper)


def free_direction(d: Array, x: Array, g: Array, lower: Array, upper: Array) -> Array:
    """The direction, but 0 where `free_gradient` is 0 for that reason."""
    held = ((x <= lower) & (g > 0)) | ((x >= upper) & (g < 0))
    return jnp.where(held, jnp.zeros_like(d), d)


def where_moved(y: Array, s: Array) -> Array:
    """`y` where `s` is not 0, and 0 elsewhere."""
    return jnp.where(s == 0, jnp.zeros_like(y), y)


OPERATIONS = {
    # Not a combination with coefficients 0, which would keep NaN.
    "zero": Operation(jnp.zeros_like, 1),
    "multiply": Operation(jnp.multiply, 2),
    "sign": Operation(jnp.sign, 1),
    "clip": Operation(lambda x, lower, upper: jnp.clip(x, lower, upper), 3),
    "free_gradient": Operation(free_gradient, 4),
    "free_direction": Operation(free_direction, 5),
    "where_moved": Operation(where_moved, 2),
    "pseudo_gradient": Operation(pseudo_gradient, 3),
    "weigh": Operation(weigh, 2),
    "orthant": Operation(orthant, 2),
    "align": Operation(align, 3),
    "project_orthant": Operation(project_orthant, 3),
}
