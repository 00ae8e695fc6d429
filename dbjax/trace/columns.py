"""The vocabulary of a Trace: kinds of rows, statuses, columns and their defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FETCH, COMPUTE, PUSH, JOIN, FAIL, RESTART, LEAVE = range(7)
KIND_NAMES = ("FETCH", "COMPUTE", "PUSH", "JOIN", "FAIL", "RESTART", "LEAVE")

TAKEN, NOT_FINITE, DROPPED = range(3)
STATUS_NAMES = ("TAKEN", "NOT_FINITE", "DROPPED")

SCHEMA = 1

# Name -> (dtype, the value that says "none"), in the order of the dataclass.
COLUMNS: dict[str, tuple[Any, int]] = {
    "kind": (np.uint8, 0),
    "time": (np.float64, 0),
    "start": (np.float64, 0),
    "replica": (np.int32, 0),
    "shard": (np.int32, -1),
    "step": (np.int64, -1),
    "batch": (np.int64, -1),
    "version": (np.int64, -1),
    "base": (np.int64, -1),
    "count": (np.int32, 0),
    "status": (np.uint8, 0),
    "incarnation": (np.int32, 0),
    "bytes": (np.int64, 0),
    "id": (np.int64, -1),
    "digest": (np.uint64, 0),
}


def complete(given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Casts the given columns and fills in those that are missing.

    Args:
        given: columns by name, `[rows]` each or a scalar for a constant column;
            `kind` must be there. A missing `start` is `time` (nothing lasted).

    Returns:
        Every column, with its dtype.

    Raises:
        ValueError: for an unknown column, one that is not `[rows]`, or a value that
            its dtype cannot hold.
    """
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise ValueError(
            f"a Trace has no column {unknown[0]!r}; its columns are {list(COLUMNS)}"
        )
    if "kind" not in given or np.ndim(given["kind"]) != 1:
        raise ValueError("column 'kind' must be given, as an array [rows]")
    rows = len(given["kind"])
    columns = {}
    for name, (dtype, default) in COLUMNS.items():
        if name in given:
            columns[name] = _cast(name, given[name], dtype, rows)
        elif name == "start" and "time" in given:
            columns[name] = columns["time"]
        elif default == 0:
            columns[name] = np.zeros(rows, dtype)  # untouched pages cost no memory
        else:
            columns[name] = np.full(rows, default, dtype)
    return columns


def _cast(name: str, values: Any, dtype: Any, rows: int) -> np.ndarray:
    given = np.asarray(values)
    if given.ndim == 0:
        given = np.full(rows, given)
    if given.shape != (rows,):
        raise ValueError(
            f"column {name!r} has shape {given.shape}; 'kind' has {rows} rows"
        )
    if given.dtype == dtype:
        return given
    if given.dtype.kind not in "iufb":
        raise ValueError(f"column {name!r} has dtype {given.dtype}; it must be numbers")
    with np.errstate(invalid="ignore"):
        cast = given.astype(dtype)
    changed = cast != given
    if np.issubdtype(dtype, np.integer) and changed.any():
        row = int(changed.argmax())
        raise ValueError(
            f"column {name!r}, row {row}: {given[row]} does not fit {np.dtype(dtype)}"
        )
    return cast


def describe_row(trace: Any, row: int, number: int | None = None) -> str:
    """One row in words, for error messages: `row 7 (PUSH, replica 3, shard 0)`.

    `number` is what it is called, if that is not where it stands.
    """
    kind = int(trace.kind[row])
    name = KIND_NAMES[kind] if kind < len(KIND_NAMES) else f"kind {kind}"
    words = [name]
    if trace.replica[row] >= 0:
        words.append(f"replica {int(trace.replica[row])}")
    if trace.shard[row] >= 0:
        words.append(f"shard {int(trace.shard[row])}")
    return f"row {row if number is None else number} ({', '.join(words)})"


def check_header(header: Any) -> None:
    """Raises ValueError unless the header says schema, replicas and shards.

    Args:
        header: what should be one.

    Raises:
        ValueError: naming the key and what it must be.
    """
    if not isinstance(header, Mapping):
        raise ValueError(f"header must be a dict, not {type(header).__name__}")
    for name in ("schema", "replicas", "shards"):
        value = header.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"header[{name!r}] is {value!r}; it must be a positive integer"
            )
    if header["schema"] > SCHEMA:
        raise ValueError(
            f"header['schema'] is {header['schema']}, newer than {SCHEMA}, the newest "
            "that this dbjax knows: read it with a newer dbjax"
        )


def check_columns(columns: Sequence[np.ndarray]) -> None:
    """Raises ValueError unless the columns are `[rows]` arrays of their dtypes.

    Args:
        columns: all of them, in the order of `COLUMNS`.

    Raises:
        ValueError: naming the column and what it must be.
    """
    rows = len(columns[0]) if np.ndim(columns[0]) else 0
    for (name, (dtype, _)), values in zip(COLUMNS.items(), columns, strict=True):
        if not isinstance(values, np.ndarray) or values.dtype != dtype:
            raise ValueError(
                f"column {name!r} must be a numpy array of {np.dtype(dtype)}, not "
                f"{getattr(values, 'dtype', type(values).__name__)}"
            )
        if values.shape != (rows,):
            raise ValueError(
                f"column {name!r} has shape {values.shape}; it must be [{rows}]"
            )
