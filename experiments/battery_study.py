"""The battery's course: every rule is tuned on one seed and run on others.

A rule is tuned anew on each workload and cluster, with as many settings as any other.
What is compared is the held-out loss at the end, and the simulated time to a target.
"""

import dataclasses
import math
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.stats

from dbjax.runtime.lanes import cores
from experiments import battery_cells, battery_clusters, battery_runs
from experiments.battery_cells import REPORT, TUNE, TUNING_SEED, Cell, Outcome, Size
from experiments.battery_clusters import Machines
from experiments.battery_rules import Rule, Setting, settings
from experiments.battery_runs import Curve, Program, Schedule
from experiments.battery_workloads import Workload


class Interval(NamedTuple):
    """A number, and where it lies with a confidence of 95 %."""

    middle: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Judged:
    """A rule on a workload and a cluster.

    Attributes:
      rule: see there.
      workload: likewise.
      cluster: likewise.
      trials: of tuning.
      runs: with the best setting, one for each seed; none where all trials failed.
      note: how the settings were chosen.
      error: what is bad about the rule here; "" if nothing.
    """

    rule: Rule
    workload: Workload
    cluster: Machines
    trials: list[Outcome]
    runs: list[Outcome]
    note: str
    error: str = ""

    @property
    def setting(self) -> Setting | None:
        """The best."""
        return self.runs[0].cell.setting if self.runs else None

    @property
    def edge(self) -> str:
        """Whether better learning rates may lie outside of the grid, in words."""
        if self.setting is None:
            return ""
        rates = [trial.cell.setting["learning_rate"] for trial in self.trials]
        best = self.setting["learning_rate"]
        if best == min(rates):
            return "the smallest learning rate of the grid is the best"
        if best == max(rates):
            return "the largest learning rate of the grid is the best"
        return ""

    @property
    def ends(self) -> np.ndarray:
        """Held-out losses at the end, infinite where a run diverged."""
        return np.array([run.end for run in self.runs])

    @property
    def diverged(self) -> int:
        """How many of the runs came apart."""
        return int(np.isinf(self.ends).sum())

    @property
    def worse(self) -> int:
        """How many of the others end above where they began."""
        return sum(
            math.inf > run.end > run.curve.losses[0] for run in self.runs if run.curve
        )

    @property
    def loss(self) -> Interval:
        """Mean held-out loss at the end; infinite if any run diverged."""
        return mean_of(self.ends)

    @property
    def accuracy(self) -> Interval:
        """Likewise; NaN if any run diverged."""
        return mean_of(np.array([run.accuracy for run in self.runs]))

    @property
    def times(self) -> np.ndarray:
        """Simulated seconds to the target, infinite where it is never reached."""
        return np.array([run.time_to(self.workload.target) for run in self.runs])

    @property
    def time(self) -> Interval:
        """Their median, over all runs; infinite where half of them never get there."""
        return median_of(self.times)

    @property
    def rejected(self) -> int:
        """Pushes that were rejected as not finite, in the runs."""
        return sum(run.curve.not_finite for run in self.runs if run.curve)


def mean_of(values: np.ndarray) -> Interval:
    """Give the mean and Student's interval; nothing is dropped.

    >>> mean_of(np.array([1.0, 2.0, 3.0])).middle
    2.0
    >>> mean_of(np.array([1.0, np.inf]))
    Interval(middle=inf, low=inf, high=inf)
    """
    if not len(values) or not np.isfinite(values).all():
        worst = math.nan if not len(values) or np.isnan(values).any() else math.inf
        return Interval(worst, worst, worst)
    middle = float(values.mean())
    if len(values) == 1:
        return Interval(middle, -math.inf, math.inf)
    spread = float(values.std(ddof=1)) / len(values) ** 0.5
    reach = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * spread
    return Interval(middle, middle - reach, middle + reach)


def median_of(values: np.ndarray, draws: int = 2_000) -> Interval:
    """Give the median and its bootstrap interval; infinite values count as such.

    >>> median_of(np.array([1.0, 1.0, 1.0, np.inf, np.inf]))
    Interval(middle=1.0, low=1.0, high=inf)
    """
    if not len(values):
        return Interval(math.inf, math.inf, math.inf)
    chance = np.random.default_rng(0)
    drawn = np.sort(values[chance.integers(len(values), size=(draws, len(values)))])
    # The upper one of two in the middle: no sum of infinities.
    medians = np.sort(drawn[:, len(values) // 2])
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    middle = np.sort(values)[len(values) // 2]
    return Interval(float(middle), float(low), float(high))


class Comparison(NamedTuple):
    """A rule against another on the same seeds.

    Attributes:
      other: the other.
      difference: of the losses at the end, seed by seed; negative is better.
      verdict: "better", "worse" or "no difference seen".
    """

    other: Judged
    difference: Interval
    verdict: str


def compare(one: Judged, other: Judged) -> Comparison:
    """Compare two rules on one workload and cluster."""
    if one.error or other.error or not one.runs or not other.runs:
        bad = bool(one.error) - bool(other.error)
        nothing = Interval(math.nan, math.nan, math.nan)
        return Comparison(
            other, nothing, {1: "worse", -1: "better", 0: "both bad"}[bad]
        )
    difference = mean_of(one.ends - other.ends)
    verdict = "no difference seen"
    if difference.high < 0:
        verdict = "better"
    elif difference.low > 0:
        verdict = "worse"
    return Comparison(other, difference, verdict)


@dataclasses.dataclass(frozen=True)
class Battery:
    """What is run, and where it is kept.

    Attributes:
      size: how large.
      workloads: which.
      clusters: which.
      folder_of: the folder of a rule's cells.
      done: called after every cell.
    """

    size: Size
    workloads: Sequence[Workload]
    clusters: Sequence[Machines]
    folder_of: Callable[[Rule], pathlib.Path]
    done: Callable[[], None] = lambda: None

    def cells(self, rules: int) -> int:
        """How many cells so many rules have."""
        each = self.size.budget + self.size.seeds
        return rules * len(self.workloads) * len(self.clusters) * each


def judge(battery: Battery, rules: Sequence[Rule]) -> list[Judged]:
    """Tune and run rules.

    Args:
      battery: on what.
      rules: which.

    Returns:
      One for each workload, cluster and rule, in this order.
    """
    shelf, stop = _Shelf(battery.size), threading.Event()
    items = [(workload, rule) for workload in battery.workloads for rule in rules]

    def one(item: tuple[Workload, Rule]) -> list[Judged]:
        try:
            return _judge_on(battery, shelf, stop, *item)
        except BaseException:
            stop.set()
            raise

    # A rule on a workload is one program, so one thread: nothing is compiled twice.
    pool = ThreadPoolExecutor(cores())
    try:
        results = list(pool.map(one, items))
    finally:
        stop.set()  # if interrupted: what is under way ends with its cell
        pool.shutdown(cancel_futures=True)
    found = {
        (workload.name, rule.name): result
        for (workload, rule), result in zip(items, results, strict=True)
    }
    return [
        found[workload.name, rule.name][place]
        for workload in battery.workloads
        for place in range(len(battery.clusters))
        for rule in rules
    ]


class _Stopped(Exception):
    """Somebody interrupted the battery, or another thread failed."""


class _Shelf:
    """Schedules, which all rules share; those of the last workloads are kept."""

    def __init__(self, size: Size) -> None:
        self._size, self._lock = size, threading.Lock()
        self._kept: dict[tuple[str, str, int], Schedule] = {}

    def schedule(self, workload: Workload, cluster: Machines, seed: int) -> Schedule:
        key = workload.name, cluster.name, seed
        with self._lock:
            if key not in self._kept:
                newest = list(dict.fromkeys(name for name, _, _ in self._kept))[-1:]
                stay = {workload.name, *newest}
                self._kept = {k: v for k, v in self._kept.items() if k[0] in stay}
                size = self._size
                trace = battery_clusters.record(
                    cluster, size.replicas, size.steps, seed
                )
                self._kept[key] = battery_runs.lay_out(
                    workload, trace, seed, size.points
                )
            return self._kept[key]


def _judge_on(
    battery: Battery,
    shelf: _Shelf,
    stop: threading.Event,
    workload: Workload,
    rule: Rule,
) -> list[Judged]:
    """A rule on a workload, on all clusters."""
    size, folder = battery.size, battery.folder_of(rule)
    tried, note = settings(rule.search, size.budget)
    made: list[Program] = []

    def outcome(cluster: Machines, stage: str, seed: int, setting: Setting) -> Outcome:
        if stop.is_set():
            raise _Stopped
        cell = Cell(rule, workload.name, cluster.name, stage, seed, setting, size)

        def prepare() -> Schedule:
            return shelf.schedule(workload, cluster, seed)

        def run(schedule: Schedule) -> Curve:
            if not made:  # not if all is read
                made.append(battery_runs.make_program(workload, rule, setting))
            return battery_runs.run(made[0], schedule, setting)

        result = battery_cells.keep(cell, folder, prepare, run)
        battery.done()
        return result

    judged = []
    for cluster in battery.clusters:
        trials: list[Outcome] = []
        for setting in tried:
            trials.append(outcome(cluster, TUNE, TUNING_SEED, setting))
            if trials[-1].error:  # it would be said once for each setting
                break
        runs: list[Outcome] = []
        best = min(trials, key=lambda trial: trial.end)
        if math.isfinite(best.end) and not trials[-1].error:
            runs = [
                outcome(cluster, REPORT, seed, best.cell.setting)
                for seed in range(size.seeds)
            ]
        error = _error(trials, runs)
        judged.append(Judged(rule, workload, cluster, trials, runs, note, error))
    return judged


def _error(trials: Sequence[Outcome], runs: Sequence[Outcome]) -> str:
    """What is bad about a rule here, in words."""
    for one in (*trials, *runs):
        if one.error:
            return f"raises: {one.error}"
    if not runs:
        return f"diverged: all {len(trials)} settings"
    apart = sum(run.diverged for run in runs)
    if apart:
        return f"diverged: {apart} of {len(runs)} runs with the best setting"
    return ""
