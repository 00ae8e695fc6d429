"""Traces on disk: an npz without pickle, its members guarded by checksums.

`numpy.load(path, allow_pickle=False)` opens one as well; header and evaluations are
JSON, stored as bytes.
"""

import csv
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from dbjax.trace import columns

_ZIP, _PICKLE = b"PK", b"\x80"
# What zipfile and numpy raise when bits of a file have changed.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)


def to_json(value: Any) -> str:
    """JSON with sorted keys; numpy scalars and arrays become plain numbers."""

    def plain(leaf):
        if hasattr(leaf, "tolist"):
            return leaf.tolist()
        raise ValueError(
            f"header and evaluations must be JSON-able; {type(leaf).__name__} is not"
        )

    return json.dumps(value, sort_keys=True, default=plain)


def save(
    path: str | os.PathLike[str],
    table: dict[str, np.ndarray],
    header: dict[str, Any],
    evaluations: tuple[dict[str, Any], ...],
) -> None:
    """Writes a Trace's parts; a killed process leaves the old file or none.

    Args:
        path: the file, under exactly this name.
        table: the columns by name.
        header: JSON-able.
        evaluations: JSON-able.

    Raises:
        ValueError: header or evaluations are not JSON-able.
    """
    members = {
        "header": np.frombuffer(to_json(header).encode(), np.uint8),
        "evaluations": np.frombuffer(to_json(list(evaluations)).encode(), np.uint8),
        **table,
    }
    partial = f"{os.fspath(path)}.partial"
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for name, values in members.items():
                # A fixed date: equal Traces make equal files.
                info = zipfile.ZipInfo(f"{name}.npy")
                member = io.BytesIO()
                np.lib.format.write_array(member, values, allow_pickle=False)
                # Level 1: five times faster than the default, and hardly larger.
                archive.writestr(info, member.getbuffer(), zipfile.ZIP_DEFLATED, 1)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[dict[str, Any], ...]]:
    """Reads what `save` wrote.

    Args:
        path: the file.

    Returns:
        Columns by name, header and evaluations, their form checked.

    Raises:
        ValueError: saying what is wrong with the file.
        FileNotFoundError: if there is none.
    """
    with open(path, "rb") as file:
        magic = file.read(2)
        if magic[:1] == _PICKLE:
            raise ValueError(f"{path} is a pickle, not a Trace; pickles are not loaded")
        if magic != _ZIP:
            raise ValueError(f"{path} is not a Trace (not an npz file)")
        try:
            archive = zipfile.ZipFile(file)
        except _DAMAGE as error:
            raise ValueError(f"{path} is truncated or corrupted: {error}") from error
        with archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "header" not in names:
                raise ValueError(f"{path} is not a Trace: it has no header")
            header = _read_json(archive, "header", path)
            try:
                columns.check_header(header)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            _check_names(names, path)
            evaluations = _read_json(archive, "evaluations", path)
            _check_evaluations(evaluations, path)
            table = {name: _read(archive, name, path) for name in columns.COLUMNS}
    try:
        columns.check_columns(list(table.values()))
    except ValueError as error:
        raise ValueError(f"{path} has wrong columns: {error}") from error
    return table, header, tuple(evaluations)


def _check_evaluations(evaluations: Any, path: Any) -> None:
    if not isinstance(evaluations, list) or {*map(type, evaluations)} - {dict}:
        raise ValueError(f"{path} has evaluations that are not a list of dicts")


def _check_names(names: list[str], path: Any) -> None:
    wanted = {"header", "evaluations", *columns.COLUMNS}
    missing, unknown = sorted(wanted - set(names)), sorted(set(names) - wanted)
    if missing or unknown:
        raise ValueError(
            f"{path} has wrong columns: missing {missing}, unknown {unknown}"
        )


def _read(archive: zipfile.ZipFile, name: str, path: Any) -> np.ndarray:
    try:
        # Read whole, so that the checksum is compared before anything is parsed.
        content = archive.read(f"{name}.npy")
    except _DAMAGE as error:
        raise ValueError(f"{path} is corrupted in {name!r}: {error}") from error
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{path} has no valid array {name!r}: {error}") from error


def _read_json(archive: zipfile.ZipFile, name: str, path: Any) -> Any:
    content = _read(archive, name, path)
    try:
        return json.loads(content.tobytes())
    except ValueError as error:
        raise ValueError(f"{path} has a {name} that is not JSON: {error}") from error


def read_pushes(path: str | os.PathLike[str]) -> tuple[np.ndarray, ...]:
    """Reads a CSV of pushes; each line's numbers must be there.

    Args:
        path: the file.

    Returns:
        `time` float64, `replica` and `staleness` int64, and the lines on which they
        stand, `[pushes]` each.

    Raises:
        ValueError: naming the file, and the line, the column and its value.
    """
    kinds: dict[str, Any] = {"time": float, "replica": int, "staleness": int}
    found: dict[str, list[Any]] = {name: [] for name in kinds}
    lines = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, skipinitialspace=True)
        names = next(reader, [])
        _check_first_line(names, kinds, path)
        if "version" in names:
            kinds["version"] = int
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row:  # harmless at the end only
                if any(reader):
                    raise ValueError(f"{where} is empty: allowed is one push a line")
                break
            if len(row) != len(names):
                raise ValueError(
                    f"{where} has {len(row)} values: allowed are {len(names)}, one for "
                    f"each column of {names}"
                )
            given = {
                name: _number(row[names.index(name)], name, kinds[name], where)
                for name in kinds
            }
            lines.append(reader.line_num)
            if given.get("version", len(lines)) != len(lines):
                raise ValueError(
                    f"{where}: version is {given['version']}; allowed is {len(lines)}, "
                    "as each push makes the next version: a push is missing, or stands "
                    "twice"
                )
            for name, values in found.items():
                values.append(given[name])
    if not lines:
        raise ValueError(f"{path}: there is no push in it")
    return (
        np.array(found["time"], np.float64),
        *(np.array(found[name], np.int64) for name in ("replica", "staleness")),
        np.array(lines),
    )


def _check_first_line(names: list[str], needed: Iterable[str], path: Any) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"{path}: the first line names no {' and no '.join(missing)}; it has "
            f"{names}"
        )
    twice = [name for name in (*needed, "version") if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: the first line names {twice[0]} twice")


def _number(text: str, name: str, kind: Any, where: str) -> Any:
    try:
        value = kind(text)
        if kind is int:
            np.int64(value)
    except (ValueError, OverflowError):
        allowed = "a number" if kind is float else "an integer of 64 bits"
        raise ValueError(f"{where}: {name} is {text!r}; allowed is {allowed}") from None
    return value
