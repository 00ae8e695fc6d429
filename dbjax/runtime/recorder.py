"""The rows of a live run's Trace."""

import time
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "kind time start replica shard step batch version base count status bytes id "
    "incarnation"
).split()


class Recorder:
    """Rows of the Trace, appended in causal order by whoever makes them.

    Args:
      offset: seconds that the run has lasted already, where it is resumed.
      zero: when the run began, by the clock that all machines share (`time.time`); None
        for now, by the clock of this process, which is never set.

    Attributes:
      rows: one value for each of `COLUMNS`.
      digests: `(shard, version, checksum)` of some versions.
    """

    def __init__(self, offset: float = 0.0, zero: float | None = None) -> None:
        if zero is None:
            self._zero = time.perf_counter() - offset
        else:
            self._zero = time.perf_counter() - (time.time() - zero)
        self.rows: list[Sequence[Any]] = []
        self.digests: list[tuple[int, int, int]] = []

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero

    def zero(self) -> float:
        """When the run began, by the clock that all machines share."""
        return time.time() - self.now()

    def make_row(
        self, kind: int, replica: int, start: float | None = None, **columns: int
    ) -> list[Any]:
        """Make a row that ends now, for whoever keeps it."""
        self.add(kind, replica, self.now() if start is None else start, **columns)
        return self.rows.pop()  # type: ignore[return-value]

    def add(
        self, kind: int, replica: int, start: float, shard: int = -1, step: int = -1,
        batch: int = -1, version: int = -1, base: int = -1, count: int = 0,
        status: int = 0, nbytes: int = 0, id_: int = -1, incarnation: int = 0,
    ) -> list[Any]:  # fmt: skip
        """Append a row that ends now; give it, for what turns out about it later."""
        row = [
            kind, self.now(), start, replica, shard, step, batch, version, base, count,
            status, nbytes, id_, incarnation,
        ]  # fmt: skip
        self.rows.append(row)
        return row

    def columns(self) -> dict[str, Any]:
        """The rows as Trace columns."""
        values = zip(*self.rows, strict=True) if self.rows else [[]] * len(COLUMNS)
        return dict(zip(COLUMNS, map(list, values), strict=True))
