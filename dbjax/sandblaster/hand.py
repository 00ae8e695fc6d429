"""What one replica holds, and how it carries out its orders, wherever it lives."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax

from dbjax.runtime.recorder import Recorder
from dbjax.sandblaster.emulated import group_of
from dbjax.sandblaster.messages import (
    Compute,
    Evaluate,
    Finished,
    Forget,
    Keep,
    Push,
    Pushed,
)
from dbjax.sandblaster.portions import Message
from dbjax.sandblaster.problem import Problem
from dbjax.trace import COMPUTE, DROPPED, FETCH, PUSH, TAKEN
from dbjax.typing import Batch, Gradients, Params


class Published(NamedTuple):
    """What replicas see of the evaluation under way.

    Attributes:
      evaluation: its number.
      request: what is evaluated.
      portions: of the data, by place.
      first: the ticket of its first portion.
      base: each shard's version at its beginning.
      params: where, if they are at hand; nobody changes them.
    """

    evaluation: int
    request: Evaluate
    portions: list[int]
    first: int
    base: list[int]
    params: Params | None = None


class PushRow(NamedTuple):
    """A push's row of the Trace, but for what a shard knows.

    Attributes:
      replica: who pushes.
      start: when it began to.
      step: the ticket of the newest portion.
      base: each shard's version where the gradients were computed.
      count: how many portions are summed.
      id: which of the replica's pushes.
      nbytes: size of each shard's part.
    """

    replica: int
    start: float
    step: int
    base: list[int]
    count: int
    id: int
    nbytes: tuple[int, ...]

    def write(self, recorder: Recorder, shard: int, version: int) -> None:
        """Add the row, which ends now.

        Args:
          recorder: whose rows of this shard stand in the order of its versions.
          shard: which has added the push.
          version: what it made.
        """
        recorder.add(
            PUSH, self.replica, self.start, shard, step=self.step, version=version,
            base=self.base[shard], count=self.count, status=TAKEN,
            nbytes=self.nbytes[shard], id_=self.id,
        )  # fmt: skip


class Around(Protocol):
    """Where a hand lives.

    Attributes:
      problem: what is minimised.
      recorder: takes the rows of fetches and portions.
      published: the evaluation under way.
      shard_bytes: size of the parameters on each shard.
      x64: whether numbers may have 64 bits; each thread has to be told.
    """

    problem: Problem
    recorder: Recorder
    published: Published | None
    shard_bytes: tuple[int, ...]
    x64: bool

    def params(self, seen: Published, replica: int) -> Params:
        """Give the parameters of an evaluation on a replica's devices."""
        ...

    def add(self, into: str, accrued: Gradients, order: Push, row: PushRow) -> None:
        """Have the shards add a sum to a vector; each writes the row as it does."""
        ...


class Hand:
    """Carries out one replica's orders, in their order.

    Args:
      around: where it lives.
      replica: whose hand it is.
      batches: the number of the first portion that it computes.
      first_id: of the desk's push 0.

    Attributes:
      computed: the row of the portion computed last.
    """

    def __init__(
        self, around: Around, replica: int, batches: int = 0, first_id: int = 0
    ) -> None:
        self._around, self._replica = around, replica
        self._batches, self._first_id = batches, first_id
        self.computed: list[Any] = []
        self._life = 0
        self._failed = -1  # the last life that ended with an error
        self._fetched: Published | None = None
        self._params: Params | None = None
        self._finished: tuple[int, Gradients] | None = None
        self._accrued: Gradients | None = None
        self._prefetched: tuple[int, Batch] | None = None

    def count_on(self, batches: int, first_id: int) -> None:
        """Let what is computed and pushed have later numbers than these."""
        self._batches = max(self._batches, batches)
        self._first_id = max(self._first_id, first_id)

    def obey(self, order: Any) -> Iterator[Message]:
        """Carry out an order, in this replica's thread."""
        if order.life <= self._failed:
            return
        try:
            with jax.enable_x64(self._around.x64):
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
            self._keep()
        elif isinstance(order, Push):
            yield self._push(order)
        else:  # Drop
            self._finished = None

    def _compute(self, order: Compute) -> Finished:
        around, recorder = self._around, self._around.recorder
        seen = self._fetched
        if seen is None or seen.evaluation != order.evaluation:
            seen = self._fetch()
        if seen.evaluation != order.evaluation:  # it is over, and nobody waits for it
            return Finished(self._replica, order.life, order.task)
        start, i = recorder.now(), seen.portions[order.portion]
        batch = self._portion(i)
        problem, squares = around.problem, seen.request.squares
        assert self._params is not None
        result = problem.call(
            self._replica, problem.compute, self._params, batch, i, squares
        )
        if order.upcoming >= 0:  # while that is computed
            self._prefetch(seen.portions[order.upcoming])
        value, square, gradients = jax.block_until_ready(result)
        self.computed = recorder.add(
            COMPUTE, self._replica, start, step=seen.first + order.portion,
            batch=self._batches, count=order.copy, status=DROPPED,  # unless it is kept
        )  # fmt: skip
        self._finished = i, gradients
        self._batches += 1
        return Finished(
            self._replica, order.life, order.task, float(value), float(square)
        )

    def _keep(self) -> None:
        assert self._finished is not None
        (i, gradients), problem = self._finished, self._around.problem
        examples = float(problem.examples[i])
        self._accrued = problem.call(
            self._replica, problem.keep, self._accrued, gradients, examples
        )
        self._finished = None

    def _prefetch(self, i: int) -> None:
        try:
            self._prefetched = i, self._around.problem.portion(i, self._replica)
        except Exception:
            self._prefetched = None  # in its turn it will fail by itself

    def _portion(self, i: int) -> Batch:
        """Give a portion, which may be here already."""
        there, self._prefetched = self._prefetched, None
        if there is not None and there[0] == i:
            return there[1]
        return self._around.problem.portion(i, self._replica)

    def _fetch(self) -> Published:
        around, start = self._around, self._around.recorder.now()
        seen = around.published
        assert seen is not None
        self._params = around.params(seen, self._replica)
        self._fetched = seen
        for shard, version in enumerate(seen.base):
            around.recorder.add(
                FETCH, self._replica, start, shard, step=seen.first, version=version,
                nbytes=around.shard_bytes[shard],
            )  # fmt: skip
        return seen

    def _push(self, order: Push) -> Pushed:
        around, seen = self._around, self._fetched
        assert seen is not None and self._accrued is not None
        accrued, self._accrued = self._accrued, None
        row = PushRow(
            self._replica, around.recorder.now(), seen.first + order.portions[-1],
            seen.base, len(order.portions), self._first_id + order.id,
            around.shard_bytes,
        )  # fmt: skip
        into = group_of(seen.request, order.portions[0])
        around.add(into, accrued, order, row)
        return Pushed(self._replica, order.life, order.id)
