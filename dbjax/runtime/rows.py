"""Rows of a Trace, noted down as they come to light and sorted at the end."""

import itertools
from typing import Any

import numpy as np

from dbjax.trace import COMPUTE, FAIL, FETCH, JOIN, KIND_NAMES, LEAVE, PUSH, RESTART
from dbjax.trace.columns import COLUMNS

# Where a kind's rows stand among those of one turn and time.
_RANK = np.zeros(len(KIND_NAMES), np.int8)
_RANK[[JOIN, RESTART, COMPUTE, PUSH, FETCH, FAIL, LEAVE]] = 0, 0, 1, 2, 3, 4, 4

_FIELDS = {
    "compute": "time turn start replica step batch",
    "push": "time turn start replica shard step version base count status id",
    "fetch": "time turn start replica shard step version",
    "other": "time turn start replica kind step count",
}
_KINDS = {"compute": COMPUTE, "push": PUSH, "fetch": FETCH}

# What rows say, and as what: name -> (dtype, the value that says "none").
_NAMES = tuple(dict.fromkeys(["kind", *" ".join(_FIELDS.values()).split()]))
_TYPES: dict[str, tuple[Any, int]] = COLUMNS | {"turn": (np.int64, 0)}


class Rows:
    """Rows as tuples of numbers, a list per form of row, to which anyone may append.

    The fields are those of `_FIELDS`: Trace columns, and the `turn` (see `Events`).

    Attributes:
      compute: `(time, turn, start, replica, step, batch)`.
      push: `(time, turn, start, replica, shard, step, version, base, count, ...)`.
      fetch: `(time, turn, start, replica, shard, step, version)`.
      other: `(time, turn, start, replica, kind, step, count)`.
    """

    def __init__(self) -> None:
        self.compute: list[tuple] = []
        self.push: list[tuple] = []
        self.fetch: list[tuple] = []
        self.other: list[tuple] = []
        self._packed: dict[str, list[np.ndarray]] = {form: [] for form in _FIELDS}

    def pack(self) -> None:
        """Put what was noted so far into arrays, which are small."""
        for form, fields in _FIELDS.items():
            rows, width = getattr(self, form), len(fields.split())
            numbers = itertools.chain.from_iterable(rows)
            # Integers are exact in a float64 below 2**53.
            table = np.fromiter(numbers, np.float64, len(rows) * width)
            self._packed[form].append(table.reshape(-1, width))
            rows.clear()

    def columns(self, shard_bytes: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Give the columns, sorted by time, by turn, by kind and by shard.

        Args:
          shard_bytes: the size of each shard `[S]`.

        Returns:
          Columns for `Trace.from_columns`.
        """
        self.pack()
        tables = {form: np.concatenate(self._packed[form]) for form in _FIELDS}
        self._packed.clear()
        columns = {name: _column(name, tables) for name in _NAMES}
        del tables
        rank = _RANK[columns["kind"]]
        turn = columns.pop("turn")
        order = np.lexsort((columns["shard"], rank, turn, columns["time"]))
        columns = {name: values[order] for name, values in columns.items()}
        sizes = np.array([*shard_bytes, 0], np.int64)  # shard -1 has none
        columns["bytes"] = sizes[columns["shard"]]
        return columns


def _column(name: str, tables: dict[str, np.ndarray]) -> np.ndarray:
    """Give one column: the rows of each form after those of the form before."""
    dtype, none = _TYPES[name]
    parts = []
    for form, table in tables.items():
        fields = _FIELDS[form].split()
        if name in fields:
            parts.append(table[:, fields.index(name)].astype(dtype))
        else:
            value = _KINDS[form] if name == "kind" else none
            parts.append(np.full(len(table), value, dtype))
    return np.concatenate(parts)
