"""Evaluations on threads: real replicas, orders in their mailboxes, one coordinator."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax.runtime.mailboxes import Failed, Mailboxes
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.threads import ReplicaError, Threads
from dbjax.sandblaster.arguments import Arguments
from dbjax.sandblaster.emulated import finish, group_of
from dbjax.sandblaster.messages import (
    Added,
    Compute,
    Died,
    Done,
    Drop,
    Evaluate,
    Evaluated,
    Finished,
    Forget,
    Joined,
    Keep,
    Push,
    Pushed,
)
from dbjax.sandblaster.portions import Message, Order, PortionsInfo
from dbjax.sandblaster.problem import Problem, scattered
from dbjax.sandblaster.vectors import Vectors
from dbjax.trace import COMPUTE, DROPPED, FAIL, FETCH, JOIN, PUSH, RESTART, TAKEN
from dbjax.typing import Batch, Gradients, Params

_STATUS = COLUMNS.index("status")

MOST_FAILURES = 3
"""So many failures of one portion in one evaluation end the run, whoever failed."""


class Published(NamedTuple):
    """What replicas see of the evaluation under way.

    Attributes:
      evaluation: its number.
      request: what is evaluated.
      portions: of the data, by place.
      params: where; nobody changes them.
      first: the ticket of its first portion.
      base: each shard's version at its beginning.
    """

    evaluation: int
    request: Evaluate
    portions: list[int]
    params: Params
    first: int
    base: list[int]


class LiveReplicas:
    """Evaluates portions on threads of this process.

    A replica whose loss or data raises an error is taken for dead: it is fenced, what
    it held is computed by others, and it joins again. See `MOST_FAILURES`.

    Args:
      problem: what is minimised.
      vectors: where the vectors live.
      arguments: of the run.
      runtime: the `Threads` settings.
      shard_bytes: size of the parameters on each shard.
    """

    def __init__(
        self,
        problem: Problem,
        vectors: Vectors,
        arguments: Arguments,
        runtime: Threads,
        shard_bytes: tuple[int, ...],
    ) -> None:
        self.problem, self.vectors = problem, vectors
        self.shard_bytes = shard_bytes
        self.recorder = Recorder()
        self.published: Published | None = None
        self.x64 = jnp.result_type(float) == jnp.float64  # each thread has its own
        self.versions = [0] * len(shard_bytes)
        self.first_versions = tuple(self.versions)  # of the new shards
        self._desk = arguments.desk(len(problem.examples))
        self._hands = [_Hand(self, replica) for replica in range(arguments.replicas)]
        self._boxes = Mailboxes([hand.obey for hand in self._hands], runtime)
        self._tickets = 0
        self._failures: dict[int, int] = {}  # in this evaluation, by portion
        self._before = PortionsInfo()  # until the checkpoint that was taken up
        for replica in range(arguments.replicas):
            self._join(replica, JOIN)

    def at_work(self) -> AbstractContextManager[None]:
        """Start the replicas; on leaving they have stopped."""
        return self._boxes.open()

    def now(self) -> float:
        """Give the seconds since the run began."""
        return self.recorder.now()

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
        """
        for into, _ in request.groups:
            self.vectors.elementwise(into, "zero", request.at)
        self.published = Published(
            self._desk.evaluation + 1,
            request,
            scattered(request.groups),
            self.vectors.get(request.at),
            self._tickets,
            list(self.versions),
        )
        self._tickets += len(self.published.portions)
        self._failures.clear()
        groups = [len(group) for _, group in request.groups]
        done = self._send(self._desk.begin(groups))
        while not done:
            message = self._boxes.receive()
            if isinstance(message, Failed):
                done = self._lost(message)
            else:
                done = self._send(self._desk.handle(message))
        losses = zip(self._desk.values, self._desk.squares, strict=True)
        return finish(request, self.problem, self.vectors, dict(enumerate(losses)))

    def columns(self) -> dict[str, Any]:
        """Give the Trace's columns."""
        return self.recorder.columns()

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
        return {
            "rows": list(self.recorder.rows),  # a late replica may add one meanwhile
            "time": self.recorder.now(),
            "tickets": self._tickets,
            "versions": self.versions,
            "info": list(self.info()),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with it; replicas, shards and desk are new, and count on from there."""
        self.recorder = Recorder(float(saved["time"]))
        self.recorder.rows = [tuple(row) for row in saved["rows"]]
        self._tickets, self._before = saved["tickets"], PortionsInfo(*saved["info"])
        self.versions = list(saved["versions"])
        self.first_versions = tuple(self.versions)
        numbered = [COLUMNS.index(name) for name in ("replica", "batch", "id")]
        for row in self.recorder.rows:
            replica, batch, id_ = (row[at] for at in numbered)
            self._hands[replica].count_on(batch + 1, id_ + 1)
        for replica in range(len(self._hands)):
            for kind in (FAIL, RESTART):
                self.recorder.add(kind, replica, self.recorder.now())

    def _send(self, orders: list[Order]) -> bool:
        """Put orders into their mailboxes; say whether the evaluation is done."""
        done = False
        for order in orders:
            if isinstance(order, Done):
                done = True
            else:
                self._boxes.send(order.replica, order)
        return done

    def _join(self, replica: int, kind: int) -> bool:
        self.recorder.add(kind, replica, self.recorder.now())
        return self._send(self._desk.handle(Joined(replica)))

    def _lost(self, failed: Failed) -> bool:
        """Fence a replica that failed, give its portions back, and let it join anew."""
        replica, order, error = failed
        if order.life != self._desk.life(replica):
            return False  # of a former life: it counts as lost already
        published = self.published
        assert published is not None
        late = isinstance(order, Compute) and order.evaluation < published.evaluation
        if not late:  # or somebody waits for it
            portion = -1
            if isinstance(order, Compute):
                portion = published.portions[order.portion]
            times = self._failures[portion] = self._failures.get(portion, 0) + 1
            if times >= MOST_FAILURES:
                what = type(order).__name__ if portion < 0 else f"portion {portion}"
                raise ReplicaError(
                    f"replica {replica} failed at {what}, which has failed "
                    f"{times} times: {error!r}"
                ) from error
        landed = self.vectors.fence(replica, order.life)
        self.recorder.add(FAIL, replica, self.recorder.now())
        done = self._send(self._desk.handle(Died(replica, order.life, landed)))
        return self._join(replica, RESTART) or done


class _Hand:
    """What one replica holds, and how it carries out its orders."""

    def __init__(self, crew: LiveReplicas, replica: int) -> None:
        self._crew, self._replica = crew, replica
        self._life = self._batches = self._first_id = 0
        self._failed = -1  # the last life that ended with an error
        self._fetched: Published | None = None
        self._params: Params | None = None
        self._finished: tuple[int, Gradients, list[Any]] | None = None
        self._accrued: Gradients | None = None
        self._prefetched: tuple[int, Batch] | None = None

    def count_on(self, batches: int, ids: int) -> None:
        """Let what is computed and pushed have later numbers than these."""
        self._batches = max(self._batches, batches)
        self._first_id = max(self._first_id, ids)

    def obey(self, order: Any) -> Iterator[Message]:
        """Carry out an order, in this replica's thread."""
        if order.life <= self._failed:
            return
        try:
            with jax.enable_x64(self._crew.x64):
                yield from self._obey(order)
        except BaseException:
            # Nothing that it was told after this may happen in this life: a later push
            # would pass for a sign that this one has landed.
            self._failed = order.life
            raise

    def _obey(self, order: Any) -> Iterator[Message]:
        if order.life > self._life:  # born again: nothing of before counts
            self._life, self._finished, self._accrued = order.life, None, None
        if order.life < self._life or isinstance(order, Forget):
            return
        if isinstance(order, Compute):
            yield self._compute(order)
        elif isinstance(order, Keep):
            assert self._finished is not None
            i, gradients, row = self._finished
            row[_STATUS] = TAKEN
            problem = self._crew.problem
            examples = float(problem.examples[i])
            self._accrued = problem.call(
                self._replica, problem.keep, self._accrued, gradients, examples
            )
            self._finished = None
        elif isinstance(order, Push):
            yield self._push(order)
        else:
            assert isinstance(order, Drop)
            self._finished = None

    def _compute(self, order: Compute) -> Finished:
        crew, recorder = self._crew, self._crew.recorder
        seen = self._fetched
        if seen is None or seen.evaluation != order.evaluation:
            seen = self._fetch()
        if seen.evaluation != order.evaluation:  # it is over, and nobody waits for it
            return Finished(self._replica, order.life, order.task)
        start, i = recorder.now(), seen.portions[order.portion]
        batch = self._portion(i)
        problem, squares = crew.problem, seen.request.squares
        assert self._params is not None
        result = problem.call(
            self._replica, problem.compute, self._params, batch, i, squares
        )
        if order.upcoming >= 0:  # while that is computed
            self._prefetch(seen.portions[order.upcoming])
        value, square, gradients = jax.block_until_ready(result)
        row = recorder.add(
            COMPUTE, self._replica, start, step=seen.first + order.portion,
            batch=self._batches, count=order.copy, status=DROPPED,  # unless it is kept
        )  # fmt: skip
        self._finished = i, gradients, row
        self._batches += 1
        return Finished(
            self._replica, order.life, order.task, float(value), float(square)
        )

    def _prefetch(self, i: int) -> None:
        try:
            self._prefetched = i, self._crew.problem.portion(i, self._replica)
        except Exception:
            self._prefetched = None  # in its turn it will fail by itself

    def _portion(self, i: int) -> Batch:
        """Give a portion, which may be here already."""
        there, self._prefetched = self._prefetched, None
        if there is not None and there[0] == i:
            return there[1]
        return self._crew.problem.portion(i, self._replica)

    def _fetch(self) -> Published:
        crew, start = self._crew, self._crew.recorder.now()
        seen = self._fetched = crew.published
        assert seen is not None
        self._params = crew.problem.here(seen.params, self._replica)
        for shard, version in enumerate(seen.base):
            crew.recorder.add(
                FETCH, self._replica, start, shard, step=seen.first, version=version,
                nbytes=crew.shard_bytes[shard],
            )  # fmt: skip
        return seen

    def _push(self, order: Push) -> Pushed:
        crew, seen = self._crew, self._fetched
        assert seen is not None and self._accrued is not None
        accrued, self._accrued = self._accrued, None
        into, start = group_of(seen.request, order.portions[0]), crew.recorder.now()

        def record(shard: int, added: Added) -> None:
            # While the shard waits: its rows must stand in the order of its versions.
            if not added.taken:
                return  # fenced: it counts as lost
            version = crew.first_versions[shard] + added.version
            crew.versions[shard] = version
            crew.recorder.add(
                PUSH, self._replica, start, shard, step=seen.first + order.portions[-1],
                version=version, base=seen.base[shard], count=len(order.portions),
                status=TAKEN, nbytes=crew.shard_bytes[shard],
                id_=self._first_id + order.id,
            )  # fmt: skip

        crew.vectors.add(
            into, accrued, self._replica, order.life, order.id, order.shards, record
        )
        return Pushed(self._replica, order.life, order.id)
