"""How fast a network partitioned over machines trains: a model of its mini-batch time.

A step is a sequence of phases; a phase ends when the slowest machine has done its piece
of the work and all have sent what others need. On `N` machines a step takes

  T(N) = sum over phases of  slowest(N) (w + c g) / (c f)  +  m l  +  b / d

with `w` operations, `m` messages and `b` bytes of the machine that has most of them;
`f` operations per second of a core, `c` cores, `g` the grain, `l` the latency and `d`
the bandwidth. `slowest(N)` is the expected maximum of `N` independent paces: "many
machines waiting for the single slowest machine to finish a given phase" is what the
paper (section 3) names as the typical cause of speed-ups that are less than ideal.

Sending is neither overlapped with computing nor slowed by other senders.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.optimize

from dbjax.cluster.distributions import (
    SMALLEST,
    Constant,
    Distribution,
    Pareto,
    check_number,
    check_whole,
)


class Work(NamedTuple):
    """What one machine does in a phase.

    Attributes:
      flops: operations, `w`.
      bytes: that it sends, `b`.
      messages: that it sends, `m`.
    """

    flops: float
    bytes: float = 0.0
    messages: float = 0.0


Network: TypeAlias = Callable[[int], Sequence[Work]]
"""Gives the phases of a step when the network is partitioned over so many machines."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One of several equal machines.

    Attributes:
      flops: operations per second of one core, `f`.
      bandwidth: bytes per second that the machine sends, `d`.
      latency: seconds for each message, `l`.
      pace: how long a piece of work takes, as a multiple of usual, with mean 1; drawn
        anew for every machine and phase.
      cores: `c`.
      grain: operations, `g`; a core that has only so many spends half of its time on
        starting and ending.

    Raises:
      TypeError: the pace is not a distribution.
      ValueError: a number is out of range.
    """

    flops: float
    bandwidth: float = math.inf
    latency: float = 0.0
    pace: Distribution = Constant(1.0)
    cores: int = 1
    grain: float = 0.0

    def __post_init__(self):
        """Check every field."""
        check_number("flops", self.flops, above=0.0)
        check_number("bandwidth", self.bandwidth, above=0.0, finite=False)
        check_number("latency", self.latency, least=0.0)
        check_number("grain", self.grain, least=0.0)
        if check_whole("cores", self.cores) < 1:
            raise ValueError(f"cores must be at least 1; got {self.cores!r}.")
        if not isinstance(self.pace, Distribution):
            raise TypeError(f"pace must be a distribution; got {self.pace!r}.")


class Point(NamedTuple):
    """A measured speed-up: the time of a step on one machine over that on several."""

    network: str
    machines: int
    speed_up: float


def slowest(pace: Distribution, machines: int) -> float:
    """Give the expected maximum of independent paces.

    E max = integral over v in (0, 1) of Q(v^(1/N)), with Q the inverse CDF: the maximum
    is below Q(u) with probability u^N.

    Args:
      pace: of one machine.
      machines: `N`.

    Returns:
      The mean pace if there is one machine, more if there are more.

    >>> from dbjax.cluster.distributions import Exponential
    >>> round(slowest(Exponential(1.0), 4), 4)  # 1 + 1/2 + 1/3 + 1/4
    2.0833
    """
    if isinstance(pace, Constant) or machines == 1:
        return pace.mean
    # v = exp(-exp(-x)) makes both ends fade fast, so that equal steps in x do well.
    x, dx = np.linspace(-5.0, 36.0, 1025, retstep=True)
    tail = np.exp(-x)
    u = np.clip(np.exp(-tail / machines), SMALLEST, 1 - SMALLEST)
    return float(np.sum(pace.quantile(u) * np.exp(-tail) * tail) * dx)


def step_time(machine: Machine, phases: Sequence[Work], machines: int) -> float:
    """Predict the seconds of a step.

    Args:
      machine: each of them.
      phases: the work of the busiest machine, phase after phase.
      machines: how many there are.

    Returns:
      Seconds.

    >>> step_time(Machine(flops=1e9, bandwidth=1e8), [Work(2e9, bytes=5e7)], machines=2)
    2.5
    """
    wait = slowest(machine.pace, machines)
    start = machine.grain / machine.flops
    rate = machine.cores * machine.flops
    return sum(
        wait * (work.flops / rate + start)
        + work.messages * machine.latency
        + work.bytes / machine.bandwidth
        for work in phases
    )


def speed_up(machine: Machine, network: Network, machines: int) -> float:
    """Predict the time of a step on one machine over that on several.

    Args:
      machine: each of them.
      network: its work.
      machines: how many there are.

    Returns:
      The speed-up.
    """
    alone = step_time(machine, network(1), 1)
    return alone / step_time(machine, network(machines), machines)


def power_tail(spread: float) -> Pareto:
    """Give the Pareto of mean 1 whose standard deviation is `spread`.

    The shape a solves spread^2 = 1 / (a (a - 2)); it is above 2.

    >>> power_tail(1 / 3**0.5).shape
    3.0
    """
    return Pareto(1.0, shape=round(1 + math.sqrt(1 + 1 / spread**2), 12))


def fit_machine(
    points: Sequence[Point],
    networks: Mapping[str, Network],
    guess: Machine,
    pace: Callable[[float], Distribution] = power_tail,
) -> Machine:
    """Find the bandwidth, latency and spread of paces that explain speed-ups best.

    Least squares on the logarithm of the speed-ups. They do not tell how fast a machine
    computes, only how fast it sends in relation to that, so the operations per second,
    cores and grain stay as they are guessed.

    Args:
      points: what was measured.
      networks: by the names in `points`.
      guess: where the search starts; its bandwidth must be finite, its latency not 0.
      pace: the family of paces, by their standard deviation around the mean 1.

    Returns:
      `guess` with another bandwidth, latency and pace.

    Raises:
      ValueError: there are fewer than four points of more than one machine.
    """
    seen = [point for point in points if point.machines > 1]
    if len(seen) < 4:
        raise ValueError(
            f"points must hold at least 4 of more than one machine; got {len(seen)}."
        )
    pairs = [
        (networks[network](1), networks[network](machines), machines)
        for network, machines, _ in seen
    ]
    measured = np.log([point.speed_up for point in seen])

    def machine_of(theta: np.ndarray) -> Machine:
        bandwidth, latency, spread = np.exp(theta)
        return dataclasses.replace(
            guess,
            bandwidth=float(guess.bandwidth * bandwidth),
            latency=float(guess.latency * latency),
            pace=pace(float(spread)),
        )

    def errors(theta: np.ndarray) -> np.ndarray:
        machine = machine_of(theta)
        times = [
            (step_time(machine, one, 1), step_time(machine, several, machines))
            for one, several, machines in pairs
        ]
        alone, together = np.log(times).T
        return alone - together - measured

    # From several starts, as the valley is curved: what latency does not explain,
    # bandwidth may.
    widest = math.log(1e4)
    low, high = [-widest, -widest, math.log(0.01)], [widest, widest, math.log(5.0)]
    found = [
        scipy.optimize.least_squares(
            errors, [bandwidth, 0.0, math.log(spread)], bounds=(low, high)
        )
        for bandwidth, spread in itertools.product((-1.5, 1.5), (0.1, 0.7))
    ]
    return machine_of(min(found, key=lambda result: result.cost).x)
