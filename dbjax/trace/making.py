"""Traces that no run of ours recorded: from delays, and from events of any order."""

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np

from dbjax.trace import groups, history
from dbjax.trace.columns import COMPUTE, FAIL, FETCH, JOIN, LEAVE, PUSH, RESTART

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

# Which comes first of a replica's events that the clock cannot tell apart.
_TURN = (JOIN, RESTART, FETCH, COMPUTE, PUSH, FAIL, LEAVE)


def delay_columns(delays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns header and columns of a run whose push `t` has staleness `delays[t]`.

    Gradient `t` is one fetch of version `t - delays[t]`, one minibatch and one push; or
    one fetch and one push for each shard, where shards have delays of their own.

    Args:
        delays: int array `[steps]` or `[steps, shards]`, `0 <= delays[t] <= t`.

    Returns:
        Header and columns for `Trace.from_columns`.

    Raises:
        ValueError: naming the step, and the shard, whose delay is not possible.
    """
    delays = _checked_delays(delays)
    steps = len(delays)
    base = np.arange(steps)[:, None] - delays.reshape(steps, -1)
    begins = base.min(axis=1)  # when a gradient's first fetch is
    order = np.argsort(begins, kind="stable")  # gradients, as they begin
    waiting = np.searchsorted(begins[order], np.arange(steps), side="right")
    replicas = int((waiting - np.arange(steps)).max())
    replica = _assign(order, replicas)
    header = plain_header(replicas, steps, shards=base.shape[1])
    return header, push_by_push(base, replica, np.arange(1.0 + steps))


def push_columns(
    time: np.ndarray, replica: np.ndarray, staleness: np.ndarray, lines: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns header and columns of a run that is known by its pushes only.

    Each push is one gradient, at parameters that its replica had fetched at the
    earliest after its last push.

    Args:
        time: seconds, `[pushes]`, in their order.
        replica: who pushed, int array `[pushes]`.
        staleness: how many updates it had missed, int array `[pushes]`.
        lines: where each push was written down, `[pushes]`, for messages.

    Returns:
        Header and columns for `Trace.from_columns`.

    Raises:
        ValueError: naming the line, the column, its value and what is allowed.
    """
    pushes = np.arange(len(time))
    earliest = np.concatenate([[0.0], time[:-1]])
    base = pushes - staleness
    last = _last_own(replica)
    # Column -> the least and the most that are allowed, and why.
    limits = [
        ("time", time, earliest, np.inf, "the time of the push before"),
        ("replica", replica, 0, np.iinfo(np.int32).max, "a replica's number"),
        ("staleness", staleness, 0, pushes, "the number of pushes before it"),
        (
            *("staleness", staleness, 0, pushes - last - 1),
            "the pushes since the replica's last one, as it computes one gradient at "
            "a time",
        ),
    ]
    for name, values, low, high, why in limits:
        fits = (values >= low) & (values <= high) & np.isfinite(values)
        if not fits.all():
            push = int(fits.argmin())
            least, most = (
                np.broadcast_to(limit, len(time))[push] for limit in (low, high)
            )
            allowed = f"{least} and more" if most == np.inf else f"{least} to {most}"
            raise ValueError(
                f"line {lines[push]}: {name} is {values[push]}; allowed is {allowed}, "
                f"{why}"
            )
    header = plain_header(int(replica.max()) + 1, len(time))
    return header, push_by_push(base[:, None], replica, np.concatenate([[0.0], time]))


def _last_own(replica: np.ndarray) -> np.ndarray:
    """Gives each push its replica's push before, -1 if there is none."""
    order = np.argsort(replica, kind="stable")
    same = replica[order[1:]] == replica[order[:-1]]
    last = np.full(len(replica), -1)
    last[order[1:][same]] = order[:-1][same]
    return last


def plain_header(replicas: int, steps: int, shards: int = 1) -> dict[str, Any]:
    """Returns the header of a run that fetches and pushes every time."""
    return {
        "replicas": replicas,
        "shards": shards,
        "steps": steps,
        "n_fetch": 1,
        "n_push": 1,
        "overlap": False,
        "warmstart_steps": 0,
        "protocol": "delays",
    }


def push_by_push(
    base: np.ndarray, replica: np.ndarray, clock: np.ndarray
) -> dict[str, Any]:
    """Returns the columns of a run: a fetch and a push a shard for each minibatch.

    Args:
        base: of each push on each shard, `[pushes, shards]`.
        replica: whose it is, `[pushes]`.
        clock: when version 0, 1, ... was made, `[pushes + 1]`.

    Returns:
        Columns for `Trace.from_columns`.
    """
    pushes, shards = base.shape
    steps = np.arange(pushes)
    order = np.argsort(base, axis=None, kind="stable")
    fetched = base.ravel()[order]
    gradient, of_shard = np.divmod(order, shards)
    # At version v stand the fetches of v, then minibatch v and its pushes.
    waiting = np.searchsorted(fetched, steps, side="right")
    own = groups.running_sum((replica,), np.ones_like(steps)) - 1
    fetch = np.arange(len(order)) + (1 + shards) * fetched
    compute = waiting + (1 + shards) * steps
    push = (compute[:, None] + np.arange(1, 1 + shards)).ravel()

    def column(at_fetch, at_compute, at_push, dtype=np.int64):
        values = np.empty((1 + 2 * shards) * pushes, dtype)
        values[fetch], values[compute], values[push] = at_fetch, at_compute, at_push
        return values

    def every(of_push):
        return np.repeat(of_push, shards)

    seen, made = clock[fetched], clock[1:]
    begun = clock[base.max(axis=1)]  # once its last fetch is there
    return {
        "kind": column(FETCH, COMPUTE, PUSH, np.uint8),
        "time": column(seen, made, every(made), np.float64),
        "start": column(seen, begun, every(made), np.float64),
        "replica": column(replica[gradient], replica, every(replica), np.int32),
        "shard": column(of_shard, -1, np.tile(np.arange(shards), pushes), np.int32),
        "step": column(gradient, steps, every(steps)),
        "batch": column(-1, own, -1),
        "version": column(fetched, -1, every(steps + 1)),
        "base": column(-1, -1, base.ravel()),
        "count": column(0, 0, 1, np.int32),
        "id": column(-1, -1, every(own)),
    }


def _checked_delays(delays: Any) -> np.ndarray:
    delays = np.asarray(delays)
    if delays.ndim not in (1, 2) or not delays.size or delays.dtype.kind not in "iu":
        raise ValueError(
            "delays must be an int array [steps] or [steps, shards] with at least one "
            f"step, not {delays.dtype} of shape {delays.shape}"
        )
    step = np.arange(len(delays)).reshape(-1, *[1] * (delays.ndim - 1))
    wrong = (delays < 0) | (delays > step)
    if wrong.any():
        at = [int(i[0]) for i in np.nonzero(wrong)]
        raise ValueError(
            f"delays{at} is {delays[tuple(at)]}; it must be from 0 to {at[0]}, the "
            "number of updates before that step"
        )
    return delays.astype(np.int64)


def _assign(order: np.ndarray, replicas: int) -> np.ndarray:
    """Gives each gradient `[n]` the replica that has been free for longest."""
    # Pushes free replicas in the order 0, 1, 2, ..., so the k-th fetch goes to the
    # replica that pushed gradient k - replicas: a first-in-first-out queue.
    replica = [0] * len(order)
    for k, gradient in enumerate(order.tolist()):
        replica[gradient] = k if k < replicas else replica[k - replicas]
    return np.asarray(replica, np.int64)


def causal_order(trace: "Trace") -> np.ndarray:
    """Returns the order `[rows]`, nearest to the clock, in which rows can have been.

    Args:
        trace: rows in any order, with values in range.

    Returns:
        Indices of the rows, in a causal order.

    Raises:
        ValueError: if there is none, because events wait for one another in a circle.
    """
    before, after = _dependencies(trace)
    rows = len(trace)
    by_cause = np.argsort(before, kind="stable")
    effects = after[by_cause].tolist()
    ends = np.cumsum(np.bincount(before, minlength=rows)).tolist()
    missing = np.bincount(after, minlength=rows).tolist()
    time = trace.time.tolist()
    ready = [(time[row], row) for row in range(rows) if not missing[row]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, row = heapq.heappop(ready)
        order.append(row)
        for effect in effects[ends[row - 1] if row else 0 : ends[row]]:
            missing[effect] -= 1
            if not missing[effect]:
                heapq.heappush(ready, (time[effect], effect))
    if len(order) < rows:
        stuck = next(row for row in range(rows) if missing[row])
        raise ValueError(
            f"the events have no causal order: row {stuck} waits for itself by way of "
            "others; look at its version, replica and time"
        )
    return np.asarray(order, np.int64)


def _dependencies(trace: "Trace") -> tuple[np.ndarray, np.ndarray]:
    """Returns which row must come before which, both `[n]`."""
    edges = []

    def chain(rows, group, *keys):
        """Within a group, rows go one after another by the keys, first key first."""
        rows = rows[np.lexsort([key[rows] for key in (*keys[::-1], *group[::-1])])]
        same = np.ones(max(len(rows) - 1, 0), bool)
        for key in group:
            same &= key[rows[1:]] == key[rows[:-1]]
        edges.append((rows[:-1][same], rows[1:][same]))

    pushing = trace.kind == PUSH
    pushes, others = np.flatnonzero(pushing), np.flatnonzero(~pushing)
    place = np.arange(len(trace))
    turn = np.argsort(_TURN)[trace.kind]
    # A replica has one clock of its own, and a shard counts incarnations and versions.
    of_replica = trace.replica[others] >= 0
    of_replicas, of_shards = others[of_replica], others[~of_replica]
    chain(of_replicas, (trace.replica,), trace.time, trace.start, turn, place)
    restarts = history.restorations(trace)
    line = np.concatenate([restarts, pushes])
    chain(line, (trace.shard,), trace.incarnation, pushing, trace.version)
    chain(of_shards, (trace.shard,), trace.incarnation, trace.kind)  # FAIL, RESTART
    chain(pushes, (trace.replica, trace.shard), trace.incarnation, trace.id)
    state = trace.shard, trace.incarnation, trace.version
    fetches = np.flatnonzero(trace.kind == FETCH)
    edges.append(_match(state, pushes, fetches))
    edges.append(_match(state[:2], restarts, fetches))
    computes = np.flatnonzero(trace.kind == COMPUTE)
    ticketed = pushes[trace.step[pushes] >= 0]
    edges.append(_match((trace.replica, trace.step), computes, ticketed))
    edges.append(_computed(trace, computes, pushes))
    before, after = zip(*edges, strict=True)
    return np.concatenate(before), np.concatenate(after)


def _match(
    keys: groups.Keys, causes: np.ndarray, effects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs each effect with the cause of the same keys, where there is one."""
    rows = np.concatenate([causes, effects])
    key = groups.combine(tuple(key[rows] for key in keys))
    number = np.unique(key, return_inverse=True)[1]
    cause = np.full(len(rows), -1, np.int64)
    cause[number[: len(causes)]] = causes
    found = cause[number[len(causes) :]]
    return found[found >= 0], effects[found >= 0]


def _computed(
    trace: "Trace", computes: np.ndarray, pushes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A push comes after as many minibatches as its replica has pushed by then."""
    if not len(computes) or not len(pushes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    computes = computes[np.lexsort((trace.batch[computes], trace.replica[computes]))]
    begin = np.searchsorted(trace.replica[computes], trace.replica[pushes])
    end = np.searchsorted(trace.replica[computes], trace.replica[pushes], "right")
    pushes_order = np.argsort(trace.id[pushes], kind="stable")
    summed = np.empty(len(pushes), np.int64)
    ordered = pushes[pushes_order]
    keys = trace.replica[ordered], trace.shard[ordered]
    # A restored shard may handle a push that it has lost once more.
    news = groups.first((*keys, trace.id[ordered]))
    count = np.where(news, trace.count[ordered], 0)
    summed[pushes_order] = groups.running_sum(keys, count)
    last = begin + summed - 1
    there = (summed > 0) & (last < end)
    return computes[last[there]], pushes[there]
