"""Where two Traces part."""

from typing import TYPE_CHECKING, Any

from dbjax.trace import columns, storage

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

_ABSENT = object()


def diff(one: "Trace", other: "Trace") -> str | None:
    """Names the first row, header key and evaluation that differ; None if none do.

    Two NaNs in the same place do not differ.
    """
    findings = [
        *_rows(one, other),
        *_header(one.header, other.header),
        *_evaluations(one.evaluations, other.evaluations),
    ]
    return "; ".join(findings) or None


def _rows(one: "Trace", other: "Trace") -> list[str]:
    shared = min(len(one), len(other))
    first = shared
    for name in columns.COLUMNS:
        mine, theirs = getattr(one, name)[:first], getattr(other, name)[:first]
        differs = (mine != theirs) & ((mine == mine) | (theirs == theirs))  # not NaNs
        if differs.any():  # earlier than every column before: only `first` rows
            first = int(differs.argmax())
    if first < shared:
        where = []
        for name in columns.COLUMNS:
            mine, theirs = getattr(one, name)[first], getattr(other, name)[first]
            if mine != theirs and (mine == mine or theirs == theirs):
                where.append(f"column {name!r}: {mine} against {theirs}")
        return [f"{columns.describe_row(one, first)}, {', '.join(where)}"]
    if len(one) != len(other):
        longer = one if len(one) > len(other) else other
        extra = columns.describe_row(longer, shared)
        return [f"{len(one)} rows against {len(other)}, of which {extra} is the first"]
    return []


def _header(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    for key in sorted({**mine, **theirs}):
        a, b = (_show(header.get(key, _ABSENT)) for header in (mine, theirs))
        if a != b:
            return [f"header[{key!r}]: {a} against {b}"]
    return []


def _evaluations(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> list[str]:
    for index in range(max(len(mine), len(theirs))):
        a, b = (
            _show(each[index] if index < len(each) else _ABSENT)
            for each in (mine, theirs)
        )
        if a != b:
            return [f"evaluations[{index}]: {a} against {b}"]
    return []


def _show(value: Any) -> str:
    # As JSON, so that a tuple equals the list that it becomes on disk.
    return "nothing" if value is _ABSENT else storage.to_json(value)
