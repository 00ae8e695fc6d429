"""`simulate`: cluster and protocol in, Trace out; no gradient is computed.

No protocol sees a value, so the order of a run is known before it trains anything;
`replay` then turns the Trace and a problem into parameters.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from dbjax.cluster import Cluster
from dbjax.downpour import free_running
from dbjax.downpour.program import make_program
from dbjax.downpour.protocol import Protocol, asynchronous
from dbjax.runtime import emulated
from dbjax.trace import Trace

_ASYNCHRONOUS = asynchronous()


def simulate(
    cluster: Cluster,
    *,
    replicas: int,
    shards: int = 1,
    steps: int,
    n_fetch: int = 1,
    n_push: int = 1,
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
      n_fetch: a replica fetches before every `n_fetch`-th of its minibatches.
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
    replicas = _whole("replicas", replicas, least=1)
    shards = _whole("shards", shards, least=1)
    steps = _whole("steps", steps, least=1)
    n_fetch = _whole("n_fetch", n_fetch, least=1)
    n_push = _whole("n_push", n_push, least=1)
    seed = _whole("seed", seed, least=0)
    warmstart_steps = _whole("warmstart_steps", warmstart_steps, least=0)
    if not isinstance(overlap, bool):
        raise ValueError(f"overlap must be True or False; got {overlap!r}.")
    shard_bytes = _shard_bytes(parameter_bytes, shards)
    columns = None
    blind = protocol.free_running and not overlap
    if blind and not cluster.queues and not cluster.fails:
        columns = free_running.order(
            free_running.Run(
                *(cluster, seed, replicas, steps),
                *(n_fetch, n_push, warmstart_steps, shard_bytes),
            )
        )
    if columns is None:
        program = make_program(
            *(replicas, shards, steps, n_fetch, n_push),
            *(overlap, warmstart_steps, protocol),
        )
        columns = emulated.order(program, cluster, seed, shard_bytes)
    header = {
        "replicas": replicas,
        "shards": shards,
        "steps": steps,
        "n_fetch": n_fetch,
        "n_push": n_push,
        "overlap": overlap,
        "warmstart_steps": warmstart_steps,
        "protocol": protocol.name,
        "runtime": "Emulated",
        "seed": seed,
        "cluster": repr(cluster),
    }
    return Trace.from_columns(header, **columns)


def _whole(name: str, value: Any, least: int) -> int:
    """Give `value` as an int of at least `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ValueError(f"{name} must be {kind}; got {value!r}.")
    return number


def _shard_bytes(given: Any, shards: int) -> tuple[int, ...]:
    """Give the size of each shard; one number is cut evenly."""
    if not isinstance(given, Sequence | np.ndarray) or isinstance(given, str):
        share, rest = divmod(_whole("parameter_bytes", given, least=0), shards)
        return tuple(share + (shard < rest) for shard in range(shards))
    if len(given) != shards:
        raise ValueError(
            f"parameter_bytes must hold a size for each of the {shards} shards, or be "
            f"one number; got {len(given)} sizes."
        )
    return tuple(
        _whole(f"parameter_bytes[{shard}]", size, least=0)
        for shard, size in enumerate(given)
    )
