"""`Cluster`: how long each step, message, push and outage takes, by key."""

import dataclasses
import math
from typing import Any, cast

import numpy as np

from dbjax.cluster.distributions import (
    Constant,
    Distribution,
    Exponential,
    LogNormal,
    Pareto,
    PerReplica,
    as_distribution,
    as_per_replica,
    check_number,
    check_whole,
)
from dbjax.cluster.draws import Purpose, draw
from dbjax.cluster.fit import calibrate
from dbjax.cluster.troubles import Failures, Slow, Slowness
from dbjax.trace import Trace


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines for an emulated run, as distributions; a number is that constant.

    Every draw depends on the seed, what it is for, the replica, the replica's own step
    and the shard, and on nothing else: neither on the block it was asked for in nor on
    how many replicas or shards there are. Letters: `R` replicas, `C` steps, `S` shards.
    Change one thing with `dataclasses.replace(cluster, latency=0.01)`.

    Attributes:
      step_time: seconds for one minibatch on a replica of speed 1.
      speeds: speed of each replica, dividing its step times: one number for all, a
        sequence with one for each, or a distribution drawn once for each.
      slow: replicas that are slow throughout.
      slowness: slowness that comes and goes.
      latency: seconds that a message is under way, each way.
      bandwidth: bytes per second on each link between a replica and a shard.
      shard_service: seconds that a shard is busy with one push, first come first
        served; a fetch keeps no shard busy.
      failures: times between failures and for coming back; None: nobody fails.
      join: when each replica starts, in seconds, given like `speeds`.

    Raises:
      TypeError: a field is not of its kind.
      ValueError: a number in it is out of range.

    >>> cluster = Cluster(step_time=Exponential(2.0), latency=0.1)
    >>> cluster.compute_times(0, np.arange(3), first=0, count=5).shape
    (3, 5)
    """

    step_time: Distribution | float = LogNormal(1.0, spread=0.1)
    speeds: PerReplica = 1.0
    slow: Slow | None = None
    slowness: Slowness | None = None
    latency: Distribution | float = 0.0
    bandwidth: float = math.inf
    shard_service: Distribution | float = 0.0
    failures: Failures | None = None
    join: PerReplica = 0.0

    def __post_init__(self):
        """Check every field; numbers become constants and sequences tuples."""
        bandwidth = check_number("bandwidth", self.bandwidth, above=0.0, finite=False)
        checked = {
            "step_time": as_distribution("step_time", self.step_time, positive=True),
            "speeds": as_per_replica("speeds", self.speeds, positive=True),
            "latency": as_distribution("latency", self.latency),
            "bandwidth": bandwidth,
            "shard_service": as_distribution("shard_service", self.shard_service),
            "join": as_per_replica("join", self.join),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        kinds = {"slow": Slow, "slowness": Slowness, "failures": Failures}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"{name} must be None or a {kind.__name__}; got {value!r}."
                )

    @property
    def queues(self) -> bool:
        """Whether a shard is ever busy, so that pushes may wait for one another."""
        return self.shard_service != Constant(0.0)

    @property
    def fails(self) -> bool:
        """Whether replicas fail."""
        return self.failures is not None

    def compute_times(
        self, seed: int, replicas: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """Give the seconds of the replicas' own steps `first` to `first + count - 1`.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.
          first: the first step, counted by each replica for itself.
          count: the number of steps `C`.

        Returns:
          float64 `[R, C]`.
        """
        seed, replicas, first, count = _checked(seed, replicas, first, count)
        steps = np.arange(first, first + count)
        times = _draw(self.step_time, seed, Purpose.COMPUTE, replicas[:, None], steps)
        scale = 1 / _per_replica(self.speeds, "speeds", seed, Purpose.SPEED, replicas)
        if self.slow is not None:
            scale[self.slow.is_slow(seed, replicas)] *= self.slow.factor
        out = times if times.flags.writeable else None  # a constant is a read-only view
        times = np.multiply(times, scale[:, None], out=out)
        if self.slowness is not None:
            slow = self.slowness.is_slow(seed, replicas, first, count)
            np.multiply(times, self.slowness.factor, out=times, where=slow)
        return times

    def latencies(
        self,
        seed: int,
        replicas: np.ndarray,
        first: int,
        count: int,
        shards: int,
        direction: int,
    ) -> np.ndarray:
        """Give the seconds that messages are under way, their bytes not counted.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.
          first: the first step.
          count: the number of steps `C`.
          shards: the number of shards `S`.
          direction: 0 to the shard, 1 back to the replica.

        Returns:
          float64 `[R, C, S]`; a read-only view where the latency is constant.
        """
        if direction not in (0, 1):
            raise ValueError(
                f"direction must be 0 (to the shard) or 1 (back); got {direction!r}."
            )
        purpose = Purpose.LATENCY_BACK if direction else Purpose.LATENCY_TO
        cube = _cube(seed, replicas, first, count, shards)
        return _draw(self.latency, int(seed), purpose, *cube)

    def service_times(
        self, seed: int, replicas: np.ndarray, first: int, count: int, shards: int
    ) -> np.ndarray:
        """Give the seconds that shards are busy with the pushes of these steps.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.
          first: the first step.
          count: the number of steps `C`.
          shards: the number of shards `S`.

        Returns:
          float64 `[R, C, S]`; a read-only view where the service is constant.
        """
        cube = _cube(seed, replicas, first, count, shards)
        return _draw(self.shard_service, int(seed), Purpose.SERVICE, *cube)

    def transfer_time(self, size: float) -> float:
        """Give the seconds that `size` bytes need on one link, without its latency.

        Args:
          size: bytes.

        Returns:
          Seconds; 0 where the bandwidth is infinite.
        """
        return float(size) / self.bandwidth

    def join_times(self, seed: int, replicas: np.ndarray) -> np.ndarray:
        """Give the seconds at which replicas start.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.

        Returns:
          float64 `[R]`.
        """
        seed, replicas, _, _ = _checked(seed, replicas, 0, 0)
        return _per_replica(self.join, "join", seed, Purpose.JOIN, replicas)

    def outage(self, seed: int, replica: int, k: int) -> tuple[float, float]:
        """Give a replica's `k`-th uptime and the downtime after it, `k` from 0.

        Args:
          seed: the seed of the run.
          replica: the replica.
          k: how often it has failed before.

        Returns:
          Seconds up, from joining or the last restart, and seconds down; `(inf, 0)`
          where nobody fails.
        """
        if self.failures is None:
            return math.inf, 0.0
        key = check_whole("replica", replica), check_whole("k", k)
        seed = check_whole("seed", seed)
        up = _draw(self.failures.uptime, seed, Purpose.UPTIME, *key)
        down = _draw(self.failures.downtime, seed, Purpose.DOWNTIME, *key)
        return float(up), float(down)

    @classmethod
    def fit(cls, trace: Trace) -> "Cluster":
        """Calibrate a cluster from a recorded run; see `calibrate` for what is read.

        Args:
          trace: a Trace with COMPUTE rows.

        Returns:
          A cluster with the step times, speeds, latency and shard service of the run.
        """
        return cls(**calibrate(trace)._asdict())

    @classmethod
    def equal(cls) -> "Cluster":
        """Equal machines: lognormal step times of 10 % spread, no latency."""
        return cls()

    @classmethod
    def heavy_tailed(cls) -> "Cluster":
        """Equal machines whose step times have a power tail of exponent 2.5."""
        return cls(step_time=Pareto(1.0, shape=2.5))

    @classmethod
    def slow_tail(cls) -> "Cluster":
        """Machines of which one in fifty is ten times slower than the others."""
        return cls(slow=Slow(fraction=0.02, factor=10.0))

    @classmethod
    def failing(cls) -> "Cluster":
        """Machines that fail every 500 mean steps and are away for 20."""
        return cls(failures=Failures(Exponential(500.0), Exponential(20.0)))


def _draw(
    value: Any, seed: int, purpose: Purpose, replica: Any, step: Any, shard: Any = 0
) -> np.ndarray:
    """Draw from a checked field; a constant costs nothing, being one number's view."""
    distribution = cast(Distribution, value)  # since the cluster was made
    if isinstance(distribution, Constant):
        shape = np.broadcast_shapes(np.shape(replica), np.shape(step), np.shape(shard))
        return np.broadcast_to(distribution.mean, shape)
    return draw(distribution.quantile, seed, purpose, replica, step, shard)


def _per_replica(
    value: Any, name: str, seed: int, purpose: Purpose, replicas: np.ndarray
) -> np.ndarray:
    """Give each replica's number, `[R]`, as a new array."""
    if not isinstance(value, tuple):
        return np.array(_draw(value, seed, purpose, replicas, 0))
    if replicas.size and replicas.max() >= len(value):
        raise ValueError(
            f"{name} must hold a number for each replica; it holds {len(value)}, and "
            f"replica {replicas.max()} was asked for."
        )
    return np.array(value)[replicas]


def _cube(
    seed: Any, replicas: Any, first: Any, count: Any, shards: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give replicas, steps and shards in shapes that broadcast to `[R, C, S]`."""
    _, replicas, first, count = _checked(seed, replicas, first, count)
    if check_whole("shards", shards) < 1:
        raise ValueError(f"shards must be at least 1; got {shards!r}.")
    steps = np.arange(first, first + count)
    return replicas[:, None, None], steps[:, None], np.arange(int(shards))


def _checked(
    seed: Any, replicas: Any, first: Any, count: Any
) -> tuple[int, np.ndarray, int, int]:
    """Give the arguments that all draws share, checked."""
    indices = np.asarray(replicas)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise TypeError(
            f"replicas must be a one-dimensional integer array; got {replicas!r}."
        )
    if indices.size and indices.min() < 0:
        raise ValueError(
            f"replicas must be at least 0; got {indices.min()} among them."
        )
    return (
        check_whole("seed", seed),
        indices.astype(np.int64),
        check_whole("first", first),
        check_whole("count", count),
    )
