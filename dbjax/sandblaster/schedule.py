"""How long a batch takes on an emulated cluster: portions, backups, static splitting.

No gradient is computed. The orders are those of the same `Portions` that a real run
obeys; a `Cluster` says how long what they order takes.
"""

from typing import Any, NamedTuple

import numpy as np

from dbjax.cluster import Cluster
from dbjax.sandblaster.emulation import Emulation
from dbjax.sandblaster.portions import Portions, PortionsInfo
from dbjax.trace import Trace

STRATEGIES = ("backups", "portions", "static")
_LOOK_AT = 64  # draws that say how fast a replica is


class Schedule(NamedTuple):
    """How long each evaluation of the batch took, and against what.

    Attributes:
      seconds: `[evaluations]` float64, from `begin` to every portion counting.
      ideal: seconds if the work could be cut as finely as one likes, with no latency.
      info: backups, steals, dropped and returned portions, ...
      trace: what happened.
    """

    seconds: np.ndarray
    ideal: float
    info: PortionsInfo
    trace: Trace


def schedule(
    cluster: Cluster,
    *,
    replicas: int,
    portions: int,
    shards: int = 1,
    evaluations: int = 1,
    strategy: str = "backups",
    push_every: int = 4,
    copies: int = 4,
    seed: int = 0,
    parameter_bytes: int = 0,
) -> Schedule:
    """Emulate evaluations of a batch, one after another.

    A portion takes the cluster's `step_time`. A replica fetches once per evaluation,
    and its pushes run beside its computing. Messages to the coordinator take the
    latency, as those to shards do; it answers at once, and notices failures at once.

    Args:
      cluster: how long everything takes.
      replicas: number of replicas.
      portions: number of portions of the batch.
      shards: number of shards.
      evaluations: how often the batch is evaluated. A replica that is late in one has
        to finish its portion before it joins the next.
      strategy: `"backups"`: portions with backup copies; `"portions"`: without;
        `"static"`: each replica computes its own `1 / replicas` of the batch.
      push_every: portions summed before a push; `"static"` pushes once.
      copies: see `Portions`.
      seed: seed of the cluster's draws.
      parameter_bytes: size of all parameters; it counts where bandwidth is finite.

    Returns:
      The times and the Trace, the same for the same arguments. In the Trace a COMPUTE
      row's `step` is `evaluation * portions + portion`; its status is DROPPED unless
      the gradient was kept, and its `count` is above 0 where it was a backup. The
      evaluations' times stand in `trace.evaluations`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: the cluster is none.
      RuntimeError: an evaluation can never be done.

    >>> cluster = Cluster(step_time=1.0)
    >>> schedule(cluster, replicas=4, portions=20).seconds
    array([5.])
    """
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a Cluster; got {cluster!r}.")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    desk = desk_for(
        strategy, portions=portions, replicas=replicas, shards=shards,
        push_every=push_every, copies=copies,
    )  # fmt: skip
    run = Emulation(desk, cluster, seed, parameter_bytes / shards)
    ends = np.array([run.evaluate() for _ in range(evaluations)])
    seconds = np.diff(ends, prepend=0.0)
    header: dict[str, Any] = {
        "algorithm": "sandblaster",
        "replicas": replicas,
        "shards": shards,
        "portions": portions,
        "evaluations": evaluations,
        "strategy": strategy,
        "push_every": desk.push_every,
        "copies": desk.copies,
        "runtime": "Emulated",
        "seed": seed,
        "cluster": repr(cluster),
    }
    times = [
        {"step": step, "time": float(end), "seconds": float(each)}
        for step, (end, each) in enumerate(zip(ends, seconds, strict=True))
    ]
    trace = Trace.from_columns(header, times, **run.columns())
    ideal = ideal_seconds(cluster, replicas, portions, seed)
    return Schedule(seconds, ideal, desk.info, trace)


def desk_for(
    strategy: str,
    *,
    portions: int,
    replicas: int,
    shards: int,
    push_every: int,
    copies: int,
) -> Portions:
    """Make a desk that follows a strategy; for the arguments see `schedule`.

    Raises:
      ValueError: there is no such strategy, or a number is below 1.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    static = strategy == "static"
    return Portions(
        portions,
        replicas,
        shards,
        push_every=portions if static else push_every,
        copies=copies if strategy == "backups" else 1,
        steal=not static,
    )


def ideal_seconds(cluster: Cluster, replicas: int, portions: int, seed: int) -> float:
    """Give the time in which all replicas together have the speed for the batch.

    `portions / sum_r (1 / m_r)`, where `m_r` is the replica's mean time for a portion.

    Args:
      cluster: how long a portion takes.
      replicas: number of replicas.
      portions: number of portions.
      seed: seed of the draws.

    Returns:
      Seconds; replicas that fail count as if they did not.
    """
    times = cluster.compute_times(seed, np.arange(replicas), 0, _LOOK_AT)
    return float(portions / np.sum(1 / times.mean(axis=1)))
