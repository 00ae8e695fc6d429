"""How far asynchrony is from trouble: staleness, run length, and eta x lambda x tau.

A gradient that is `tau` updates old, applied with a rate `eta` along a direction of
curvature `lambda`, is stable for about `eta lambda (2 tau + 1) < pi`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax.typing import Params
from experiments import figure_task
from experiments.figure_task import Task

_EXAMPLES, _ITERATIONS = 4_096, 40


class Regime(NamedTuple):
    """Where a run stands.

    Attributes:
      staleness: the mean, in updates, `tau`.
      of_run: that as a share of the updates that the run makes to the target.
      hours: when it reaches that, or else ends.
      product: `eta lambda tau`.
    """

    staleness: float
    of_run: float
    hours: float
    product: float


def sharpness(task: Task, params: Params, scale: Params | None = None) -> float:
    """Find the largest curvature of the loss, by power iteration.

    Args:
      task: what is trained.
      params: where.
      scale: multiplies each coordinate's step, as Adagrad does; ones if not given.

    Returns:
      The largest eigenvalue in size of `scale * Hessian`.
    """
    training = figure_task.make(task).training
    batch = {name: jnp.array(x[:_EXAMPLES]) for name, x in training._asdict().items()}
    loss = figure_task.loss_of(task)
    scale = jax.tree.map(jnp.ones_like, params) if scale is None else scale
    root = jax.tree.map(jnp.sqrt, scale)

    @jax.jit
    def multiply(direction: Params, batch: Any) -> tuple[Params, jax.Array]:
        scaled = jax.tree.map(jnp.multiply, root, direction)
        gradient = functools.partial(jax.grad(loss), batch=batch)
        _, product = jax.jvp(gradient, (params,), (scaled,))
        product = jax.tree.map(jnp.multiply, root, product)
        size = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(product)))
        return jax.tree.map(lambda x: x / size, product), size

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    start: Any = [
        jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    direction, size = multiply(jax.tree.unflatten(structure, start), batch)
    for _ in range(_ITERATIONS):
        direction, size = multiply(direction, batch)
    return float(size)
