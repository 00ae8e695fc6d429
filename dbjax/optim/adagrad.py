"""The paper's Adagrad: no epsilon, no initial accumulator, nothing distributed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbjax.typing import Gradients, Params


class ScaleByAdagradState(NamedTuple):
    """The sum of squared gradients so far, shaped like the parameters."""

    sum_of_squares: Params


def scale_by_adagrad() -> optax.GradientTransformationExtraArgs:
    r"""Divide each gradient by the root of its squares' sum (the paper, section 4.1).

    .. math::
      u_{i,K} = \Delta w_{i,K} \Big/ \sqrt{\textstyle\sum_{j=1}^{K} \Delta w_{i,j}^2}

    The sum includes the current gradient, and 0/0 is 0. The sum is kept in float32 for
    16-bit parameters (in bfloat16 it would stop growing after some 256 steps), else in
    the dtype of the parameters; the result has the dtype of the gradient.

    A square must be a normal number of that dtype: in float32 a gradient smaller than
    about 1e-19 counts as zero, and one larger than about 1e19 stops its coordinate.

    Returns:
        An optax transformation with state `ScaleByAdagradState`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax.optim import scale_by_adagrad
        >>> rule = scale_by_adagrad()
        >>> state = rule.init(jnp.zeros(2))
        >>> updates, state = rule.update(jnp.array([3.0, 0.0]), state)
        >>> updates.tolist(), state.sum_of_squares.tolist()
        ([1.0, 0.0], [9.0, 0.0])
    """

    def init(params: Params) -> ScaleByAdagradState:
        return ScaleByAdagradState(
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_sum_dtype(p)), params)
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, ScaleByAdagradState]:
        del params, extra_args
        sums = jax.tree.map(
            lambda g, s: s + jnp.square(g.astype(s.dtype)),
            updates,
            state.sum_of_squares,
        )
        return jax.tree.map(_divide, updates, sums), ScaleByAdagradState(sums)

    return optax.GradientTransformationExtraArgs(init, update)


def adagrad(gamma: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad exactly as DistBelief's shards run it (the paper, section 4.1).

    .. math::
      \eta_{i,K} = \gamma \Big/ \sqrt{\textstyle\sum_{j=1}^{K} \Delta w_{i,j}^2},
      \qquad w_i \leftarrow w_i - \eta_{i,K} \, \Delta w_{i,K}

    A coordinate's first non-zero gradient thus moves it by `gamma`, whatever the size
    of the gradient. `optax.adagrad` is another rule: its sum starts at 0.1 and its
    root holds an epsilon.

    Args:
        gamma: the rate, positive; a number, a schedule (a function of the number of
          updates) or a tracer. Only a concrete number is checked.

    Returns:
        An optax transformation; for the sum of squares see `scale_by_adagrad`.

    Raises:
        ValueError: `gamma` is a number that is not positive and finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax.optim import adagrad
        >>> rule = adagrad(0.5)
        >>> state = rule.init(jnp.zeros(2))
        >>> updates, state = rule.update(jnp.array([4.0, -0.25]), state)
        >>> updates.tolist()
        [-0.5, 0.5]
        >>> updates, state = rule.update(jnp.array([3.0, 0.25]), state)
        >>> [round(u, 3) for u in updates.tolist()]
        [-0.3, -0.354]
    """
    if not callable(gamma) and not isinstance(gamma, jax.core.Tracer):
        if not 0 < float(gamma) < float("inf"):
            raise ValueError(f"gamma={gamma}: allowed are positive finite numbers")
    return optax.chain(scale_by_adagrad(), optax.scale_by_learning_rate(gamma))


def _sum_dtype(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _divide(g: jax.Array, total: jax.Array) -> jax.Array:
    # XLA turns x / sqrt(y) into x * rsqrt(y), which is less exact: a `where` between
    # root and quotient forbids that, and as x / inf = 0, none is needed behind it.
    # Either would round differently in another loop, so on another shard.
    root = jnp.where(total == 0, jnp.inf, jnp.sqrt(total))
    return (g.astype(total.dtype) / root).astype(g.dtype)
