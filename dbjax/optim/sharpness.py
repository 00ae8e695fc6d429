r"""How large a learning rate is stable: curvature, and the limit that a delay sets.

Along a direction of curvature :math:`\lambda`, SGD whose gradients are :math:`\tau`
updates old is the recursion :math:`w_{t+1} = w_t - \eta \lambda w_{t-\tau}`. What
decides is :math:`\eta \lambda` and :math:`\tau`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dbjax import trees
from dbjax.typing import Batch, LossFn, Params

_TINY = 1e-30  # keeps a loss without curvature from 0 / 0


def sharpness(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    scale: Params | None = None,
    iterations: int = 40,
) -> jax.Array:
    r"""Find the largest curvature of a loss, by power iteration.

    .. math::
      v \leftarrow A v / |A v|, \qquad A = D^{1/2} H D^{1/2}

    with the Hessian H, by products with vectors, and the diagonal D of `scale`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`.
      params: where.
      batch: the examples; more of them than in a minibatch, as a rule.
      scale: the positive rate of each coordinate's step, as Adagrad has it, shaped like
        `params`; ones if not given.
      iterations: products with the Hessian. Too few give too little, never too much.

    Returns:
      The largest eigenvalue in size of `scale * Hessian`, a scalar. Pure: jit it where
      it is called often.

    Raises:
      ValueError: `iterations` is below 1.

    >>> loss = lambda w, batch: 1.5 * w[0] ** 2 + 0.5 * batch * w[1] ** 2
    >>> print(sharpness(loss, jnp.ones(2), 2.0).round(4))
    3.0
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: allowed are 1 and more")
    scale = jax.tree.map(jnp.ones_like, params) if scale is None else scale
    root = jax.tree.map(jnp.sqrt, scale)

    def gradient(at: Params) -> Params:
        return jax.grad(loss_fn)(at, batch)

    def multiply(_: Any, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        scaled = jax.tree.map(jnp.multiply, root, carry[0])
        _, product = jax.jvp(gradient, (params,), (scaled,))
        product = jax.tree.map(jnp.multiply, root, product)
        size = trees.norm(product)
        least = jnp.maximum(size, _TINY)
        return jax.tree.map(lambda x: x / least.astype(x.dtype), product), size

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    start = structure.unflatten(
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    )
    carry = multiply(0, (start, jnp.zeros([])))
    return lax.fori_loop(0, iterations, multiply, carry)[1]


def stability_limit(delay: Any, momentum: float = 0.0) -> np.ndarray:
    r"""Give the largest stable learning rate times curvature of SGD with old gradients.

    .. math::
      \eta \lambda < 2 \sin \frac{\pi}{2 (2 \tau + 1)}

    With momentum m, :math:`w_{t+1} = w_t + m (w_t - w_{t-1}) - \eta \lambda w_{t-\tau}`
    begins to oscillate for ever where a root of its characteristic polynomial is
    :math:`e^{i \theta}`; the first such :math:`\theta` is found by bisection.

    Args:
      delay: tau, the constant staleness; numbers from 0, of any shape.
      momentum: m, from 0 to below 1, as in `optax.sgd`.

    Returns:
      The limit of eta times lambda, shaped like `delay`.

    Raises:
      ValueError: a delay is negative, or momentum out of range.

    Source: Levin and May 1976, "A note on difference-delay equations", for the formula;
    with momentum it is ours, from the same polynomial.

    >>> stability_limit([0, 1, 10]).round(3)
    array([2.   , 1.   , 0.149])
    >>> float(stability_limit(0, momentum=0.9).round(3))
    3.8
    """
    tau = np.asarray(delay, float)
    if not np.all(tau >= 0):
        raise ValueError(f"delay={delay}: allowed are 0 and more")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: allowed is 0 to below 1")
    if momentum == 0:
        return 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
    low, high = np.zeros_like(tau), np.full_like(tau, np.pi)
    for _ in range(60):  # the angle below grows from -pi / 2
        middle = (low + high) / 2
        real, imaginary = _side(middle, momentum)
        early = tau * middle < np.arctan2(imaginary, real)
        low, high = np.where(early, middle, low), np.where(early, high, middle)
    return 2 * np.sin(high / 2) * np.hypot(*_side(high, momentum))


def _side(theta: np.ndarray, momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """Real and negative imaginary part of (1 + m - z - m / z) / (2 sin(theta / 2))."""
    half = theta / 2
    return (1 + momentum) * np.sin(half), (1 - momentum) * np.cos(half)
