"""What the methods on `dbjax.downpour.train` have in common."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from jax.sharding import Mesh

import dbjax
from dbjax.downpour.run import Run
from dbjax.runtime.launch import launch
from dbjax.server.placement import Placement
from dbjax.trace import Trace
from dbjax.typing import Batch, Params
from experiments import meshes, registry
from experiments.methods.base import Plan, Session
from experiments.workloads import Workload


def plan(
    config: ml_collections.ConfigDict,
    workload: Workload,
    *,
    optimizer: optax.GradientTransformation,
    copies: int,
    simulate: Callable[[int], Trace],
    mesh: Mesh | None = None,
) -> Plan:
    """Say what `config.steps` minibatches would take.

    Args:
      config: of the run.
      workload: what is trained.
      optimizer: the rule that is run.
      copies: of the parameters, held at once at most.
      simulate: `simulate(steps) -> trace`, the order of the run without its training.
      mesh: the devices that one copy of the parameters lies on, where it is not one.

    Returns:
      The plan.

    Raises:
      ValueError: the order cannot be: replicas, shards, n_push, ...
    """
    simulate(1)
    return Plan(
        steps=config.steps,
        evaluations=config.steps // config.eval_every + 1,
        copies=copies,
        optimizer=optimizer,
        # A checkpoint between two fetches holds what the replicas compute on, too.
        saved=copies,
        work=functools.partial(_work, optimizer, workload, config.seed, mesh),
        count=config.steps,
        clock=lambda: simulate(config.steps).duration(),
        batch_size=workload.batch_size,
        mesh=mesh,
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
    init = functools.partial(workload.init, config.seed)
    return dbjax.downpour.train(
        workload.loss,
        # On a mesh they are made where they belong, never whole on one device.
        init if "mesh" in options else init(),
        workload.data,
        steps=config.steps,
        eval_fn=session.evaluate,
        eval_every=config.eval_every,
        checkpoint_dir=session.checkpoints,
        checkpoint_every=config.checkpoint_every,
        **options,
    )


def check_shards(
    part: str, shards: int, workload: Workload, mesh: Mesh | None = None
) -> None:
    """Raise if there are more shards than parameters, or they do not fit partitions.

    Args:
      part: of the config, for the error.
      shards: how many there should be.
      workload: what is trained.
      mesh: the devices of a replica, over which it is partitioned.

    Raises:
      registry.ConfigError: there are too many.
      ValueError: the workload's rules do not fit the mesh, or the shards do not.
    """
    if shards > workload.num_parameters:
        raise registry.ConfigError(
            f"{part}.shards is {shards}, more than the "
            f"{workload.num_parameters:,} parameters of {workload.name}."
        )
    if mesh is not None:
        Placement.of(jax.eval_shape(workload.init, 0), shards, mesh, workload.rules)


def num_bytes(tree: Any) -> int:
    """Add up the bytes of a tree of arrays, or of their shapes."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _work(
    optimizer: optax.GradientTransformation,
    workload: Workload,
    seed: int,
    mesh: Mesh | None,
) -> Callable[[int], None]:
    """Give the plain loop's step: batch, gradient and update."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, batch: Batch) -> Any:
        gradients = jax.grad(workload.loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    init, call = functools.partial(workload.init, seed), lambda f, *args: f(*args)
    if mesh is not None:
        where = meshes.shardings(workload, mesh, seed)
        init, call = jax.jit(init, out_shardings=where), functools.partial(launch, mesh)
    params = call(init)
    carry = params, call(jax.jit(optimizer.init), params)

    def do(i: int) -> None:
        nonlocal carry
        batch = workload.data.batch(0, i)
        if mesh is not None:
            batch = meshes.place_batch(batch, mesh, workload)
        carry = jax.block_until_ready(call(update, *carry, batch))

    return do
