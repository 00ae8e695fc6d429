"""Replicas and shards as processes on Ray: who starts them, and gives them orders."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from dbjax.runtime.ray import Ray, share
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.remote_mailboxes import RemoteMailboxes
from dbjax.runtime.transport import Address, Reply, Transport
from dbjax.sandblaster.hand import Published
from dbjax.sandblaster.problem import Problem
from dbjax.sandblaster.remote_replica import Recipe, ReplicaHost
from dbjax.sandblaster.remote_vectors import (
    ShardError,
    Shards,
    VectorHost,
    blaming,
    on_processes,
)
from dbjax.sandblaster.vectors import Vectors
from dbjax.server.layout import Layout
from dbjax.trace import COMPUTE
from dbjax.typing import LossFn

_KIND, _TIME, _START, _BATCH = map(COLUMNS.index, ("kind", "time", "start", "batch"))


class Processes:
    """The processes of one run.

    Args:
      transport: starts and ends them.
      timeout: seconds until one that does not answer counts as gone.
    """

    def __init__(self, transport: Transport, timeout: float) -> None:
        self.transport, self.timeout = transport, timeout
        self.shards = Shards((), timeout)

    def host_vectors(self, layout: Layout) -> Vectors:
        """Start a process for each shard, and wait for them.

        Args:
          layout: how parameters lie on them.

        Returns:
          The vectors on these shards, of which there are none yet.
        """
        replies = []
        for shard in range(layout.shards):
            make = functools.partial(VectorHost, shard, share)
            address, reply = self.transport.host(f"shard {shard}", make, kind="shard")
            addresses = (*self.shards.addresses, address)
            self.shards = self.shards._replace(addresses=addresses)
            replies.append(reply)
        for shard, reply in enumerate(replies):
            with blaming(shard):
                reply.result(self.timeout)
        # A copy: what came is in memory that ends with the connection.
        return on_processes(layout, self.shards, jnp.array)

    def crew(
        self,
        replicas: int,
        loss_fn: LossFn,
        problem: Problem,
        options: dict[str, Any],
        layout: Layout,
    ) -> "RemoteCrew":
        """Make what starts the replicas.

        Args:
          replicas: how many.
          loss_fn: see `minimize`.
          problem: it, its data and their number of examples, checked.
          options: `rng`, `has_aux` and `seed`.
          layout: how parameters lie on the shards, which are there.

        Returns:
          The crew.

        Raises:
          TypeError: the loss or the data cannot be sent to other processes.
        """
        recipe = Recipe(
            self.transport.share("loss_fn", loss_fn, keyed=True),
            self.transport.share("data", problem.data),
            options,
            problem.examples,
            bool(jnp.result_type(float) == jnp.float64),
        )
        return RemoteCrew(self, replicas, recipe, layout)


@contextlib.contextmanager
def processes_of(
    runtime: Any, replicas: int, shards: int
) -> Iterator[Processes | None]:
    """Connect to where a run's processes are to be, if it has any.

    Args:
      runtime: of the run; None is given unless it is `Ray`.
      replicas: how many there will be.
      shards: the same of shards.

    Yields:
      Who starts the processes; on leaving there are none.

    Raises:
      ValueError: the cluster has no room for them.
    """
    if not isinstance(runtime, Ray):
        yield None
        return
    with runtime.session() as connection:
        session: Any = connection  # its addresses are its own, and ours are any
        session.check_room(replicas, shards)
        processes = Processes(session, runtime.timeout)
        leave = session.end
        try:
            yield processes
        except ShardError:
            leave = session.kill
            raise
        finally:
            for address in processes.shards.addresses:
                leave(address)


class RemoteCrew:
    """A crew, see `live.Crew`, of processes.

    Args:
      processes: who starts them; the shards are there.
      replicas: how many.
      recipe: what is minimised.
      layout: how parameters lie on shards.
    """

    def __init__(
        self, processes: Processes, replicas: int, recipe: Recipe, layout: Layout
    ) -> None:
        self._processes, self._recipe, self._layout = processes, recipe, layout
        self.recorder = Recorder()
        self.versions = [0] * layout.shards
        self._settled = 0  # so many rows are in order
        self._published: Published | None = None
        self._told = [-1] * replicas  # the newest evaluation that each has heard of
        self._counts = [(0, 0)] * replicas  # see `count_on`
        self._computed: list[list[Any]] = [[]] * replicas
        self._boxes = RemoteMailboxes(
            replicas, processes.transport, self._start, self._heard, processes.timeout
        )

    def begin_at(self, versions: list[int]) -> None:
        """Count the versions of the shards, which are new, on from these."""
        self.versions = versions

    def count_on(self, replica: int, batches: int, first_id: int) -> None:
        """Let what a replica computes and pushes have later numbers than these."""
        known = self._counts[replica]
        self._counts[replica] = max(known[0], batches), max(known[1], first_id)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Start the replicas; on leaving they have stopped."""
        self._settled = len(self.recorder.rows)
        self._processes.shards.each("begin", self.recorder.zero(), self.versions)
        with self._boxes.open():
            yield

    def publish(self, published: Published) -> None:
        """Let all see an evaluation, of which orders come next."""
        self._published = published

    def send(self, replica: int, order: Any) -> None:
        """Give an order, and with the first of an evaluation what that is."""
        published, news = self._published, None
        if published is not None and self._told[replica] < published.evaluation:
            self._told[replica], news = published.evaluation, published
        self._boxes.send(replica, order, news)

    def receive(self) -> Any:
        """Wait for a message."""
        return self._boxes.receive()

    def restart(self, replica: int) -> bool:
        """Whether a process is there still; else it is started, and `Back`."""
        return self._boxes.restart(replica)

    def computed(self, replica: int) -> list[Any]:
        """Give the row of the portion that a replica has finished."""
        return self._computed[replica]

    def settle(self) -> None:
        """Have the shards' rows and versions here, which now stand still."""
        settled = self._processes.shards.each("settle")
        rows = self.recorder.rows
        lines = [line for line, _ in settled]
        rows[self._settled :] = in_order(rows[self._settled :], lines)
        self._settled = len(rows)
        self.versions = [version for _, version in settled]

    def _start(self, replica: int) -> tuple[Address, Reply]:
        self._told[replica] = -1
        make = functools.partial(
            ReplicaHost, replica, self._recipe, self._layout, self._processes.shards,
            self.recorder.zero(), *self._counts[replica],
        )  # fmt: skip
        return self._processes.transport.host(f"replica {replica}", make)

    def _heard(self, replica: int, rows: list[Any]) -> None:
        self.recorder.rows.extend(rows)
        for row in rows:
            if row[_KIND] == COMPUTE:
                self._computed[replica] = row
                self.count_on(replica, row[_BATCH] + 1, 0)


def in_order(rows: Sequence[Any], lines: Sequence[Sequence[Any]]) -> list[Any]:
    """Put the rows of one evaluation in an order in which they can have happened.

    Machines' clocks may differ. So a push is taken to have ended no sooner than its
    sender says that it began, which is after all that it has computed, and no sooner
    than the push before it on that shard. What is fetched is of an earlier evaluation.

    Args:
      rows: of replicas, each one's in its own order.
      lines: rows of pushes, of each shard in the order of its versions.

    Returns:
      All rows.
    """
    for line in lines:
        latest = 0.0
        for row in line:
            latest = row[_TIME] = max(latest, row[_START], row[_TIME])
    # One that is stable: where times are equal, portions come before their push.
    return sorted([*rows, *itertools.chain(*lines)], key=lambda row: row[_TIME])
