"""Whether the rows of a Trace can have happened in the order in which they stand."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dbjax.trace import columns, groups, history
from dbjax.trace.columns import COMPUTE, FAIL, FETCH, PUSH, RESTART

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

# The first row that breaks a law, and how.
Offence = tuple[int, str]


def check_ranges(trace: "Trace") -> None:
    """Raises ValueError naming the first row that holds a value out of range."""
    _raise_first(trace, _ranges(trace))


def check_order(trace: "Trace", given: np.ndarray | None = None) -> None:
    """Raises ValueError naming the first row that cannot stand where it does.

    The Trace must have passed `check_ranges`. Rows that were put in this order are
    named by where they stood before, `given` `[rows]`.
    """
    _raise_first(trace, _order(trace), given)


def _raise_first(
    trace: "Trace", offences: Iterator[Offence], given: np.ndarray | None = None
) -> None:
    first = min(offences, default=None)
    if first is not None:
        row, complaint = first
        number = row if given is None else int(given[row])
        where = columns.describe_row(trace, row, number)
        raise ValueError(f"the Trace breaks at {where}: {complaint}")


def _first(
    rows: np.ndarray, offends: np.ndarray, complain: Callable[[int, int], str]
) -> Iterator[Offence]:
    """Gives the first of `rows` `[n]` that `offends`, if one does.

    `complain` takes the row and its place in `rows`.
    """
    if offends.any():
        at = int(offends.argmax())
        yield int(rows[at]), complain(int(rows[at]), at)


def _ranges(trace: "Trace") -> Iterator[Offence]:
    every = np.arange(len(trace))
    of_shard = np.isin(trace.kind, (FETCH, PUSH))
    may_be_shards = np.isin(trace.kind, (FAIL, RESTART)) & (trace.shard >= 0)
    limits = {
        "kind": (0, len(columns.KIND_NAMES) - 1),
        "status": (0, len(columns.STATUS_NAMES) - 1),
        "replica": (-may_be_shards.astype(int), trace.header["replicas"] - 1),
        "shard": (of_shard - 1, trace.header["shards"] - 1),
        "version": (of_shard - 1, np.iinfo(np.int64).max),
        "count": (0, np.iinfo(np.int32).max),
        "incarnation": (0, np.iinfo(np.int32).max),
        "id": (np.where(trace.kind == PUSH, 0, -1), np.iinfo(np.int64).max),
        "batch": (np.where(trace.kind == COMPUTE, 0, -1), np.iinfo(np.int64).max),
    }
    for name, (low, high) in limits.items():
        values = getattr(trace, name)
        least = np.broadcast_to(low, len(trace))
        yield from _first(
            every,
            (values < low) | (values > high),
            lambda row, at, v=values, low=least, name=name, high=high: (
                f"{name} is {v[row]}; it must be from {low[row]} to {high}"
            ),
        )
    for name in ("time", "start"):
        values = getattr(trace, name)
        yield from _first(
            every,
            ~np.isfinite(values),
            lambda row, at, v=values, name=name: (
                f"{name} is {v[row]}; it must be finite"
            ),
        )


def _order(trace: "Trace") -> Iterator[Offence]:
    yield from _versions(trace)
    yield from _bases(trace)
    rows = np.flatnonzero(trace.kind == PUSH)
    # A restored shard may handle a push that it has lost once more.
    sender = trace.replica[rows], trace.shard[rows], trace.incarnation[rows]
    yield from _first(
        rows,
        groups.not_rising(sender, trace.id[rows], least=1),
        lambda row, at: f"id {trace.id[row]} is not above the replica's push before it",
    )
    yield from _gradients(trace)


def _versions(trace: "Trace") -> Iterator[Offence]:
    """Incarnations follow RESTART rows; versions count on from what these name."""
    restarts = history.restorations(trace)
    named = (trace.kind == FETCH) | (trace.kind == PUSH)
    named[restarts] = True
    rows = np.flatnonzero(named)
    shard, version = trace.shard[rows], trace.version[rows]
    kind, incarnation = trace.kind[rows], trace.incarnation[rows]
    pushing, fetching, restarting = kind == PUSH, kind == FETCH, kind == RESTART
    # The shard's incarnation by its RESTART rows; the row's, and where that began.
    now = of = begin = np.zeros(len(rows), np.int64)
    if len(restarts):
        now = groups.running_sum((shard,), restarting)
        of = np.where(restarting, now - 1, np.minimum(incarnation, now))
        begun = np.zeros((shard.max() + 1, now.max() + 1), np.int64)
        begun[shard[restarting], now[restarting]] = version[restarting]
        begin = begun[shard, of]
    made = begin + groups.running_sum((shard, of), pushing)
    yield from _first(
        rows,
        (incarnation > now) | (~fetching & (incarnation < now)),
        lambda row, at: (
            f"incarnation is {incarnation[at]}; by its RESTART rows the shard is in "
            f"incarnation {now[at]}"
        ),
    )
    yield from _first(
        rows,
        pushing & (version != made),
        lambda row, at: (
            f"version is {version[at]}; the pushes of a shard make versions "
            f"1, 2, 3, ..., and {made[at]} is the next"
        ),
    )
    yield from _first(
        rows,
        fetching & (version > made),
        lambda row, at: f"it fetches version {version[at]} before a push has made it",
    )
    yield from _first(
        rows,
        fetching & (version < begin),
        lambda row, at: (
            f"it fetches version {version[at]} of an incarnation that began from "
            f"version {begin[at]}"
        ),
    )
    yield from _first(
        rows,
        restarting & ((version < 0) | (version > made)),
        lambda row, at: (
            f"version is {version[at]}; it must be from 0 to {made[at]}, the newest "
            "of the incarnation before"
        ),
    )


def _bases(trace: "Trace") -> Iterator[Offence]:
    version, base = trace.version, trace.base
    rows = np.flatnonzero(trace.kind == PUSH)
    later = trace.incarnation[rows] > 0
    yield from _first(
        rows,
        ~later & ((base[rows] < 0) | (base[rows] >= version[rows])),
        lambda row, at: (
            f"base is {base[row]}; it must be from 0 to {version[row] - 1}, "
            "the version before the push"
        ),
    )
    if later.any():
        # It may be a version of an earlier incarnation: see what was fetched.
        rows = rows[later]
        source = history.sources(trace, rows)
        fetched = np.where(source >= 0, version[source], -1)
        yield from _first(
            rows,
            (base[rows] != fetched) | (source < 0),
            lambda row, at: (
                f"base is {base[row]}; its oldest gradient was computed on version "
                f"{fetched[at]}"
                if source[at] >= 0
                else "the replica had fetched nothing to compute its oldest gradient on"
            ),
        )


def _gradients(trace: "Trace") -> Iterator[Offence]:
    rows = np.flatnonzero(trace.kind == COMPUTE)
    yield from _first(
        rows,
        groups.not_rising((trace.replica[rows],), trace.batch[rows], least=0),
        lambda row, at: (
            f"minibatch {trace.batch[row]} goes back in its replica's stream"
        ),
    )
    rows = np.flatnonzero((trace.kind == COMPUTE) | (trace.kind == PUSH))
    pushing = trace.kind[rows] == PUSH
    computed = groups.running_sum((trace.replica[rows],), ~pushing)[pushing]
    rows = rows[pushing]
    sender, count = (trace.replica[rows], trace.shard[rows]), trace.count[rows]
    if trace.incarnation[rows].any():
        count = np.where(groups.first((*sender, trace.id[rows])), count, 0)
    pushed = groups.running_sum(sender, count)
    yield from _first(
        rows,
        pushed > computed,
        lambda row, at: (
            f"the replica has pushed {pushed[at]} gradients and computed {computed[at]}"
        ),
    )
