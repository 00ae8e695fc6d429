"""The records of many processes in one causal order."""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from dbjax.runtime.recorder import COLUMNS
from dbjax.trace import COMPUTE, FETCH, PUSH, RESTART

Row = Sequence[Any]
_KIND, _TIME, _REPLICA, _SHARD, _STEP, _VERSION, _INCARNATION = (
    COLUMNS.index(name)
    for name in "kind time replica shard step version incarnation".split()
)


class CausalOrder:
    """Merges rows so that causes come first, else by their times.

    A replica's rows stay in its order and a shard's in its own. A fetch stands after
    the push that made its version, a push after its newest gradient. Clocks of several
    machines may differ; they decide nothing where one row is another's cause.

    Args:
      shards: how many.

    Attributes:
      gaps: rows whose cause nobody knows.
    """

    def __init__(self, shards: int) -> None:
        self.gaps = 0
        self._made = {(shard, 0): 0 for shard in range(shards)}
        self._computed: set[int] = set()

    def begin_at(self, versions: Iterable[tuple[int, int]]) -> None:
        """Go on after a resume: `(version, incarnation)` of each shard."""
        for shard, (version, incarnation) in enumerate(versions):
            self._made[shard, incarnation] = version

    def merge(self, lines: Iterable[Sequence[Row]]) -> list[Row]:
        """Put rows in order, after all that were merged before.

        Args:
          lines: a sequence for each replica and each shard; each its own order.

        Returns:
          All rows. Where a cause is missing, which nobody alive knows of, the row
          stands where its time is, and `gaps` counts it.
        """
        queues = [list(reversed(line)) for line in lines]
        waiting: dict[Any, list[int]] = {}
        ready: list[tuple[float, int]] = []
        merged: list[Row] = []

        def line_up(queue: int) -> None:
            """See whether the first row of a queue has its cause, or waits for it."""
            if not queues[queue]:
                return
            row = queues[queue][-1]
            cause = self._missing(row)
            if cause is None:
                heapq.heappush(ready, (row[_TIME], queue))
            else:
                waiting.setdefault(cause, []).append(queue)

        for queue in range(len(queues)):
            line_up(queue)
        while any(queues):
            if not ready:
                stuck = [i for i, line in enumerate(queues) if line]
                queue = min(stuck, key=lambda i: queues[i][-1][_TIME])
                ready.append((0.0, queue))
                self.gaps += 1
            _, queue = heapq.heappop(ready)
            row = queues[queue].pop()
            merged.append(row)
            for effect in self._happened(row):
                for other in waiting.pop(effect, ()):
                    line_up(other)
            line_up(queue)
        return merged

    def _missing(self, row: Row) -> Any:
        """Name the event that must come before a row, None if it has."""
        if row[_KIND] == FETCH:
            shard, version = (row[_SHARD], row[_INCARNATION]), row[_VERSION]
            if self._made.get(shard, -1) < version:
                return *shard, version
        if row[_KIND] == PUSH and row[_STEP] not in self._computed:
            return row[_STEP]
        return None

    def _happened(self, row: Row) -> Iterable[Any]:
        if row[_KIND] == COMPUTE:
            self._computed.add(row[_STEP])
            return (row[_STEP],)
        if row[_KIND] == PUSH or (row[_KIND] == RESTART and row[_SHARD] >= 0):
            shard, version = (row[_SHARD], row[_INCARNATION]), row[_VERSION]
            self._made[shard] = version
            return ((*shard, version),)
        return ()
