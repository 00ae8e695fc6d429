"""What a Trace tells about its run; every function takes whole columns at once."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dbjax.trace import columns, groups, history

if TYPE_CHECKING:
    from dbjax.trace.table import Trace


def duration(trace: "Trace") -> float:
    """Time from the first start to the last end; 0 for an empty Trace."""
    return float(trace.time.max() - trace.start.min()) if len(trace) else 0.0


def minibatches(trace: "Trace") -> np.ndarray:
    """Minibatches computed by each replica, `[replicas]` int64."""
    computed = trace.replica[trace.kind == columns.COMPUTE]
    return np.bincount(computed, minlength=trace.header["replicas"])


def samples(trace: "Trace") -> np.ndarray:
    """Examples seen by each replica, `[replicas]`; needs `header["batch_size"]`."""
    if "batch_size" not in trace.header:
        raise ValueError(
            "header['batch_size'] is missing, so samples cannot be counted; "
            "minibatches_per_replica() does not need it"
        )
    return minibatches(trace) * int(trace.header["batch_size"])


def utilisation(trace: "Trace") -> np.ndarray:
    """Share of the run that each replica spent computing, `[replicas]`."""
    computing = trace.kind == columns.COMPUTE
    busy = np.bincount(
        trace.replica[computing],
        weights=trace.time[computing] - trace.start[computing],
        minlength=trace.header["replicas"],
    )
    length = duration(trace)
    return busy / length if length > 0 else np.zeros_like(busy)


def throughput(trace: "Trace") -> float:
    """Minibatches of all replicas per unit of time; 0 where no time passed."""
    length = duration(trace)
    computed = np.count_nonzero(trace.kind == columns.COMPUTE)
    return computed / length if length > 0 else 0.0


def push_index(trace: "Trace") -> tuple[np.ndarray, np.ndarray]:
    """Tells which push each PUSH row belongs to.

    Returns:
        `(rows, push)`, both `[PUSH rows]`: where the rows stand in the Trace, and the
        number of their push, counted by the first row of each `(replica, id)`.
    """
    rows = np.flatnonzero(trace.kind == columns.PUSH)
    # A restored shard may handle a push that it has lost once more.
    if trace.header["shards"] == 1 and not trace.incarnation.any():
        return rows, np.arange(len(rows))
    replica, ids = trace.replica[rows], trace.id[rows]
    # One slot per (replica, id): a table beats a sort, as ids count from 0.
    sizes = np.zeros(trace.header["replicas"], np.int64)
    np.maximum.at(sizes, replica, ids + 1)
    slots = int(sizes.sum())
    if slots > 8 * len(rows) + 1024:  # sparse ids, as in a Trace made by hand
        key = groups.combine((replica, ids))
        slot = np.unique(key, return_inverse=True)[1]
        slots = len(rows)
    else:
        slot = (np.cumsum(sizes) - sizes)[replica] + ids
    place = np.arange(len(rows))
    first = np.zeros(slots, np.int64)
    first[slot[::-1]] = place[::-1]  # the last assignment wins: the first row
    number = np.cumsum(first[slot] == place) - 1
    return rows, number[first[slot]]


def staleness(trace: "Trace") -> np.ndarray:
    """Updates that each push missed on each shard, int64 `[pushes, shards]`.

    Its entry is `version - 1 - base` (see `history.missed` for shards that lost the
    base), and -1 where a shard never saw the push or the base is not known. Rows stand
    in the order of the pushes' first PUSH rows.
    """
    rows, push = push_index(trace)
    pushes = int(push.max()) + 1 if len(push) else 0
    result = np.full((pushes, trace.header["shards"]), -1, np.int64)
    result[push, trace.shard[rows]] = history.staleness(trace, rows)
    return result


def lost(trace: "Trace") -> dict[str, int]:
    """What did not reach the parameters.

    Returns:
        `gradients`: accrued gradients that replicas' failures took; `updates`: versions
        that shards' failures took; `not_finite` and `dropped`: pushes, each counted
        once however many shards refused it.
    """
    failed = trace.kind == columns.FAIL
    of_shard = trace.replica < 0
    rows, push = push_index(trace)
    status = trace.status[rows]
    return {
        "gradients": int(trace.count[failed & ~of_shard].sum(dtype=np.int64)),
        "updates": int(trace.count[failed & of_shard].sum(dtype=np.int64)),
        "not_finite": len(np.unique(push[status == columns.NOT_FINITE])),
        "dropped": len(np.unique(push[status == columns.DROPPED])),
    }


def partition_bytes(trace: "Trace") -> np.ndarray:
    """Bytes that partitions and shards exchanged, int64 `[partitions, shards]`.

    A fetch brings each partition what it holds of a shard; a push takes from it what it
    owns there. What crosses shards that a partition holds nothing of is 0.
    """
    header = trace.header
    shards = header["shards"]
    if "fetch_bytes" not in header:  # a replica is one partition
        sent = trace.shard >= 0
        total = np.bincount(trace.shard[sent], trace.bytes[sent], shards)
        return total[None].astype(np.int64)
    counts = {
        kind: np.bincount(trace.shard[trace.kind == kind], minlength=shards)
        for kind in (columns.FETCH, columns.PUSH)
    }
    fetched = np.array(header["fetch_bytes"], np.int64) * counts[columns.FETCH]
    return fetched + np.array(header["push_bytes"], np.int64) * counts[columns.PUSH]


def summary(trace: "Trace") -> dict[str, Any]:
    """The figures of a run in one JSON-able dict."""
    stale = staleness(trace)
    known = stale[stale >= 0]
    return {
        "rows": len(trace),
        "replicas": trace.header["replicas"],
        "shards": trace.header["shards"],
        "duration": duration(trace),
        "minibatches": int(minibatches(trace).sum()),
        "pushes": len(stale),
        "fetches": int(np.count_nonzero(trace.kind == columns.FETCH)),
        "bytes": int(trace.bytes.sum()),
        "throughput": throughput(trace),
        "utilisation": float(utilisation(trace).mean()),
        "staleness_mean": float(known.mean()) if len(known) else 0.0,
        "staleness_max": int(known.max(initial=0)),
        "lost": lost(trace),
    }
