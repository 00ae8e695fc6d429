"""What a run would have been, with nobody stale or without some replicas."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from dbjax.trace import making
from dbjax.trace.columns import COMPUTE, FAIL, PUSH, RESTART, TAKEN

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

Parts = tuple[dict[str, Any], dict[str, Any]]


def one_after_the_other(trace: "Trace") -> Parts:
    """Returns header and columns of a run in which nobody is ever stale.

    Args:
        trace: of a run whose pushes were all taken, one gradient each.

    Returns:
        Header and columns for `Trace.from_columns`: the minibatches in the order in
        which shard 0 handled them, each on the version before it.

    Raises:
        ValueError: if the Trace is another.
    """
    _check_plain(trace)
    pushes = np.flatnonzero((trace.kind == PUSH) & (trace.shard == 0))
    pushes = pushes[np.argsort(trace.version[pushes], kind="stable")]
    other = (trace.count[pushes] != 1) | (trace.status[pushes] != TAKEN)
    if other.any():
        raise ValueError(
            f"push {int(other.argmax())} of the Trace sums several gradients or was "
            "not taken; without staleness there is one of each, and it is taken"
        )
    shards, steps = trace.header["shards"], len(pushes)
    clock = np.maximum.accumulate(np.concatenate([[0.0], trace.time[pushes]]))
    base = np.repeat(np.arange(steps)[:, None], shards, axis=1)
    columns = making.push_by_push(base, trace.replica[pushes], clock)
    columns["batch"][columns["kind"] == COMPUTE] = _batches(trace, pushes)
    header = trace.header | making.plain_header(trace.header["replicas"], steps, shards)
    return header | {"protocol": "one after the other"}, columns


def without(trace: "Trace", replicas: tuple[int, ...]) -> "Trace":
    """Returns the Trace of the others: what these replicas did is left out.

    Args:
        trace: of a run in which no shard was restored.
        replicas: who is left out.

    Returns:
        The Trace; its versions and steps are counted anew, nobody's time changes.

    Raises:
        ValueError: if the Trace has no such replica, or nobody else.
    """
    _check_plain(trace)
    count = trace.header["replicas"]
    for replica in replicas:
        if not 0 <= replica < count:
            raise ValueError(f"replica {replica} is not among the {count} of the Trace")
    gone = np.isin(trace.replica, replicas)
    left = trace.take(~gone)
    if not (left.kind == PUSH).any():
        raise ValueError(f"without replicas {replicas} nobody pushes anything")
    fewer = functools.partial(_fewer, trace, gone & (trace.kind == PUSH))
    steps = np.unique(left.step[left.kind == COMPUTE])
    step = np.searchsorted(steps, left.step)
    columns = left.columns() | {
        "version": fewer(left.shard, left.version),
        "base": fewer(left.shard, left.base),
        "step": np.where(left.step >= 0, step, left.step),
    }
    header = trace.header | {"steps": len(steps), "protocol": "without some replicas"}
    return type(trace).from_columns(header, **columns)


def _fewer(
    trace: "Trace", removed: np.ndarray, shard: np.ndarray, version: np.ndarray
) -> np.ndarray:
    """Counts versions without those that are removed; -1 stays."""
    result = version.copy()
    for index in range(trace.header["shards"]):
        missing = np.sort(trace.version[removed & (trace.shard == index)])
        here = (shard == index) & (version >= 0)
        result[here] -= np.searchsorted(missing, version[here], side="right")
    return result


def _batches(trace: "Trace", pushes: np.ndarray) -> np.ndarray:
    """Gives the minibatch of each push of one gradient."""
    computes = np.flatnonzero(trace.kind == COMPUTE)
    by_step = computes[np.argsort(trace.step[computes], kind="stable")]
    found = np.searchsorted(trace.step[by_step], trace.step[pushes])
    rows = by_step[np.minimum(found, len(by_step) - 1)]
    unknown = (trace.step[rows] != trace.step[pushes]) | (
        trace.replica[rows] != trace.replica[pushes]
    )
    if unknown.any():
        raise ValueError(
            f"the Trace does not have the minibatch of push {int(unknown.argmax())}"
        )
    return trace.batch[rows]


def _check_plain(trace: "Trace") -> None:
    if np.isin(trace.kind, (FAIL, RESTART)).any():
        raise ValueError(
            "somebody died in the Trace: what would have been without that is not in it"
        )
