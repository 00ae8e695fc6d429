"""Evaluations by real replicas, as threads or processes, for one coordinator."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from dbjax.runtime.mailboxes import Failed
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.remote_mailboxes import Back
from dbjax.runtime.threads import ReplicaError
from dbjax.runtime.transport import Gone, Late
from dbjax.sandblaster.arguments import Arguments
from dbjax.sandblaster.emulated import finish
from dbjax.sandblaster.hand import Published
from dbjax.sandblaster.messages import (
    Compute,
    Died,
    Done,
    Evaluate,
    Evaluated,
    Joined,
    Keep,
)
from dbjax.sandblaster.portions import Order, PortionsInfo
from dbjax.sandblaster.problem import Problem, scattered
from dbjax.sandblaster.remote_vectors import ShardError
from dbjax.sandblaster.vectors import Vectors
from dbjax.trace import FAIL, JOIN, RESTART, TAKEN

_STATUS = COLUMNS.index("status")

MOST_FAILURES = 3
"""So many failures of one portion in one evaluation end the run, whoever failed."""


class Crew(Protocol):
    """Replicas that carry out orders, each its own in the order they were given.

    Attributes:
      recorder: the run's clock, and its rows.
      versions: of each shard, between evaluations.
    """

    recorder: Recorder
    versions: list[int]

    def begin_at(self, versions: list[int]) -> None:
        """Count the versions of the shards, which are new, on from these."""
        ...

    def count_on(self, replica: int, batches: int, first_id: int) -> None:
        """Let what a replica computes and pushes have later numbers than these."""
        ...

    def open(self) -> AbstractContextManager[None]:
        """Let them work; on leaving they do not."""
        ...

    def publish(self, published: Published) -> None:
        """Let all see an evaluation, of which orders come next."""
        ...

    def send(self, replica: int, order: Any) -> None:
        """Give an order."""
        ...

    def receive(self) -> Any:
        """Wait for a message of a replica, `Failed` or `Back`."""
        ...

    def restart(self, replica: int) -> bool:
        """Whether one that failed is there still; else it is started, and `Back`."""
        ...

    def computed(self, replica: int) -> list[Any]:
        """Give the row of the portion that a replica has finished."""
        ...

    def settle(self) -> None:
        """All pushes have landed: have their rows and versions here, in order."""
        ...


class LiveReplicas:
    """Evaluates portions with a crew.

    A replica whose loss or data raises an error is taken for dead, like one that is: it
    is fenced, what it held is computed by others, and it joins again. See
    `MOST_FAILURES`.

    Args:
      problem: what is minimised.
      vectors: where the vectors live.
      arguments: of the run.
      crew: the replicas.
    """

    def __init__(
        self, problem: Problem, vectors: Vectors, arguments: Arguments, crew: Crew
    ) -> None:
        self.problem, self.vectors, self._crew = problem, vectors, crew
        self._desk = arguments.desk(len(problem.examples))
        self._replicas = arguments.replicas
        self._away: set[int] = set()  # dead, and not yet started again
        self._tickets = 0
        self._published: Published | None = None
        self._failures: dict[str, int] = {}  # in this evaluation, by what failed
        self._before = PortionsInfo()  # until the checkpoint that was taken up
        for replica in range(self._replicas):
            self._join(replica, JOIN)

    def at_work(self) -> AbstractContextManager[None]:
        """Start the replicas; on leaving they have stopped."""
        return self._crew.open()

    def now(self) -> float:
        """Give the seconds since the run began."""
        return self._crew.recorder.now()

    def asked(self) -> None:
        """The coordinator has asked every shard for scalars."""

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Evaluate portions.

        Args:
          request: what, where, and into which vectors.

        Returns:
          Their losses.

        Raises:
          ReplicaError: a portion failed too often.
          ShardError: a shard is gone.
        """
        for into, _ in request.groups:
            self.vectors.elementwise(into, "zero", request.at)
        published = self._published = Published(
            self._desk.evaluation + 1,
            request,
            scattered(request.groups),
            self._tickets,
            list(self._crew.versions),
        )
        self._crew.publish(published)
        self._tickets += len(published.portions)
        self._failures.clear()
        groups = [len(group) for _, group in request.groups]
        done = self._send(self._desk.begin(groups))
        while not done:
            done = self._take(self._crew.receive())
        self._crew.settle()
        losses = zip(self._desk.values, self._desk.squares, strict=True)
        return finish(request, self.problem, self.vectors, dict(enumerate(losses)))

    def columns(self) -> dict[str, Any]:
        """Give the Trace's columns."""
        return self._crew.recorder.columns()

    def info(self) -> PortionsInfo:
        """Give what was done beyond computing each portion once."""
        pairs = zip(self._before, self._desk.info, strict=True)
        return PortionsInfo(*(before + now for before, now in pairs))

    def seconds_per_iteration(self, iterations: int) -> dict[str, float]:
        """Nobody knows what would have been."""
        del iterations
        return {}

    def save(self) -> dict[str, Any]:
        """Give the Trace so far."""
        recorder = self._crew.recorder
        return {
            "rows": list(recorder.rows),  # a late replica may add one meanwhile
            "time": recorder.now(),
            "tickets": self._tickets,
            "versions": self._crew.versions,
            "info": list(self.info()),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with it; replicas, shards and desk are new, and count on from there."""
        recorder = self._crew.recorder = Recorder(float(saved["time"]))
        recorder.rows = [tuple(row) for row in saved["rows"]]
        self._tickets, self._before = saved["tickets"], PortionsInfo(*saved["info"])
        self._crew.begin_at(list(saved["versions"]))
        numbered = [COLUMNS.index(name) for name in ("replica", "batch", "id")]
        for row in recorder.rows:
            replica, batch, id_ = (row[at] for at in numbered)
            self._crew.count_on(replica, batch + 1, id_ + 1)
        for replica in range(self._replicas):
            for kind in (FAIL, RESTART):
                recorder.add(kind, replica, recorder.now())

    def _take(self, message: Any) -> bool:
        """Take a message; say whether the evaluation is done."""
        if isinstance(message, Failed):
            return self._lost(message)
        if isinstance(message, Back):
            self._away.remove(message.replica)
            return self._join(message.replica, RESTART)
        return self._send(self._desk.handle(message))

    def _send(self, orders: list[Order]) -> bool:
        """Give orders; say whether the evaluation is done."""
        done = False
        for order in orders:
            if isinstance(order, Done):
                done = True
                continue
            if isinstance(order, Keep):
                self._crew.computed(order.replica)[_STATUS] = TAKEN
            self._crew.send(order.replica, order)
        return done

    def _join(self, replica: int, kind: int) -> bool:
        recorder = self._crew.recorder
        recorder.add(kind, replica, recorder.now())
        return self._send(self._desk.handle(Joined(replica)))

    def _lost(self, failed: Failed) -> bool:
        """Fence a replica that failed, give its portions back, and let it join anew."""
        replica, order, error = failed
        if isinstance(error, ShardError):  # which no other replica will reach either
            raise error
        life = self._desk.life(replica)
        is_dead = isinstance(error, Gone | Late)
        if not is_dead and order.life != life:
            return False  # of a former life: it counts as lost already
        self._count_failure(failed)
        done = False
        if replica not in self._away:
            landed = self.vectors.fence(replica, life)
            recorder = self._crew.recorder
            recorder.add(FAIL, replica, recorder.now())
            done = self._send(self._desk.handle(Died(replica, life, landed)))
        if self._crew.restart(replica):
            return self._join(replica, RESTART) or done
        self._away.add(replica)
        return done

    def _count_failure(self, failed: Failed) -> None:
        replica, order, error = failed
        published = self._published
        assert published is not None
        what = "its start" if order is None else type(order).__name__
        if isinstance(order, Compute):
            if order.evaluation < published.evaluation:
                return  # it is late, and nobody waits for it
            what = f"portion {published.portions[order.portion]}"
        times = self._failures[what] = self._failures.get(what, 0) + 1
        if times >= MOST_FAILURES:
            raise ReplicaError(
                f"replica {replica} failed at {what}, which has failed {times} times: "
                f"{error!r}"
            ) from error
