"""`minimize`: Sandblaster, emulated, on threads or on Ray, from loss to parameters."""

import os

from jax.sharding import Mesh

from dbjax.mesh import Rules
from dbjax.runtime.emulated import Emulated
from dbjax.runtime.ray import Ray
from dbjax.runtime.threads import Threads
from dbjax.sandblaster.arguments import check_arguments
from dbjax.sandblaster.batches import Batches, FullBatch
from dbjax.sandblaster.methods import LBFGS, Method
from dbjax.sandblaster.problem import PortionData
from dbjax.sandblaster.remote import processes_of
from dbjax.sandblaster.run import Run
from dbjax.sandblaster.running import Running
from dbjax.typing import EvalFn, LossFn, Params


def minimize(
    loss_fn: LossFn,
    params: Params,
    data: PortionData,
    *,
    method: Method = LBFGS(),  # noqa: B008
    batches: Batches = FullBatch(),  # noqa: B008
    replicas: int = 1,
    shards: int = 1,
    iterations: int = 100,
    tolerance: float = 1e-5,
    push_every: int = 4,
    strategy: str = "backups",
    copies: int = 4,
    split: str = "even",
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
    r"""Minimise the loss of all data with a distributed batch method.

    .. math::
      f(w) = \sum_p n_p f_p(w) \Big/ \sum_p n_p

    over portions `p` of `n_p` examples, which a coordinator hands out to replicas. It
    sees scalars only: parameters, gradients and the method's history stay on the
    shards, or on the devices of a mesh (the paper, section 4.2 and appendix, algorithm
    1.2). To begin where SGD or Downpour ended, give `params=run.params`.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch; with `rng`
        it takes a key as third argument, with `has_aux` it returns `(loss, aux)`.
      params: any pytree of float arrays.
      data: gives `num_portions` and `portion(i)`; see `from_arrays`.
      method: `LBFGS()`, `GradientDescent()`, `ConjugateGradient()`, `OWLQN(l1)`,
        `BoxLBFGS(lower, upper)`.
      batches: `FullBatch()`, `MultiBatch(portions)` or `ProgressiveBatch(portions)`.
      replicas: number of model replicas.
      shards: number of shards that vectors are cut over.
      iterations: steps at most.
      tolerance: converged when the gradient's Euclidean norm is not above this.
      push_every: portions that a replica sums before it sends the sum to the shards.
      strategy: `"backups"`: portions with backup copies; `"portions"`: without;
        `"static"`: each replica computes its own `1 / replicas` of the batch.
      copies: replicas that may compute one portion at the same time.
      split: "even" cuts large leaves over shards, "leaf" keeps every leaf whole.
      rng: see `loss_fn`; a portion's key stays the same for all of the run.
      has_aux: see `loss_fn`.
      seed: seed of the loss's keys.
      mesh: devices that vectors are spread over, instead of shards; each portion is
        spread over all of them too, if they divide its examples.
      rules: how parameters lie on the mesh, see `dbjax.shard_params`.
      eval_fn: `eval_fn(params, iteration, time) -> {name: scalar}`.
      eval_every: iterations between evaluations; the end is always evaluated.
      checkpoint_dir: where to save, and where to go on from.
      checkpoint_every: iterations between checkpoints; a tenth of them by default.
      runtime: `Emulated(cluster, seed)`, the default, `Threads()` or `Ray()`.

    Returns:
      The run: `params`, `value`, `status`, `iterations`, `evaluations`, `trace`, ...

    Raises:
      ValueError: naming the argument, its value, and what is allowed.
      TypeError: `loss_fn`, `data` or `method` is not what it should be.
      ReplicaError: a replica failed too often; names replica and portion.
      ShardError: on Ray, a shard's process is gone.

    >>> import jax.numpy as jnp, numpy as np, optax, dbjax
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)
    >>> data = dbjax.from_arrays({"x": x, "y": 3 * x}, batch_size=8)
    >>> loss = lambda p, b: jnp.mean((p["w"] * b["x"] - b["y"]) ** 2)
    >>> run = minimize(loss, {"w": jnp.zeros(())}, data, replicas=4)
    >>> print(run.status, round(float(run.params["w"]), 4))
    converged 3.0

    SGD first, which is fast at the start, and then L-BFGS, which is so at the end:

    >>> start = {"w": jnp.zeros(())}
    >>> warm = dbjax.downpour.train(
    ...     loss, start, data, optimizer=optax.sgd(0.1), replicas=4, steps=16
    ... )
    >>> run = minimize(loss, warm.params, data, replicas=4)
    >>> print(run.status, round(float(run.params["w"]), 4))
    converged 3.0
    """
    arguments = check_arguments(
        method=method, batches=batches, replicas=replicas, shards=shards,
        iterations=iterations, tolerance=tolerance, push_every=push_every,
        strategy=strategy, copies=copies, split=split, seed=seed, mesh=mesh,
        rules=rules, eval_fn=eval_fn, eval_every=eval_every,
        checkpoint_dir=checkpoint_dir, checkpoint_every=checkpoint_every,
        runtime=Emulated() if runtime is None else runtime,
    )  # fmt: skip
    with processes_of(arguments.runtime, replicas, shards) as processes:
        return Running(
            loss_fn, params, data, arguments, rng=rng, has_aux=has_aux,
            processes=processes,
        ).to_the_end()  # fmt: skip
