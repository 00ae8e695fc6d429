"""What the methods on `dbjax.downpour.train` have in common."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

import dbjax
from dbjax.downpour.run import Run
from dbjax.trace import Trace
from dbjax.typing import Batch, Params
from experiments import registry
from experiments.methods.base import Plan, Session
from experiments.workloads import Workload


def plan(
    config: ml_collections.ConfigDict,
    workload: Workload,
    *,
    optimizer: optax.GradientTransformation,
    copies: int,
    simulate: Callable[[int], Trace],
) -> Plan:
    """Say what `config.steps` minibatches would take.

    Args:
      config: of the run.
      workload: what is trained.
      optimizer: the rule that is run.
      copies: of the parameters, held at once at most.
      simulate: `simulate(steps) -> trace`, the order of the run without its training.

    Returns:
      The plan.

    Raises:
      ValueError: the order cannot be: replicas, shards, n_push, ...
    """
    simulate(1)
    shapes = jax.eval_shape(workload.init, config.seed)
    return Plan(
        steps=config.steps,
        evaluations=config.steps // config.eval_every + 1,
        copies=copies,
        state=num_bytes(jax.eval_shape(optimizer.init, shapes)),
        # A checkpoint between two fetches holds what the replicas compute on, too.
        saved=copies,
        work=functools.partial(_work, optimizer, workload, config.seed),
        count=config.steps,
        clock=lambda: simulate(config.steps).duration(),
        batch_size=workload.batch_size,
    )


def train(
    config: ml_collections.ConfigDict,
    workload: Workload,
    session: Session,
    **options: Any,
) -> Run:
    """Call `dbjax.downpour.train` with what all methods on it have in common.

    Args:
      config: of the run.
      workload: what is trained.
      session: lent by `train.py`.
      **options: the method's own arguments.

    Returns:
      The run.
    """
    return dbjax.downpour.train(
        workload.loss,
        workload.init(config.seed),
        workload.data,
        steps=config.steps,
        eval_fn=session.evaluate,
        eval_every=config.eval_every,
        checkpoint_dir=session.checkpoints,
        checkpoint_every=config.checkpoint_every,
        **options,
    )


def check_shards(part: str, shards: int, workload: Workload) -> None:
    """Raise if there are more shards than parameters.

    Args:
      part: of the config, for the error.
      shards: how many there should be.
      workload: what is trained.

    Raises:
      registry.ConfigError: there are too many.
    """
    if shards > workload.num_parameters:
        raise registry.ConfigError(
            f"{part}.shards is {shards}, more than the "
            f"{workload.num_parameters:,} parameters of {workload.name}."
        )


def num_bytes(tree: Any) -> int:
    """Add up the bytes of a tree of arrays, or of their shapes."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _work(
    optimizer: optax.GradientTransformation, workload: Workload, seed: int
) -> Callable[[int], None]:
    """Give the plain loop's step: batch, gradient and update."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, batch: Batch) -> Any:
        gradients = jax.grad(workload.loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = workload.init(seed)
    carry = params, optimizer.init(params)

    def do(i: int) -> None:
        nonlocal carry
        carry = update(*carry, workload.data.batch(0, i))
        jax.block_until_ready(carry)

    return do
