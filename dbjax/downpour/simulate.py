"""`simulate`: cluster and protocol in, Trace out; no gradient is computed.

No protocol sees a value, so the order of a run is known before it trains anything;
`replay` then turns the Trace and a problem into parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dbjax.cluster import Cluster
from dbjax.downpour import free_running
from dbjax.downpour.arguments import Arguments, check_arguments
from dbjax.downpour.program import make_program
from dbjax.downpour.protocol import Protocol, asynchronous
from dbjax.runtime import emulated
from dbjax.trace import Trace
from dbjax.whole import whole

_ASYNCHRONOUS = asynchronous()


def simulate(
    cluster: Cluster,
    *,
    replicas: int,
    shards: int = 1,
    steps: int,
    n_fetch: int | Sequence[int] = 1,
    n_push: int | Sequence[int] = 1,
    seed: int = 0,
    protocol: Protocol = _ASYNCHRONOUS,
    overlap: bool = False,
    warmstart_steps: int = 0,
    parameter_bytes: int | Sequence[int] = 0,
) -> Trace:
    """Simulate a Downpour run on an emulated cluster.

    Args:
      cluster: how long everything takes.
      replicas: number of model replicas.
      shards: number of shards of the parameter server.
      steps: minibatches processed by all replicas together.
      n_fetch: a replica fetches before every `n_fetch`-th of its minibatches; one
        number, or one for each replica.
      n_push: it pushes after every `n_push`-th, and once more at the end for the rest.
      seed: seed of all draws.
      protocol: who may go on, and whose push is taken.
      overlap: whether fetches and pushes run beside the next minibatch.
      warmstart_steps: steps that replica 0 takes alone, before the others begin.
      parameter_bytes: size of each shard, or of all parameters, cut evenly; it counts
        where the cluster's bandwidth is finite.

    Returns:
      The Trace; the same for the same arguments, bit for bit.

    Raises:
      ValueError: naming an argument that is out of range.
      TypeError: for a cluster or protocol that is none.
      RuntimeError: if the protocol lets replicas wait for ever.

    >>> trace = simulate(Cluster(step_time=1.0), replicas=3, steps=6)
    >>> trace.staleness()[:, 0]
    array([0, 1, 2, 2, 2, 2])
    """
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a Cluster; got {cluster!r}.")
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol must be a Protocol; got {protocol!r}.")
    arguments = check_arguments(
        replicas=replicas,
        shards=shards,
        steps=steps,
        n_fetch=n_fetch,
        n_push=n_push,
        overlap=overlap,
        warmstart_steps=warmstart_steps,
        protocol=protocol,
    )
    shard_bytes = _shard_bytes(parameter_bytes, arguments.shards)
    return simulate_run(arguments, cluster, whole("seed", seed, 0), shard_bytes)


def simulate_run(
    arguments: Arguments, cluster: Cluster, seed: int, shard_bytes: tuple[int, ...]
) -> Trace:
    """Simulate a run whose arguments are checked.

    Args:
      arguments: what decides the order of the run.
      cluster: how long everything takes.
      seed: seed of all draws.
      shard_bytes: size of each shard, `[shards]`.

    Returns:
      The Trace.

    Raises:
      RuntimeError: if the protocol lets replicas wait for ever.
    """
    a, columns = arguments, None
    waits = a.overlap or not a.protocol.free_running
    slow = waits or a.protocol.takes or cluster.queues or cluster.fails
    if isinstance(a.n_fetch, int) and isinstance(a.n_push, int) and not slow:
        run = free_running.Run(
            cluster=cluster,
            seed=seed,
            replicas=a.replicas,
            steps=a.steps,
            n_fetch=a.n_fetch,
            n_push=a.n_push,
            warmstart_steps=a.warmstart_steps,
            shard_bytes=shard_bytes,
        )
        columns = free_running.order(run)
    if columns is None:  # or a message overtook another
        columns = emulated.order(make_program(a), cluster, seed, shard_bytes)
    header = {
        **a.describe(),
        "runtime": "Emulated",
        "seed": seed,
        "cluster": repr(cluster),
    }
    return Trace.from_columns(header, **columns)


def _shard_bytes(given: Any, shards: int) -> tuple[int, ...]:
    """Give the size of each shard; one number is cut evenly."""
    if not isinstance(given, Sequence | np.ndarray) or np.ndim(given) == 0:
        share, rest = divmod(whole("parameter_bytes", given, 0), shards)
        return tuple(share + (shard < rest) for shard in range(shards))
    if len(given) != shards:
        raise ValueError(
            f"parameter_bytes must hold a size for each of the {shards} shards, or be "
            f"one number; got {len(given)} sizes."
        )
    return tuple(
        whole(f"parameter_bytes[{shard}]", size, 0) for shard, size in enumerate(given)
    )
