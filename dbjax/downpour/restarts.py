"""Restored shards in a plan: every state under one number, and what must be kept.

A shard's states are numbered by its pushes in the Trace's order, lost or not, so that
a plan can treat them as versions of a shard that was never lost.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dbjax.trace import FETCH, PUSH, Trace, history


class Restart(NamedTuple):
    """A shard goes back to one of its states.

    Attributes:
      row: the plan's row that begins with it.
      shard: whose state.
      incarnation: the shard's, from then on.
      made: the plan's row that makes the state, -1: it is the first one.
    """

    row: int
    shard: int
    incarnation: int
    made: int


def number_states(trace: Trace) -> Trace:
    """Put the number of the state in place of each version.

    Args:
      trace: with restored shards.

    Returns:
      The Trace with other `version` and `base`.

    Raises:
      ValueError: it has an incarnation that no RESTART row begins.
    """
    version, base = trace.version.copy(), trace.base.copy()
    pushes = np.flatnonzero(trace.kind == PUSH)
    of_base = np.zeros_like(trace.incarnation)
    of_base[pushes] = history.base_incarnations(trace, pushes)
    restarts = history.restorations(trace)
    for s, begun in enumerate(history.origins(trace)):
        named = np.isin(trace.kind, (FETCH, PUSH)) & (trace.shard == s)
        if trace.incarnation[named].max(initial=0) > len(begun):
            raise ValueError(
                f"the Trace has incarnation {trace.incarnation[named].max()} of shard "
                f"{s}, and {len(begun)} RESTART rows that begin one"
            )
        pushed = pushes[trace.shard[pushes] == s]
        again = restarts[trace.shard[restarts] == s]
        before = np.searchsorted(pushed, again)
        begins = list(zip(begun, before.tolist(), strict=True))
        version[named] = _number(trace.incarnation[named], version[named], begins)
        base[pushed] = _number(of_base[pushed], base[pushed], begins)
        version[again] = _number(np.arange(len(again)), version[again], begins)
    return dataclasses.replace(trace, version=version, base=base)


def _number(
    incarnation: np.ndarray, version: np.ndarray, begins: list[tuple[int, int]]
) -> np.ndarray:
    """Number states `[n]`; `begins`: for incarnations 1, 2, ..., version and pushes."""
    number = version
    for i, (begin, pushes) in enumerate(begins, 1):
        # What is not above `begin` is a state of an incarnation before.
        own = (incarnation >= i) & (version > begin)
        number = np.where(own, version - begin + pushes, number)
    return number
