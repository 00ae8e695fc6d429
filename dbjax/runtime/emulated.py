"""The emulated runtime: one thread, a virtual clock, everything drawn from a seed."""

import dataclasses
from typing import Any

from dbjax.cluster import Cluster
from dbjax.cluster.distributions import check_whole
from dbjax.runtime.base import Program
from dbjax.runtime.events import Events


@dataclasses.dataclass(frozen=True)
class Emulated:
    """Runs on an emulated cluster: the same seed, the same run, bit for bit.

    Attributes:
      cluster: how long everything takes.
      seed: seed of the cluster's draws, an integer of at least 0.

    Raises:
      TypeError: `cluster` is no Cluster.
      ValueError: `seed` is no integer, or negative.

    >>> Emulated(Cluster(step_time=1.0), seed=3).seed
    3
    """

    cluster: Cluster = Cluster()
    seed: int = 0

    def __post_init__(self):
        """Check both."""
        if not isinstance(self.cluster, Cluster):
            raise TypeError(f"cluster must be a Cluster; got {self.cluster!r}.")
        object.__setattr__(self, "seed", check_whole("seed", self.seed))


def order(
    program: Program, cluster: Cluster, seed: int, shard_bytes: tuple[int, ...]
) -> dict[str, Any]:
    """Run a program's actors on an emulated cluster, without their gradients.

    Args:
      program: what is run; its desk is used up.
      cluster: how long everything takes.
      seed: seed of the cluster's draws.
      shard_bytes: size of each shard `[S]`.

    Returns:
      Columns for `Trace.from_columns`.

    Raises:
      RuntimeError: if replicas are left that wait for ever.
    """
    return Events(program, cluster, seed, shard_bytes).run()
