"""`train`: Downpour SGD, emulated, on threads or on Ray, from loss to parameters."""

import os
from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from dbjax.downpour.arguments import check_arguments
from dbjax.downpour.emulate import run_emulated
from dbjax.downpour.live import Live
from dbjax.downpour.problem import make_problem
from dbjax.downpour.protocol import Protocol, asynchronous
from dbjax.downpour.run import Run
from dbjax.mesh import Rules
from dbjax.optim.local import LocalRule
from dbjax.runtime.emulated import Emulated
from dbjax.runtime.ray import Ray
from dbjax.runtime.threads import Threads
from dbjax.typing import Data, EvalFn, LossFn, Params

_ASYNCHRONOUS = asynchronous()


def train(
    loss_fn: LossFn,
    params: Params,
    data: Data,
    *,
    optimizer: optax.GradientTransformation,
    replicas: int = 1,
    shards: int = 1,
    steps: int,
    n_fetch: int | Sequence[int] = 1,
    n_push: int | Sequence[int] = 1,
    overlap: bool = False,
    local_optimizer: optax.GradientTransformation | LocalRule | None = None,
    warmstart_steps: int = 0,
    protocol: Protocol = _ASYNCHRONOUS,
    provide: tuple[str, ...] = (),
    split: str = "even",
    per_shard: bool = False,
    version_dtype: Any = None,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    eval_fn: EvalFn | None = None,
    eval_every: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    runtime: Emulated | Threads | Ray | None = None,
) -> Run:
    """Train with Downpour SGD: replicas run on their own against a sharded server.

    A push carries the sum of the replica's gradients since its last one, and each shard
    `s` applies it at once, `w_s <- w_s + update_s(sum of gradients)`, with its own
    optimizer state and version (the paper, section 4.1 and appendix, algorithm 1.1).

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch; with `rng`
        it takes a key as third argument, with `has_aux` it returns `(loss, aux)`.
      params: any pytree of float arrays; or a function without arguments that makes
        it, so that large ones are never there twice, nor whole on one device.
      data: gives `batch(replica, step)`; see `from_arrays`, `from_iterators`.
      optimizer: any optax transformation; it runs inside each shard.
      replicas: number of model replicas.
      shards: number of shards of the parameter server.
      steps: minibatches processed by all replicas together.
      n_fetch: a replica fetches before every `n_fetch`-th of its minibatches; one
        number, or one for each replica.
      n_push: it pushes after every `n_push`-th, and once more at the end for the rest.
      overlap: fetches and pushes run beside the next minibatch; a fetch lands later.
      local_optimizer: the replica's own step on its parameters between fetches; a
        `LocalRule` also says what it pushes, and what a fetch changes.
      warmstart_steps: steps that replica 0 takes alone, before the others begin.
      protocol: who may go on, and whose push is taken.
      provide: extra arguments for the optimizer's update: "staleness", "stale_params".
      split: "even" cuts large leaves over shards, "leaf" keeps every leaf whole.
      per_shard: accept an optimizer whose result depends on the split.
      version_dtype: keep fetched versions in this dtype, say bfloat16, to save memory.
      rng: see `loss_fn`.
      has_aux: see `loss_fn`.
      seed: seed of the loss's keys.
      mesh: devices that each replica is partitioned over. Along an axis "replica" each
        has devices of its own; replicas without take turns on those of others. An
        emulated run needs those of one replica only.
      rules: how parameters lie on a replica's devices, see `dbjax.shard_params`. Shards
        are cut alike, so their number is a multiple or a divisor of the partitions'.
      eval_fn: `eval_fn(params, step, time) -> {name: scalar}`.
      eval_every: minibatches between evaluations; the end is always evaluated.
      checkpoint_dir: where to save, and where to go on from.
      checkpoint_every: minibatches between checkpoints; a tenth of `steps` by default.
      runtime: `Emulated(cluster, seed)`, the default, `Threads()` or `Ray()`.

    Returns:
      The run: `params`, `optimizer_state` (one entry per shard), `trace`, `info`.

    Raises:
      ValueError: naming the argument, its value, and what is allowed.
      TypeError: `loss_fn`, `data` or an optimizer is not what it should be.
      RejectedTooOften: training has come apart.
      ReplicaError: a replica's thread failed; names replica and step.

    >>> import jax.numpy as jnp, numpy as np, optax, dbjax
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)
    >>> data = dbjax.from_arrays({"x": x, "y": 3 * x}, batch_size=8)
    >>> loss = lambda p, b: jnp.mean((p["w"] * b["x"] - b["y"]) ** 2)
    >>> run = train(loss, {"w": jnp.zeros(())}, data, optimizer=optax.sgd(0.1),
    ...             replicas=4, steps=200)
    >>> round(float(run.params["w"]), 2)
    3.0
    """
    runtime = Emulated() if runtime is None else runtime
    arguments = check_arguments(
        replicas=replicas, shards=shards, steps=steps, n_fetch=n_fetch, n_push=n_push,
        overlap=overlap, warmstart_steps=warmstart_steps, protocol=protocol,
        eval_fn=eval_fn, eval_every=eval_every, checkpoint_every=checkpoint_every,
        checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    problem = make_problem(
        loss_fn, params, data, optimizer=optimizer, shards=arguments.shards,
        replicas=arguments.replicas, provide=provide, local_optimizer=local_optimizer,
        split=split, per_shard=per_shard, version_dtype=version_dtype, rng=rng,
        has_aux=has_aux, seed=seed, mesh=mesh, rules=rules,
    )  # fmt: skip
    if isinstance(runtime, Emulated):
        return run_emulated(problem, arguments, runtime)
    if isinstance(runtime, Threads | Ray):
        return Live(problem, arguments, runtime, split).run()
    raise ValueError(
        f"runtime must be Emulated(...), Threads(...) or Ray(...), got {runtime!r}"
    )
