"""Times to the target, and whether an ordering of them survives other machines.

Other machines do not change what an update does, as a replica misses about as many
updates by the others on each: so their times are those of the same curves on another
clock, found by simulating a few rounds. SGD[1] keeps its 120 hours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.figure_cluster import HOURS, Machines, plausible
from experiments.figure_curves import Result, crossing
from experiments.figure_study import Calibrated, Method, Study
from experiments.figure_tuning import Setting, Tuned

_ROUNDS = 10  # of all replicas, simulated


class Times(NamedTuple):
    """When the seeds of a method reach the target; infinity where they never do.

    Attributes:
      hours: of each seed.
      steps: minibatches or evaluations after the warm start, of each seed.
    """

    hours: np.ndarray
    steps: np.ndarray

    @property
    def middle(self) -> float:
        """The median in hours: infinity if most never get there."""
        return float(np.median(self.hours))


class Ordering(NamedTuple):
    """A claim that one method is sooner than another.

    Attributes:
      sooner: name of the method that should be.
      later: name of the other.
      holds: whether its median is; None if neither gets there.
      seeds: the share of seeds with which it is.
      clusters: the share of plausible clusters on which its median is.
    """

    sooner: str
    later: str
    holds: bool | None
    seeds: float
    clusters: float


def times(results: Sequence[Result], target: float) -> Times:
    """Find the crossings on the test."""
    return Times(
        np.array([crossing(r.hours, r.test, target) for r in results]),
        np.array([crossing(r.steps, r.test, target) for r in results]),
    )


def orderings(
    pairs: Sequence[tuple[Method, Method]],
    reached: Mapping[Method, Times],
    on: Sequence[Mapping[Method, float]],
) -> list[Ordering]:
    """Check pairs of methods, the sooner one first.

    Args:
      pairs: what is claimed.
      reached: the times of each method.
      on: likewise the median, for each plausible cluster.

    Returns:
      What became of each claim.
    """
    found = []
    for sooner, later in pairs:
        early, late = reached[sooner], reached[later]
        anyone = math.isfinite(min(early.middle, late.middle))
        found.append(
            Ordering(
                sooner.name,
                later.name,
                early.middle < late.middle if anyone else None,
                float(np.mean(early.hours < late.hours)),
                float(np.mean([one[sooner] < one[later] for one in on])),
            )
        )
    return found


def check(
    pairs: Sequence[tuple[Method, Method]],
    study: Study,
    found: Calibrated,
    tuned: Mapping[Method, Tuned],
    reached: Mapping[Method, Times],
) -> list[Ordering]:
    """Check pairs of methods, the sooner one first, on plausible clusters as well."""
    settings = {method: one.best for method, one in tuned.items()}
    clusters = plausible(study.clusters)
    on = [elsewhere(c, reached, settings, study, found) for c in clusters]
    return orderings(pairs, reached, on)


def verdict(claim: Ordering) -> str:
    """Say what became of a claim in words."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "open, as neither gets there"}
    return (
        f"{claim.sooner} before {claim.later}: {words[claim.holds]}; with "
        f"{100 * claim.seeds:.0f} % of seeds, on {100 * claim.clusters:.0f} % of "
        "plausible clusters."
    )


def elsewhere(
    machines: Machines,
    reached: Mapping[Method, Times],
    settings: Mapping[Method, Setting],
    study: Study,
    found: Calibrated,
) -> dict[Method, float]:
    """Give the median hours to the target on other machines.

    Args:
      machines: the others.
      reached: the steps that each method needs.
      settings: its hyperparameters.
      study: the study.
      found: the clock.

    Returns:
      Hours by method.
    """
    hour = HOURS / found.steps / machines.sgd  # of a second on these machines
    hours = {}
    for method, each in reached.items():
        steps = float(np.median(each.steps))
        if method.kind == "sgd" or not math.isfinite(steps):
            hours[method] = each.middle
            continue
        seconds = step_seconds(machines, method, settings[method], study)
        hours[method] = found.clock.warm_hours + steps * seconds * hour
    return hours


def step_seconds(
    machines: Machines, method: Method, setting: Setting, study: Study
) -> float:
    """Seconds of a minibatch of all replicas together, or of an evaluation."""
    if method.kind == "lbfgs":
        examples = setting["examples"] * machines.assumed.batch / study.task.batch
        return machines.evaluation(method.replicas, examples, portions=3)
    return machines.update(method.replicas, setting["n_push"], _ROUNDS)
