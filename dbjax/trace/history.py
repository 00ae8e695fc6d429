"""Shards that were restored from snapshots: which versions they share with what was.

The rule of a push's staleness is `missed`, which a live shard calls as well; what of it
was taken is for protocols.
"""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbjax.trace import groups
from dbjax.trace.columns import COMPUTE, FETCH, RESTART

if TYPE_CHECKING:
    from dbjax.trace.table import Trace


def missed(version: int, base: int, incarnation: int, origins: Sequence[int]) -> int:
    """Counts the pushes that a shard has handled and a push has not seen.

    Where the shard has lost version `base`, what its replica saw last of the shard's
    own history is the version that the shard was restored from.

    Args:
        version: the shard's, before the push.
        base: the version that the push's oldest gradient was computed on.
        incarnation: the shard's incarnation that `base` is a version of.
        origins: the versions that the shard's incarnations 1, 2, ... began from.

    Returns:
        The push's staleness.

    Examples:
        >>> missed(7, 5, 0, ())
        2
        >>> missed(7, 5, 0, (4,)), missed(7, 5, 1, (4,)), missed(7, 3, 0, (4,))
        (3, 2, 4)
    """
    return version - min((base, *origins[incarnation:]))


def missed_taken(version: int, missed: int, dropped: Sequence[int]) -> int:
    """Counts those of the missed pushes that the protocol did not drop.

    Args:
        version: the shard's, before the push.
        missed: the push's staleness.
        dropped: the versions that dropped pushes made, ascending.

    Returns:
        How many updates the push has missed.

    Examples:
        >>> missed_taken(7, 3, (2, 6)), missed_taken(7, 5, (2, 6))
        (2, 4)
        >>> missed_taken(7, 6, (2, 6))
        4
    """
    return missed - len(dropped) + bisect.bisect_right(dropped, version - missed)


def restorations(trace: "Trace") -> np.ndarray:
    """Finds the RESTART rows of shards, `[restorations]`."""
    return np.flatnonzero((trace.kind == RESTART) & (trace.shard >= 0))


def origins(trace: "Trace") -> list[list[int]]:
    """Gives, by shard, the versions that its incarnations 1, 2, ... began from."""
    begun: list[list[int]] = [[] for _ in range(trace.header["shards"])]
    for row in restorations(trace):
        begun[trace.shard[row]].append(int(trace.version[row]))
    return begun


def sources(trace: "Trace", pushes: np.ndarray) -> np.ndarray:
    """Finds the FETCH rows whose versions the oldest gradients were computed on.

    Args:
        trace: the Trace.
        pushes: PUSH rows, `[n]`.

    Returns:
        The row of the FETCH in force at each one's oldest gradient, -1 if none was.
    """
    computes = np.flatnonzero(trace.kind == COMPUTE)
    fetches = np.flatnonzero(trace.kind == FETCH)
    if not len(computes) or not len(fetches):
        return np.full(len(pushes), -1)
    computes = computes[np.argsort(trace.replica[computes], kind="stable")]
    # A push holds its replica's `count` newest gradients up to the ticket in `step`.
    step = trace.step[computes]
    by_step = np.argsort(step, kind="stable")
    found = np.searchsorted(step[by_step], trace.step[pushes])
    newest = by_step[np.minimum(found, len(step) - 1)]
    oldest = newest + 1 - np.maximum(trace.count[pushes], 1)
    known = (step[newest] == trace.step[pushes]) & (oldest >= 0)
    row = computes[np.maximum(oldest, 0)]
    known &= trace.replica[row] == trace.replica[pushes]
    # The last FETCH row before that one, of the same replica and shard.
    stream = groups.combine(
        tuple(
            np.concatenate([column[fetches], column[pushes]])
            for column in (trace.replica, trace.shard)
        )
    )
    mine, wanted = stream[: len(fetches)], stream[len(fetches) :]
    by_stream = np.argsort(mine, kind="stable")
    at = mine[by_stream] * len(trace) + fetches[by_stream]
    last = np.searchsorted(at, wanted * len(trace) + row) - 1
    source = by_stream[np.maximum(last, 0)]
    known &= (last >= 0) & (mine[source] == wanted)
    return np.where(known, fetches[source], -1)


def base_incarnations(trace: "Trace", pushes: np.ndarray) -> np.ndarray:
    """Gives the incarnation that each push's `base` is a version of, `[n]`."""
    source = sources(trace, pushes)
    own = trace.incarnation[pushes]
    return np.where(source >= 0, trace.incarnation[source], own)


def staleness(trace: "Trace", pushes: np.ndarray) -> np.ndarray:
    """Gives the staleness of PUSH rows `[n]`, int64; -1 where the base is not known."""
    version, base = trace.version[pushes] - 1, trace.base[pushes]
    result = np.where(base >= 0, version - base, -1)
    later = np.flatnonzero((trace.incarnation[pushes] > 0) & (base >= 0))
    if len(later):
        rows, begun = pushes[later], origins(trace)
        columns = (
            *(version[later], base[later], base_incarnations(trace, rows)),
            *(trace.shard[rows], trace.incarnation[rows]),
        )
        result[later] = [
            missed(version, base, of, begun[shard][:incarnation])
            for version, base, of, shard, incarnation in np.stack(columns, 1).tolist()
        ]
    return result
