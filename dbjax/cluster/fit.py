"""Calibration: the distributions behind a recorded run."""

from typing import NamedTuple

import numpy as np

from dbjax.cluster.distributions import Constant, Distribution, Empirical
from dbjax.trace import COMPUTE, FETCH, PUSH, Trace

_MOST_VALUES = 10_000  # a longer record is thinned to so many, the mean kept


class Calibration(NamedTuple):
    """What a Trace says about its cluster, named like the fields of `Cluster`."""

    step_time: Distribution
    speeds: tuple[float, ...]
    latency: Distribution
    shard_service: Distribution


def calibrate(trace: Trace) -> Calibration:
    """Read step times, speeds, latency and shard service off a recorded run.

    A replica's speed is the median replica's mean step time over its own, so that the
    typical machine has speed 1 and each keeps its mean; one that computed nothing has
    speed 1. Step times are those recorded times the speed, and with them what a replica
    does by itself between two steps while no fetch is under way, its median, unless a
    protocol may have made it wait. A latency is half a fetch,
    bytes and all, as a record of one problem cannot tell bandwidth from latency, but
    without the handling of the replica's own push, if it waited for that. Shard service
    is how long a push was handled. Failures and joins are not read.

    Args:
      trace: a Trace with COMPUTE rows.

    Returns:
      The calibration.

    Raises:
      ValueError: no step was computed, or a row ends before it starts.
    """
    seconds = trace.time - trace.start
    if not np.all(seconds >= 0):
        row = int(np.flatnonzero(~(seconds >= 0))[0])
        raise ValueError(
            "trace must have rows that end after they start; row "
            f"{row} goes from {trace.start[row]:g} to {trace.time[row]:g}."
        )
    computed = trace.kind == COMPUTE
    if not seconds[computed].sum() > 0:
        raise ValueError(
            "trace must hold COMPUTE rows that took time; got "
            f"{int(computed.sum())} such rows, of {seconds[computed].sum():g} seconds."
        )
    owners, steps = trace.replica[computed], seconds[computed]
    replicas = max(int(trace.header["replicas"]), int(owners.max()) + 1)
    # A duration is a difference of two times, and rounds like the larger of them.
    rounding = 8 * np.finfo(np.float64).eps * float(np.abs(trace.time).max())
    if trace.header.get("protocol") == "asynchronous":
        between = _between(trace, replicas)
        steps = steps + np.where(between > rounding, between, 0)[owners]
    counts = np.bincount(owners, minlength=replicas)
    means = np.bincount(owners, weights=steps, minlength=replicas)
    means /= np.maximum(counts, 1)
    took_time = means > 0
    means[~took_time] = typical = np.median(means[took_time])
    speeds = typical / means
    return Calibration(
        step_time=_distribution(steps * speeds[owners], rounding),
        speeds=tuple(speeds.tolist()),
        latency=_distribution(_on_the_way(trace) / 2, rounding),
        shard_service=_distribution(seconds[trace.kind == PUSH], rounding),
    )


def _between(trace: Trace, replicas: int) -> np.ndarray:
    """Seconds from a replica's step to its next one without a fetch, median, `[R]`."""
    found = np.zeros(replicas)
    for replica in range(replicas):
        mine = trace.take(trace.replica == replica)
        steps, fetches = mine.take(mine.kind == COMPUTE), mine.take(mine.kind == FETCH)
        if len(steps) < 2:
            continue
        steps = steps.take(np.argsort(steps.time))
        begin, end = steps.time[:-1], steps.start[1:]
        # The gap that each fetch lands in, if it lands in one; several shards' are one.
        gap = np.searchsorted(end, fetches.time)
        lands = (gap < len(end)) & (fetches.time > begin[np.minimum(gap, len(end) - 1)])
        gap, fetches = gap[lands], fetches.take(lands)
        first, last = end.copy(), begin.copy()
        np.minimum.at(first, gap, fetches.start)
        np.maximum.at(last, gap, fetches.time)
        covered = np.maximum(last - np.maximum(first, begin), 0)
        found[replica] = np.median(end - begin - covered)
    return found


def _on_the_way(trace: Trace) -> np.ndarray:
    """Seconds of each fetch, less those in which a shard handled the push before it."""
    fetched, pushed = (np.flatnonzero(trace.kind == kind) for kind in (FETCH, PUSH))
    seconds = trace.time[fetched] - trace.start[fetched]
    if not pushed.size or not fetched.size:
        return seconds
    # One line for each replica and shard, on which times go up.
    shards = int(trace.shard.max()) + 1
    line = trace.replica * shards + trace.shard
    pushed = pushed[np.lexsort((trace.time[pushed], line[pushed]))]
    for number in np.unique(line[fetched]):
        fetches = np.flatnonzero(line[fetched] == number)
        pushes = pushed[line[pushed] == number]
        if not pushes.size:
            continue
        last = np.searchsorted(
            trace.time[pushes], trace.time[fetched[fetches]], "right"
        )
        push = pushes[np.maximum(last - 1, 0)]
        within = (last > 0) & (trace.start[push] >= trace.start[fetched[fetches]])
        handled = trace.time[push] - trace.start[push]
        seconds[fetches] -= np.where(within, handled, 0)
    return seconds


def _distribution(values: np.ndarray, rounding: float) -> Distribution:
    """Give the distribution of `values`; those equal up to rounding are a constant."""
    if not values.size or values.max() <= rounding:
        return Constant(0.0)
    if np.ptp(values) <= rounding:
        return Constant(float(values.mean()))
    if values.size > _MOST_VALUES:
        # Means of equally large stretches of the sorted record, by its running sum,
        # whose ends may fall within a value.
        total = np.concatenate([[0.0], np.cumsum(np.sort(values))])
        ends = np.linspace(0, values.size, _MOST_VALUES + 1)
        sums = np.diff(np.interp(ends, np.arange(values.size + 1), total))
        values = sums * (_MOST_VALUES / values.size)
    return Empirical(values)
