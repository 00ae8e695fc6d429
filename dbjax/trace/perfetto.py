"""A Trace as Chrome's trace event JSON, which https://ui.perfetto.dev opens.

Replicas and shards are two processes, each replica and each shard a thread of it, that
is, a track. Slices on one track must not overlap, so a slice begins where the one
before has ended if the Trace says otherwise; fetches that overlap with computing get a
track of their own.
"""

import gzip
import json
import math
import os
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dbjax.trace import columns, history
from dbjax.trace.columns import COMPUTE, FETCH, PUSH

if TYPE_CHECKING:
    from dbjax.trace.table import Trace

REPLICAS, SHARDS, EVALUATIONS = 1, 2, 3
_FIRST_THREAD = 10
_ROWS_AT_ONCE = 1 << 16
_EVENTS_AT_ONCE = 1 << 10
_PUSH_ARGS = "replica id step version base count incarnation bytes".split()
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_COLUMNS = [name for name in columns.COLUMNS if name != "digest"]
_FIELDS = [*_COLUMNS, "staleness"]


def write(trace: "Trace", path: str | os.PathLike[str], seconds: float = 1.0) -> None:
    """Streams a Trace to a JSON file, gzipped where the name ends in `.gz`.

    Args:
        trace: the Trace.
        path: the file to write.
        seconds: how long the Trace's unit of time is.

    Raises:
        ValueError: `seconds` is not positive and finite.
    """
    if not seconds > 0 or not math.isfinite(seconds):
        raise ValueError(f"seconds must be positive and finite, not {seconds}")
    compressed = os.fspath(path).endswith(".gz")
    opener = gzip.open if compressed else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        events = _Events(file, trace, 1e6 * seconds)
        events.name_tracks()
        for row in _rows(trace):
            events.add(row)
        events.finish(trace.evaluations)
        file.write("\n]}\n")


def _rows(trace: "Trace") -> Iterator[dict[str, Any]]:
    pushes = np.flatnonzero(trace.kind == PUSH)
    staleness = np.full(len(trace), -1)
    staleness[pushes] = history.staleness(trace, pushes)
    table = [*(getattr(trace, name) for name in _COLUMNS), staleness]
    for begin in range(0, len(trace), _ROWS_AT_ONCE):
        # Lists of Python numbers: row by row, numpy scalars are ten times slower.
        part = [column[begin : begin + _ROWS_AT_ONCE].tolist() for column in table]
        for values in zip(*part, strict=True):
            yield dict(zip(_FIELDS, values, strict=True))


class _Events:
    """Turns rows into events, holding what is open on each track."""

    def __init__(self, file: IO[Any], trace: "Trace", scale: float):
        self._file = file
        self._scale = scale
        self._header = trace.header
        self._origin = float(trace.start.min()) if len(trace) else 0.0
        self._separator = ""
        self._waiting: list[dict[str, Any]] = []
        self._ended: dict[tuple[int, int], float] = {}
        self._fetching: dict[int, dict[str, Any]] = {}
        self._pushing: dict[int, dict[str, Any]] = {}
        self._computed: dict[int, float] = {}

    def name_tracks(self) -> None:
        replicas, shards = self._header["replicas"], self._header["shards"]
        self._name(REPLICAS, None, "replicas")
        self._name(SHARDS, None, "shards")
        for replica in range(replicas):
            self._name(REPLICAS, replica, f"replica {replica}")
            if self._header.get("overlap"):
                self._name(REPLICAS, replicas + replica, f"replica {replica} fetches")
        for shard in range(shards):
            self._name(SHARDS, shard, f"shard {shard}")

    def add(self, row: dict[str, Any]) -> None:
        """Adds one row; fetches and pushes wait for the rows of the other shards."""
        kind = row["kind"]
        if kind == FETCH:
            self._fetch(row)
        elif kind == COMPUTE:
            self._compute(row)
        elif kind == PUSH:
            self._push(row)
        else:
            self._note(row)

    def finish(self, evaluations: tuple[dict[str, Any], ...]) -> None:
        for replica in list(self._fetching):
            self._end_fetch(replica)
        for replica in list(self._pushing):
            self._end_push(replica, math.inf)
        if evaluations:
            self._name(EVALUATIONS, None, "evaluations")
        for each in evaluations:
            for name, value in each.items():
                if name not in ("step", "time") and isinstance(value, int | float):
                    self._counter(EVALUATIONS, name, each.get("time", 0.0), value)
        self._flush()

    def _fetch(self, row: dict[str, Any]) -> None:
        replica = row["replica"]
        open_one = self._fetching.get(replica)
        if open_one is not None and open_one["step"] != row["step"]:
            self._end_fetch(replica)
        self._end_push(replica, row["start"])
        begun = {name: row[name] for name in ("step", "start", "time")}
        one = self._fetching.setdefault(replica, begun | {"versions": {}, "bytes": 0})
        one["start"] = min(one["start"], row["start"])
        one["time"] = max(one["time"], row["time"])
        one["versions"][str(row["shard"])] = row["version"]
        one["bytes"] += row["bytes"]

    def _end_fetch(self, replica: int) -> None:
        one = self._fetching.pop(replica, None)
        if one is not None:
            overlap = bool(self._header.get("overlap"))
            track = replica + self._header["replicas"] * overlap
            args = {name: one[name] for name in ("step", "versions", "bytes")}
            self._slice(REPLICAS, track, "fetch", one["start"], one["time"], args)

    def _compute(self, row: dict[str, Any]) -> None:
        replica = row["replica"]
        self._end_fetch(replica)
        self._end_push(replica, row["start"])
        args = {"step": row["step"], "batch": row["batch"]}
        self._slice(REPLICAS, replica, "compute", row["start"], row["time"], args)
        self._computed[replica] = row["time"]

    def _push(self, row: dict[str, Any]) -> None:
        replica, shard = row["replica"], row["shard"]
        self._end_fetch(replica)
        if replica in self._pushing and self._pushing[replica]["id"] != row["id"]:
            self._end_push(replica, math.inf)
        status = columns.STATUS_NAMES[row["status"]]
        begun = {name: row[name] for name in ("id", "time", "count")}
        begun |= {"status": status, "versions": {}, "bytes": 0}
        one = self._pushing.setdefault(replica, begun)
        one["time"] = max(one["time"], row["time"])
        one["versions"][str(shard)] = row["version"]
        one["bytes"] += row["bytes"]
        args = {name: row[name] for name in _PUSH_ARGS} | {"status": status}
        if row["base"] >= 0:
            args["staleness"] = missed = row["staleness"]
            self._counter(SHARDS, f"staleness of shard {shard}", row["time"], missed)
        name = f"push of replica {replica}"
        self._slice(SHARDS, shard, name, row["start"], row["time"], args)

    def _end_push(self, replica: int, limit: float) -> None:
        """Closes the push, at the latest where the replica's next event begins."""
        one = self._pushing.pop(replica, None)
        if one is not None:
            start = self._computed.get(replica, one["time"])
            end = min(one.pop("time"), limit)
            self._slice(REPLICAS, replica, "push", start, end, one)

    def _note(self, row: dict[str, Any]) -> None:
        if row["replica"] < 0:
            process, track = SHARDS, row["shard"]
        else:
            process, track = REPLICAS, row["replica"]
            self._end_fetch(track)
            self._end_push(track, row["start"])
        self._write(
            name=columns.KIND_NAMES[row["kind"]].lower(),
            ph="i",
            s="t",
            pid=process,
            tid=self._thread(process, track),
            ts=self._microseconds(row["time"]),
            args={name: row[name] for name in ("step", "count", "incarnation")},
        )

    def _slice(
        self, process: int, track: int, name: str, start: float, end: float, args: Any
    ) -> None:
        start = max(start, self._ended.get((process, track), start))
        end = max(start, end)
        self._ended[process, track] = end
        where = {"ph": "X", "pid": process, "tid": self._thread(process, track)}
        ts = self._microseconds(start)
        duration = round(self._microseconds(end) - ts, 3)
        self._write(name=name, **where, ts=ts, dur=duration, args=args)

    def _counter(self, process: int, name: str, time: float, value: float) -> None:
        if math.isfinite(value):  # JSON knows no infinity
            ts = self._microseconds(time)
            self._write(name=name, ph="C", pid=process, ts=ts, args={"value": value})

    def _name(self, process: int, track: int | None, name: str) -> None:
        where = {"ph": "M", "pid": process}
        if track is not None:
            where["tid"] = self._thread(process, track)
        kind, order = ("process", process) if track is None else ("thread", track)
        self._write(name=f"{kind}_name", **where, args={"name": name})
        self._write(name=f"{kind}_sort_index", **where, args={"sort_index": order})

    def _thread(self, process: int, track: int) -> int:
        # Thread ids are of the whole machine to Perfetto, and 0 is its idle thread.
        begin = _FIRST_THREAD + 2 * self._header["replicas"] * (process == SHARDS)
        return begin + track

    def _microseconds(self, time: float) -> float:
        return round(max(time - self._origin, 0.0) * self._scale, 3)

    def _write(self, **event: Any) -> None:
        self._waiting.append(event)
        if len(self._waiting) == _EVENTS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        # One call for many events: setting up the encoder costs more than its work.
        if self._waiting:
            self._file.write(self._separator + _encode(self._waiting)[1:-1])
            self._separator = ",\n"
            self._waiting.clear()
