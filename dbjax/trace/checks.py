"""Whether the rows of a Trace can have happened in the order in which they stand."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dbjax.trace import columns, groups
from dbjax.trace.columns import COMPUTE, FAIL, FETCH, PUSH, RESTART

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

# The first row that breaks a law, and how.
Offence = tuple[int, str]


def check_ranges(trace: "Trace") -> None:
    """Raises ValueError naming the first row that holds a value out of range."""
    _raise_first(trace, _ranges(trace))


def check_order(trace: "Trace") -> None:
    """Raises ValueError naming the first row that cannot stand where it does.

    The Trace must have passed `check_ranges`.
    """
    _raise_first(trace, _order(trace))


def _raise_first(trace: "Trace", offences: Iterator[Offence]) -> None:
    first = min(offences, default=None)
    if first is not None:
        row, complaint = first
        where = columns.describe_row(trace, row)
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
    finite = np.isfinite(trace.time) & np.isfinite(trace.start)
    yield from _first(every, ~finite, lambda row, at: "its time or start is not finite")


def _order(trace: "Trace") -> Iterator[Offence]:
    version, base = trace.version, trace.base
    rows = np.flatnonzero((trace.kind == FETCH) | (trace.kind == PUSH))
    pushing = trace.kind[rows] == PUSH
    made = groups.running_sum((trace.shard[rows], trace.incarnation[rows]), pushing)
    yield from _first(
        rows,
        pushing & (version[rows] != made),
        lambda row, at: (
            f"version is {version[row]}; the pushes of a shard make versions "
            f"1, 2, 3, ..., and {made[at]} is the next"
        ),
    )
    yield from _first(
        rows,
        ~pushing & (version[rows] > made),
        lambda row, at: f"it fetches version {version[row]} before a push has made it",
    )
    rows = rows[pushing]
    # In a later incarnation the base may be a version of an earlier one.
    known = trace.incarnation[rows] == 0
    yield from _first(
        rows,
        known & ((base[rows] < 0) | (base[rows] >= version[rows])) | (base[rows] < -1),
        lambda row, at: (
            f"base is {base[row]}; it must be from 0 to {version[row] - 1}, "
            "the version before the push"
        ),
    )
    sender = trace.replica[rows], trace.shard[rows]
    yield from _first(
        rows,
        groups.not_rising(sender, trace.id[rows], least=1),
        lambda row, at: f"id {trace.id[row]} is not above the replica's push before it",
    )
    yield from _gradients(trace)


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
    pushed = groups.running_sum(
        (trace.replica[rows], trace.shard[rows]), trace.count[rows]
    )
    yield from _first(
        rows,
        pushed > computed,
        lambda row, at: (
            f"the replica has pushed {pushed[at]} gradients and computed {computed[at]}"
        ),
    )
