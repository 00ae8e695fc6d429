"""Transformations for shards that apply several pushes at once, or positions.

Letters: `N` pushes that belong together, `g` what one of them carries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbjax.typing import Params
from dbjax.whole import whole


def softsync(
    optimizer: optax.GradientTransformation, pushes: int
) -> optax.GradientTransformation:
    """Gather so many pushes, and apply their mean at once.

    `w <- w + update(mean of g_1, ..., g_N)` with every N-th push.

    Args:
      optimizer: what is applied.
      pushes: N; with 1 every push is applied as it comes. With as many as replicas
        behind the barrier of `synchronous` it is their mean gradient that is applied.

    Returns:
      The transformation. What has not been applied stays in its state: choose a number
      of pushes that N divides.

    Raises:
      ValueError: `pushes` is no positive integer.

    Source: Gupta and others 2016 (arXiv 1509.04210, n-softsync: N is the number of
    learners over n).

    >>> tx = softsync(optax.sgd(1.0), 2)
    >>> state = tx.init(jnp.zeros(()))
    >>> updates, state = tx.update(jnp.float32(1), state)
    >>> float(tx.update(jnp.float32(3), state)[0])
    -2.0
    """
    count = whole("pushes", pushes, 1)
    return optax.MultiSteps(optimizer, count).gradient_transformation()


class DelayedNesterovState(NamedTuple):
    """The momentum, and sum and number of the pushes since it last moved."""

    momentum: Params
    gathered: Params
    count: jax.Array


def delayed_nesterov(
    learning_rate: float, momentum: float, pushes: int
) -> optax.GradientTransformation:
    """Apply each push at once, and momentum with every N-th one only.

    `w <- w - rate g / N`; with every N-th push also `m <- momentum m + mean of the N`
    and `w <- w - rate momentum m`.

    Args:
      learning_rate: the rate.
      momentum: how much of the momentum is kept; 0 is plain SGD with `rate / N`.
      pushes: N; with 1 it is `optax.sgd(rate, momentum, nesterov=True)`.

    Returns:
      The transformation.

    Raises:
      ValueError: `pushes` is no positive integer.

    Source: Liu and others 2024 (arXiv 2401.09135, delayed Nesterov), second-hand.

    >>> tx = delayed_nesterov(1.0, 0.5, 2)
    >>> updates, state = tx.update(jnp.float32(2), tx.init(jnp.zeros(())))
    >>> float(updates), float(tx.update(jnp.float32(2), state)[0])
    (-1.0, -2.0)
    """
    n = whole("pushes", pushes, 1)

    def init(params: Params) -> DelayedNesterovState:
        nothing = jax.tree.map(jnp.zeros_like, params)
        return DelayedNesterovState(nothing, nothing, jnp.zeros((), jnp.int32))

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        gathered = jax.tree.map(jnp.add, state.gathered, updates)
        ends = state.count + 1 == n
        new = jax.tree.map(
            lambda m, s: jnp.where(ends, momentum * m + s / n, m),
            state.momentum, gathered,
        )  # fmt: skip
        updates = jax.tree.map(
            lambda g, m: -learning_rate * (g / n + jnp.where(ends, momentum * m, 0)),
            updates, new,
        )  # fmt: skip
        gathered = jax.tree.map(lambda s: jnp.where(ends, 0, s), gathered)
        return updates, DelayedNesterovState(new, gathered, (state.count + 1) % n)

    return optax.GradientTransformation(init, update)


def elastic(alpha: float) -> optax.GradientTransformation:
    """Draw the shards' parameters to a replica that pushes its position.

    `w <- w + alpha (x - w)`

    Args:
      alpha: how far.

    Returns:
      The transformation.

    Raises:
      ValueError: `alpha` is not between 0 and 1.

    Source: Zhang and others 2015 (EASGD, algorithm 1).

    >>> tx = elastic(0.25)
    >>> float(tx.update(jnp.float32(5), tx.init(None), jnp.float32(1))[0])
    1.0
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: allowed is what lies between 0 and 1")

    def update(updates: Params, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda x, w: alpha * (x - w), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
