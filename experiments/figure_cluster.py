"""The machines of figures 4 and 5: fitted to figure 3, assumed where that says nothing.

All times here are the paper's own, in seconds. From figure 3 come the speed-up of the
speech network on 1, 2, 4 and 8 machines, as drawn, and a machine's bandwidth in
relation to its speed, as fitted by `figure3_fit`. All else is in `Assumed`, and
`plausible` varies it.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

import dbjax
from dbjax import sandblaster
from dbjax.cluster import Cluster, LogNormal, partitions
from experiments import figure3_fit

SPEECH = "speech 42M"
PARAMETERS = 41_777_152
NUMBER_BYTES = 4
HOURS = 120.0  # of figure 4
WARM_HOURS = 10.55  # where its curves of several replicas begin


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the paper does not say of its machines.

    Attributes:
      batch: examples in a minibatch.
      servers: machines of the parameter server; figure 5's counts of machines are 256
        and a round number.
      few: machines of a replica of Downpour with up to 20 replicas; figure 5 puts 20
        replicas on 80 machines beside the servers.
      many: with more replicas; figure 5 puts 200 on 400 machines.
      spread: of the time that a minibatch takes, relative to it.
      overlap: whether fetches and pushes run beside the next minibatch.
      bandwidth: what a machine sends, as a multiple of what is fitted to figure 3.
      fitted_speed_ups: take them from the model fitted to figure 3, not as drawn.
    """

    batch: int = 200
    servers: int = 256
    few: int = 4
    many: int = 2
    spread: float = 0.2
    overlap: bool = False
    bandwidth: float = 1.0
    fitted_speed_ups: bool = False


class Machines(NamedTuple):
    """Machines as `Assumed`, with what figure 3 says.

    Attributes:
      assumed: see there.
      alone: seconds that one machine takes for an example.
      speed_up: by the number of machines of a replica.
      bandwidth: bytes per second that a machine sends, and as many that it gets.
      latency: seconds.
    """

    assumed: Assumed
    alone: float
    speed_up: dict[int, float]
    bandwidth: float
    latency: float

    @property
    def sgd(self) -> float:
        """Seconds of a minibatch of SGD[1], on 8 machines and without a server."""
        return self.minibatch(8)

    def minibatch(self, machines: int) -> float:
        """Seconds that a replica of so many machines computes for a minibatch."""
        return self.assumed.batch * self.alone / self.speed_up[machines]

    def of_a_replica(self, replicas: int) -> int:
        """How many machines a replica of Downpour has."""
        return self.assumed.few if replicas <= 20 else self.assumed.many

    def downpour(self, replicas: int) -> Cluster:
        """The cluster for so many replicas.

        A replica's machines fetch and push their own part each; a push keeps the
        servers, all at once, busy for as long as they take to receive it.
        """
        machines = self.of_a_replica(replicas)
        return Cluster(
            step_time=LogNormal(self.minibatch(machines), self.assumed.spread),
            latency=self.latency,
            bandwidth=machines * self.bandwidth,
            shard_service=self.parameter_bytes / self._servers_bandwidth,
        )

    @property
    def parameter_bytes(self) -> int:
        """Of the speech network."""
        return NUMBER_BYTES * PARAMETERS

    @property
    def _servers_bandwidth(self) -> float:
        return self.assumed.servers * self.bandwidth

    def evaluation(self, replicas: int, examples: float, portions: int = 5) -> float:
        """Seconds of an evaluation of a batch by so many replicas of one machine each.

        All fetch at once, and push their sums at its end: they share what the servers
        can send and receive.

        Args:
          replicas: of Sandblaster.
          examples: in the batch, the paper's.
          portions: for each replica.

        Returns:
          Seconds.
        """
        share = min(self.bandwidth, self._servers_bandwidth / replicas)
        portion = self.alone * examples / (replicas * portions)
        cluster = Cluster(
            step_time=LogNormal(portion, self.assumed.spread),
            latency=self.latency,
            bandwidth=share,
        )
        schedule = sandblaster.schedule(
            cluster, replicas=replicas, portions=portions * replicas,
            push_every=portions, parameter_bytes=self.parameter_bytes,
        )  # fmt: skip
        return float(schedule.seconds.mean())

    def total(self, kind: str, replicas: int) -> int:
        """Machines of a curve of some kind, those of the server included."""
        if kind == "sgd":
            return 1
        each = 1 if kind == "lbfgs" else self.of_a_replica(replicas)
        return self.assumed.servers + replicas * each

    def busy(self, computing: float, machines: int = 1) -> float:
        """Cores in use by one replica that computes a share of the time.

        Those that wait for other machines of the replica do not count, and the
        server's are left out.
        """
        return figure3_fit.ASSUMED.cores * computing * self.speed_up[machines]

    def update(self, replicas: int, n_push: int = 1, rounds: int = 20) -> float:
        """Seconds between updates by all replicas of Downpour, once all are at work."""
        trace = dbjax.simulate(
            self.downpour(replicas), replicas=replicas, n_fetch=n_push, n_push=n_push,
            steps=rounds * replicas * n_push, overlap=self.assumed.overlap,
            parameter_bytes=self.parameter_bytes,
        )  # fmt: skip
        return trace.duration() / (rounds * replicas * n_push)


@dataclasses.dataclass(frozen=True)
class Clock:
    """How our runs and the paper's hours belong together.

    The machines are the paper's; only the run is shorter, for all methods alike: an
    hour on our axis holds `1 / compression` of the minibatches, messages and iterations
    that it held there.

    Attributes:
      compression: the paper's minibatches of SGD[1] to one of ours.
      warm_steps: our minibatches of the SGD warm start.
      assumed: of the machines.
    """

    compression: float
    warm_steps: int
    assumed: Assumed = Assumed()

    @property
    def machines(self) -> Machines:
        """The machines."""
        return machines(self.assumed)

    @property
    def warm_hours(self) -> float:
        """When the warm start ends."""
        return self.hours(self.warm_steps * self.machines.sgd)

    def hours(self, seconds: float) -> float:
        """Hours on our axis of so many seconds on the machines."""
        return seconds * self.compression / 3600


def clock_for(steps: int, assumed: Assumed = Assumed()) -> Clock:
    """Give the clock that makes `steps` minibatches of SGD[1] last `HOURS`."""
    compression = HOURS * 3600 / (steps * machines(assumed).sgd)
    return Clock(compression, round(steps * WARM_HOURS / HOURS), assumed)


def machines(assumed: Assumed | None = None, without: str | None = None) -> Machines:
    """Put together what figure 3 says and what is assumed.

    Args:
      assumed: the usual, if not given.
      without: the name of a network of figure 3 whose curve is left out of the fit.

    Returns:
      The machines.
    """
    assumed = assumed or Assumed()
    paper, fit = _figure3()
    machine = fit.without[without] if without else fit.machine
    network = paper.networks[SPEECH]
    alone = partitions.step_time(machine, network(1), 1) / figure3_fit.BATCH
    drawn = {p.machines: p.speed_up for p in paper.points if p.network == SPEECH}
    counts = [1, 2, 4, 8]
    if assumed.fitted_speed_ups:
        drawn = {n: partitions.speed_up(machine, network, n) for n in counts}
    return Machines(
        assumed, alone, {n: drawn[n] for n in counts},
        assumed.bandwidth * machine.bandwidth, machine.latency,
    )  # fmt: skip


@functools.lru_cache
def _figure3() -> tuple[figure3_fit.Paper, figure3_fit.Fit]:
    paper = figure3_fit.read()
    return paper, figure3_fit.fit(paper)


def plausible(count: int, seed: int = 0) -> list[Machines]:
    """Draw clusters that the paper does not rule out either.

    Each number of `Assumed` is drawn on its own, widely; the fit to figure 3 is with
    all curves or without one of them.

    Args:
      count: how many.
      seed: of the draws.

    Returns:
      The machines.
    """
    chance = np.random.default_rng(seed)
    paper, _ = _figure3()
    fits = [None, *paper.networks]
    drawn = []
    for _ in range(count):
        few = int(chance.choice([2, 4, 8]))
        assumed = Assumed(
            batch=int(round(50 * 16 ** chance.random())),
            servers=int(round(64 * 8 ** chance.random())),
            few=few,
            many=int(chance.choice([n for n in (1, 2, 4, 8) if n <= few])),
            spread=float(0.05 * 10 ** chance.random()),
            overlap=bool(chance.random() < 0.5),
            bandwidth=float(2 ** chance.uniform(-1, 1)),
            fitted_speed_ups=bool(chance.random() < 0.5),
        )
        drawn.append(machines(assumed, fits[int(chance.integers(len(fits)))]))
    return drawn
