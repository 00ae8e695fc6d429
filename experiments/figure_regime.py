"""How far asynchrony is from trouble: staleness, run length, and eta x lambda x tau.

A gradient that is `tau` updates old, applied with a rate `eta` along a direction of
curvature `lambda`, is stable for about `eta lambda (2 tau + 1) < pi`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dbjax import optim
from dbjax.typing import Params
from experiments import figure_task
from experiments.figure_task import Task

_EXAMPLES = 4_096


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
    """Find the largest curvature of the loss on many examples.

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
    return float(
        jax.jit(functools.partial(optim.sharpness, loss))(params, batch, scale)
    )
