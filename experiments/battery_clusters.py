"""The machines of the battery: the presets of `dbjax.Cluster`, at the battery's scale.

A run here is short and has few replicas, so what the presets leave to rare chance is
made sure of: one machine is slow, and every machine fails about twice in a run.
"""

import dataclasses
from collections.abc import Mapping

import dbjax
from dbjax.trace import Trace


@dataclasses.dataclass(frozen=True)
class Machines:
    """A cluster of the battery.

    Attributes:
      name: on the page, and in `--clusters`.
      about: what it is, in a few words.
      cluster: how long everything takes; a step takes a second on the mean machine.
    """

    name: str
    about: str
    cluster: dbjax.Cluster


def clusters(steps_each: int) -> Mapping[str, Machines]:
    """The four clusters, for runs in which a replica takes `steps_each` steps."""
    slow = dataclasses.replace(
        dbjax.Cluster.slow_tail(), slow=dbjax.Slow(factor=10.0, replicas=(0,))
    )
    up, down = steps_each / 2, max(1.0, steps_each / 20)
    failing = dataclasses.replace(
        dbjax.Cluster.failing(),
        failures=dbjax.Failures(dbjax.Exponential(up), dbjax.Exponential(down)),
    )
    listed = (
        Machines("equal", "step times of 10 % spread", dbjax.Cluster.equal()),
        Machines(
            "heavy_tailed",
            "step times with a power tail of exponent 2.5",
            dbjax.Cluster.heavy_tailed(),
        ),
        Machines("slow_tail", "one machine is ten times slower", slow),
        Machines(
            "failing",
            f"machines fail every {up:g} steps and are away for {down:g}",
            failing,
        ),
    )
    return {one.name: one for one in listed}


def record(machines: Machines, replicas: int, steps: int, seed: int) -> Trace:
    """Simulate a run: its order of events, before anything is trained."""
    return dbjax.simulate(machines.cluster, replicas=replicas, steps=steps, seed=seed)
