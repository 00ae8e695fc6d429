"""The Trace itself: a frozen struct of arrays, one row per event."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbjax.trace import (
    checks,
    compare,
    counterfactual,
    making,
    perfetto,
    statistics,
    storage,
)
from dbjax.trace import columns as columns_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What a run did, one row per event, in a causal order.

    The order of the rows is what replay follows; times are for pictures and
    statistics. `-1` says "none". A row of kind `FETCH` stands where the fetch landed
    (its `step` is the ticket it was asked for); the `PUSH` rows of one push, one per
    shard, share `(replica, id)`.

    A state is named by (shard, incarnation, version). A version counts the pushes that
    the state has handled. A `RESTART` row of a shard (`replica` is -1) says that it was
    restored: it goes on as `incarnation`, from `version` of the incarnation before, and
    its next push makes the version after that one. A `FAIL` row before says how many
    updates that loses. Whatever is on its way goes on naming what was lost, and what
    was lost may be pushed once more.

    Attributes:
        kind: `[rows]` uint8: FETCH, COMPUTE, PUSH, JOIN, FAIL, RESTART, LEAVE.
        time: `[rows]` float64: when the event ended.
        start: `[rows]` float64: when it began.
        replica: `[rows]` int32.
        shard: `[rows]` int32.
        step: `[rows]` int64: the ticket.
        batch: `[rows]` int64: COMPUTE: the replica's own minibatch index.
        version: `[rows]` int64: FETCH: the version received; PUSH: the shard's
            version after it; RESTART of a shard: the version it goes back to.
        base: `[rows]` int64: PUSH: the shard's version that its oldest gradient was
            computed on, in the incarnation of the FETCH in force then.
        count: `[rows]` int32: PUSH: gradients summed; FAIL: gradients lost, of a shard:
            updates lost.
        status: `[rows]` uint8: TAKEN, NOT_FINITE, DROPPED (each counts a version).
        incarnation: `[rows]` int32: of the shard: FETCH: when it was served; PUSH: when
            it was handled; RESTART: from then on.
        bytes: `[rows]` int64: size of the message.
        id: `[rows]` int64: PUSH: the replica's own push counter.
        digest: `[rows]` uint64: of the shard's parameters after the event, 0 if none.
        header: what was run; JSON-able, with `schema`, `replicas` and `shards`.
        evaluations: JSON-able dicts with `step`, `time` and scalars.

    Examples:
        >>> from dbjax.trace import PUSH, Trace
        >>> trace = Trace.from_delays([0, 1, 1])
        >>> trace
        Trace(9 rows, 2 replicas, 1 shards)
        >>> pushes = trace.take(trace.kind == PUSH)
        >>> pushes.version, pushes.base
        (array([1, 2, 3]), array([0, 0, 1]))
    """

    kind: np.ndarray
    time: np.ndarray
    start: np.ndarray
    replica: np.ndarray
    shard: np.ndarray
    step: np.ndarray
    batch: np.ndarray
    version: np.ndarray
    base: np.ndarray
    count: np.ndarray
    status: np.ndarray
    incarnation: np.ndarray
    bytes: np.ndarray
    id: np.ndarray
    digest: np.ndarray
    header: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        """Checks the form of columns and header; `validate` checks their sense."""
        columns_lib.check_columns(list(self.columns().values()))
        columns_lib.check_header(self.header)

    def __len__(self) -> int:
        """Counts the rows."""
        return len(self.kind)

    def __repr__(self) -> str:
        """Says how much there is, not what."""
        return (
            f"Trace({len(self)} rows, {self.header['replicas']} replicas, "
            f"{self.header['shards']} shards)"
        )

    def columns(self) -> dict[str, Any]:
        """The columns by name, in the order of the attributes."""
        return {name: getattr(self, name) for name in columns_lib.COLUMNS}

    @classmethod
    def from_columns(
        cls,
        header: Mapping[str, Any],
        evaluations: Sequence[Mapping[str, Any]] = (),
        **columns: Any,
    ) -> "Trace":
        """Builds a Trace from rows that already stand in a causal order.

        Args:
            header: `replicas`, `shards` and more; `schema` is filled in.
            evaluations: dicts with `step`, `time` and scalars.
            **columns: arrays `[rows]` or, for a constant column, a scalar. `kind` is
                needed; others default to "none", and `start` to `time`.

        Returns:
            The Trace, its columns cast to their dtypes. It is not validated.

        Raises:
            ValueError: for columns or a header that cannot be one.

        Examples:
            >>> from dbjax.trace import COMPUTE
            >>> header = {"replicas": 1, "shards": 1}
            >>> trace = Trace.from_columns(
            ...     header, kind=[COMPUTE] * 2, batch=[0, 1], start=[0, 3], time=[2, 4]
            ... )
            >>> float(trace.utilisation()[0])
            0.75
        """
        return cls(
            **columns_lib.complete(columns),
            header={"schema": columns_lib.SCHEMA, **header},
            evaluations=tuple(dict(each) for each in evaluations),
        )

    def take(self, indices: Any) -> "Trace":
        """The Trace of some rows, with the same header and evaluations.

        Args:
            indices: a slice, an index array `[n]` or a mask `[rows]`.

        Returns:
            The rows in that order; it is not validated.
        """
        rows = {name: values[indices] for name, values in self.columns().items()}
        return dataclasses.replace(self, **rows)

    @classmethod
    def from_delays(cls, delays: Any) -> "Trace":
        """The Trace of a run with given staleness, one replica per gradient in flight.

        Step `t`'s gradient is computed on the version `delays[t]` updates before; with
        a column for each shard, on the versions that its row says.

        Args:
            delays: int array `[steps]` or `[steps, shards]`, `0 <= delays[t] <= t`; see
                `dbjax.schedules`.

        Returns:
            A Trace whose `staleness()` is `delays`, of one shard if there is one
            column or none.

        Raises:
            ValueError: naming the step, and the shard, whose delay is not possible.

        Examples:
            >>> Trace.from_delays([0, 1, 1]).staleness()[:, 0]
            array([0, 1, 1])

            A pipeline of two stages, each of them a shard:

            >>> Trace.from_delays([[0, 0], [1, 0], [1, 0]])
            Trace(15 rows, 2 replicas, 2 shards)
        """
        header, columns = making.delay_columns(delays)
        return cls.from_columns(header, **columns)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> "Trace":
        """The Trace of pushes that some other system has written down.

        Args:
            path: a file whose first line names the columns `time` (seconds), `replica`
                and `staleness` (updates that the push's gradient had missed); one line
                a push, in their order. If there is a column `version`, it must count 1,
                2, 3, ..., so that a missing push is noticed. Others are not looked at.

        Returns:
            A Trace of one shard whose `staleness()[:, 0]` is that column.

        Raises:
            ValueError: naming the file, the line (the first is 1), the column, its
                value and what is allowed.

        Examples:
            >>> import pathlib, tempfile
            >>> folder = tempfile.TemporaryDirectory()
            >>> file = pathlib.Path(folder.name) / "pushes.csv"
            >>> with file.open("w") as out:
            ...     for line in "time,replica,staleness", "1.5,0,0", "1.7,1,1":
            ...         print(line, file=out)
            >>> Trace.from_csv(file).staleness()[:, 0]
            array([0, 1])
            >>> folder.cleanup()
        """
        pushes = storage.read_pushes(path)
        try:
            header, columns = making.push_columns(*pushes)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}, {error}") from None
        return cls.from_columns(header, **columns)

    @classmethod
    def from_events(
        cls,
        header: Mapping[str, Any],
        evaluations: Sequence[Mapping[str, Any]] = (),
        **columns: Any,
    ) -> "Trace":
        """Builds a Trace from events in any order, such as logs of several machines.

        Rows are put in a causal order: by the version and push names where these
        decide, on one replica by its clock, and else by time.

        Args:
            header: `replicas`, `shards` and more.
            evaluations: dicts with `step`, `time` and scalars.
            **columns: as for `from_columns`.

        Returns:
            The Trace, valid.

        Raises:
            ValueError: if the events cannot have happened in any order; naming the
                first row, as it was given, that cannot be, the column and its value.
        """
        events = cls.from_columns(header, evaluations, **columns)
        checks.check_ranges(events)
        order = making.causal_order(events)
        trace = events.take(order)
        checks.check_order(trace, given=order)
        return trace

    def without_staleness(self) -> "Trace":
        """What the run would have been, had nobody ever been stale.

        Returns:
            The Trace of the same minibatches, one after the other in the order in
            which shard 0 handled them, each on the version before it.

        Raises:
            ValueError: if somebody died, or a push was not one gradient, taken.

        Examples:
            >>> Trace.from_delays([0, 1, 1]).without_staleness().staleness()[:, 0]
            array([0, 0, 0])
        """
        header, columns = counterfactual.one_after_the_other(self)
        return type(self).from_columns(header, **columns)

    def without_replicas(self, *replicas: int) -> "Trace":
        """What the run would have been without some replicas.

        The others do what they did, when they did it; versions, steps and so staleness
        are counted anew.

        Args:
            *replicas: who is left out.

        Returns:
            The Trace of the others.

        Raises:
            ValueError: if there is no such replica, nobody is left, or somebody died.

        Examples:
            >>> trace = Trace.from_delays([0, 1, 1, 1])
            >>> trace.without_replicas(1).staleness()[:, 0]
            array([0, 0])
        """
        return counterfactual.without(self, replicas)

    def validate(self) -> None:
        """Checks that the rows can have happened in this order.

        Values are in range; RESTART rows make the incarnations 1, 2, 3, ... of a shard,
        and the pushes of each versions one after the other; a fetch of a version comes
        after the push that made it; a push is based on a version before its own, its
        ids go up per (replica, shard, incarnation), and it sums no more gradients than
        its replica has computed; minibatches do not go backwards.

        Raises:
            ValueError: naming the first row that cannot have happened there.
        """
        checks.check_ranges(self)
        checks.check_order(self)

    def diff(self, other: "Trace") -> str | None:
        """Names the first row and its columns that differ from `other`'s.

        The first header key and evaluation that differ are named as well.

        Args:
            other: the Trace to compare with.

        Returns:
            A description, or None if the Traces are equal.

        Examples:
            >>> trace = Trace.from_delays([0, 1, 1])
            >>> trace.diff(trace.take(slice(8)))
            '9 rows against 8, of which row 8 (PUSH, replica 0, shard 0) is the first'
        """
        return compare.diff(self, other)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the Trace as an npz without pickle, under exactly this path.

        Args:
            path: the file; a killed process leaves what was there before.

        Raises:
            ValueError: header or evaluations are not JSON-able.

        Examples:
            >>> import os, tempfile
            >>> trace = Trace.from_delays([0, 1])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     trace.save(os.path.join(folder, "trace.npz"))
            ...     again = Trace.load(os.path.join(folder, "trace.npz"))
            >>> print(again.diff(trace))
            None
        """
        storage.save(path, self.columns(), self.header, self.evaluations)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Reads a Trace that `save` wrote.

        Args:
            path: the file.

        Returns:
            The Trace, bit for bit; it is not validated.

        Raises:
            ValueError: for a file that is not a Trace, is a pickle, is truncated or
                corrupted, has a newer schema or wrong columns.
            FileNotFoundError: if there is none.
        """
        columns, header, evaluations = storage.load(path)
        return cls(**columns, header=header, evaluations=evaluations)

    def to_perfetto(
        self, path: str | os.PathLike[str], *, seconds: float = 1.0
    ) -> None:
        """Writes trace event JSON, which opens in https://ui.perfetto.dev.

        One track per replica shows fetch, compute and push, one per shard the pushes
        it handled, with a counter of their staleness.

        Args:
            path: the file, gzipped where its name ends in `.gz`.
            seconds: how long one unit of the Trace's time is.

        Raises:
            ValueError: `seconds` is not positive and finite.
        """
        perfetto.write(self, path, seconds)

    def staleness(self) -> np.ndarray:
        """Updates that each push missed on each shard, int64 `[pushes, shards]`.

        An entry is the shard's version when the push arrived minus the version that
        its oldest gradient was computed on; -1 where the shard never saw the push. If
        the shard has lost that version, it is counted from the one it was restored
        from. Pushes stand in the order of their first PUSH row.
        """
        return statistics.staleness(self)

    def duration(self) -> float:
        """Time from the first start to the last end; 0 for an empty Trace."""
        return statistics.duration(self)

    def utilisation(self) -> np.ndarray:
        """Share of the run that each replica spent computing, `[replicas]`."""
        return statistics.utilisation(self)

    def throughput(self) -> float:
        """Minibatches of all replicas per unit of time; 0 where no time passed."""
        return statistics.throughput(self)

    def minibatches_per_replica(self) -> np.ndarray:
        """Minibatches computed by each replica, int64 `[replicas]`."""
        return statistics.minibatches(self)

    def samples_per_replica(self) -> np.ndarray:
        """Examples seen by each replica, `[replicas]`; needs `header["batch_size"]`."""
        return statistics.samples(self)

    def partition_bytes(self) -> np.ndarray:
        """Bytes exchanged by each partition with each shard, `[partitions, shards]`.

        Over all replicas and the whole run. One row where replicas have no partitions.
        """
        return statistics.partition_bytes(self)

    def lost(self) -> dict[str, int]:
        """Counts what did not reach the parameters.

        They are `gradients` lost by replicas that failed, `updates` lost by shards that
        failed, and pushes `not_finite` and `dropped`.
        """
        return statistics.lost(self)

    def summary(self) -> dict[str, Any]:
        """The figures of the run in one JSON-able dict."""
        return statistics.summary(self)
