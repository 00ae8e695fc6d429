"""What goes wrong with machines: some are slow, some get slow, some fail."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dbjax.cluster.distributions import Distribution, as_distribution, check_number
from dbjax.cluster.draws import Purpose, uniform

_LOOK_BACK = 1 << 20  # draws looked at together when a block starts undecided


@dataclasses.dataclass(frozen=True)
class Slow:
    """Replicas that are slow throughout: a share of them by chance, or named ones.

    Attributes:
      fraction: the probability that a replica is slow, drawn once by (seed, replica).
      factor: how many times longer a slow replica takes for a step.
      replicas: the slow replicas by index; `fraction` does not count then.

    >>> Slow(factor=4.0, replicas=(2,)).is_slow(0, np.arange(4))
    array([False, False,  True, False])
    """

    fraction: float = 0.02
    factor: float = 10.0
    replicas: Sequence[int] | None = None

    def __post_init__(self):
        """Check the fields."""
        check_number("Slow fraction", self.fraction, least=0.0, most=1.0)
        check_number("Slow factor", self.factor, least=1.0)
        if self.replicas is not None:
            chosen = np.asarray(self.replicas)
            whole = chosen.ndim == 1 and chosen.size and chosen.dtype.kind in "iu"
            if not whole or chosen.min() < 0:
                raise ValueError(
                    "Slow replicas must be indices, integers of at least 0, one or "
                    f"more; got {self.replicas!r}."
                )
            object.__setattr__(self, "replicas", tuple(chosen.tolist()))

    def is_slow(self, seed: int, replicas: np.ndarray) -> np.ndarray:
        """Say which replicas are slow.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.

        Returns:
          bool `[R]`.
        """
        if self.replicas is not None:
            return np.isin(replicas, self.replicas)
        return uniform(seed, Purpose.SLOW, replicas, 0) < self.fraction


@dataclasses.dataclass(frozen=True)
class Slowness:
    r"""Slowness that comes and goes: a Markov chain over each replica's steps.

    A normal replica turns slow with `a = 1 / mean_normal` a step and a slow one normal
    with `b = 1 / mean_slow`, so that it is slow a share `a / (a + b)` of its steps.
    One uniform `u` a step drives both states: `u < a` makes the replica slow and
    `u >= 1 - b` normal, whatever it was before; anything between keeps the state. So
    the state is that of the last deciding draw, and needs no history but the draws.
    Step 0 always decides, with the chain's stationary share.

    Attributes:
      factor: how many times longer a step takes while the replica is slow.
      mean_slow: mean length of a slow time, in steps, at least 2.
      mean_normal: mean length of a normal time, in steps, at least 2: for shorter ones
        `a` and `1 - b` may cross, and draws would no longer decide alone.

    >>> slowness = Slowness(factor=4.0, mean_slow=50, mean_normal=150)
    >>> slowness.share
    0.25
    """

    factor: float
    mean_slow: float
    mean_normal: float

    def __post_init__(self):
        """Check the fields."""
        check_number("Slowness factor", self.factor, least=1.0)
        check_number("Slowness mean_slow", self.mean_slow, least=2.0)
        check_number("Slowness mean_normal", self.mean_normal, least=2.0)

    @property
    def share(self) -> float:
        """The share of steps that are slow in the long run."""
        return self.mean_slow / (self.mean_slow + self.mean_normal)

    def is_slow(
        self, seed: int, replicas: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """Say which steps of the replicas `[R]` are slow.

        Args:
          seed: the seed of the run.
          replicas: replica indices `[R]`.
          first: the first step.
          count: the number of steps `C`.

        Returns:
          bool `[R, C]`.
        """
        # A deciding draw at position p is 2 * (p + 1) + slow, an undecided one 0: the
        # running maximum is the last decision, and its lowest bit the state.
        last = self._decisions(seed, replicas, first, count)
        if count and first:
            undecided = np.flatnonzero(last[:, 0] == 0)
            last[undecided, 0] = self._before(seed, replicas[undecided], first)
        np.maximum.accumulate(last, axis=1, out=last)
        return (last & 1).astype(bool)

    def _decisions(
        self, seed: int, replicas: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """Give `2 * (position + 1) + slow` where a draw decides, else 0: `[R, C]`."""
        steps = np.arange(first, first + count)
        draws = uniform(seed, Purpose.SLOWNESS, replicas[:, None], steps)
        to_slow = np.where(steps == 0, self.share, 1 / self.mean_normal)
        to_normal = np.where(steps == 0, self.share, 1 - 1 / self.mean_slow)
        slow = draws < to_slow
        place = 2 * np.arange(1, count + 1)
        return np.where(slow | (draws >= to_normal), place + slow, 0)

    def _before(self, seed: int, replicas: np.ndarray, first: int) -> np.ndarray:
        """Give the state, 0 or 1, of the replicas `[R]` just before step `first`."""
        state = np.zeros(len(replicas), dtype=np.int64)
        undecided = np.arange(len(replicas))
        stretch = round(4 / (1 / self.mean_slow + 1 / self.mean_normal))
        while undecided.size:  # ends at step 0, which always decides
            steps = min(first, stretch, max(16, _LOOK_BACK // undecided.size))
            first -= steps
            last = self._decisions(seed, replicas[undecided], first, steps).max(axis=1)
            state[undecided] = last & 1
            undecided = undecided[last == 0]
        return state


@dataclasses.dataclass(frozen=True)
class Failures:
    """Replicas that fail and come back; what they had not pushed is lost.

    Attributes:
      uptime: seconds from joining or coming back to the next failure.
      downtime: seconds from a failure to coming back.

    >>> Failures(uptime=500.0, downtime=20.0).downtime
    Constant(value=20.0)
    """

    uptime: Distribution | float
    downtime: Distribution | float

    def __post_init__(self):
        """Check the fields; numbers become constants."""
        uptime = as_distribution("Failures uptime", self.uptime, positive=True)
        downtime = as_distribution("Failures downtime", self.downtime)
        object.__setattr__(self, "uptime", uptime)
        object.__setattr__(self, "downtime", downtime)
