"""A replica in a process of its own: its life, by orders; its shards, by address."""

import collections
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dbjax.runtime.base import Program
from dbjax.runtime.life import Hands, Life
from dbjax.runtime.parcels import FENCED, Answer, Parcel, Report, from_wire, to_wire
from dbjax.runtime.recorder import Recorder
from dbjax.runtime.transport import SIDE, Address, Gone, Late, Reply
from dbjax.server.messages import Fetched, Push
from dbjax.trace import COMPUTE, FETCH

WINDOW = 2
"""So many pushes may be under way before the next one waits (back-pressure)."""

FAILED_AT = "failed_at_step"
"""Attribute of an error of the user's code: the ticket that it was for."""


class ReplicaHost:
    """Carries out the driver's orders, one after the other.

    Args:
      program: the algorithm, without its ticket desk.
      hands: carry out requests on arrays.
      replica: which it is.
      life: how often it has begun.
      shards: where they are.
      shard_bytes: their sizes.
      gated: whether the protocol makes pushes wait: then they are ordered one by one.
      batch: its first minibatch.
      next_id: of its pushes.
      zero: when the run began.
      timeout: seconds until a shard must have answered.
      state_of: what of the hands belongs into a checkpoint.
    """

    def __init__(
        self,
        program: Program,
        hands: Hands,
        replica: int,
        life: int,
        shards: Sequence[Address],
        shard_bytes: tuple[int, ...],
        gated: bool,
        batch: int,
        next_id: int,
        zero: float,
        timeout: float,
        state_of: Callable[[Hands, int], Any],
    ) -> None:
        self._words = program.requests
        self._gated, self._state_of, self._hands = gated, state_of, hands
        self._around = _Away(
            replica, life, shards, shard_bytes, next_id, zero, timeout,
            combine=not gated and not program.periods[replica].overlap,
        )  # fmt: skip
        self._life = Life(program, hands, self._around, replica, batch)

    def take(self, steps: Sequence[int], clocks: Any = None) -> Report:
        """Take tickets, one after the other, or hear that there are none left."""
        self._around.clocks = clocks
        for step in steps or (None,):
            self._life.take(step)
            try:
                self._carry_on()
            except Exception as error:
                with contextlib.suppress(AttributeError):  # it may be frozen
                    setattr(error, FAILED_AT, -1 if step is None else step)
                raise
        return self._report()

    def push(self, clocks: Any) -> Report:
        """Push, which the protocol now allows, and go on."""
        self._around.clocks = clocks
        self._life.carry_out()
        self._carry_on()
        return self._report()

    def flush(self, clocks: Any = None) -> Report:
        """Push what is accrued, and wait until nothing is under way."""
        self._around.clocks = clocks
        self._life.flush()
        self._around.wait()
        return self._report()

    def state(self) -> Any:
        """Give what belongs into a checkpoint."""
        return self._state_of(self._hands, self._life.state.batch)

    def moved(self, shard: int, address: Address) -> None:
        """A shard lives elsewhere now."""
        self._around.moved(shard, address)

    def _carry_on(self) -> None:
        words = self._words
        until = (words.ticket, words.stop) + ((words.push,) if self._gated else ())
        try:
            self._life.carry_on(*until)
        except BaseException:
            self._life.close()
            raise
        if self._life.state.asked == words.stop:
            self._life.end()
            self._around.wait()
            self._life.close()

    def _report(self) -> Report:
        rows, at = self._around.take_rows(), self._life.state
        accrued, next_id = self._hands.count(), self._around.next
        state = self.state() if at.asked == self._words.stop else None
        return Report(rows, at.asked, at.batch, accrued, next_id, state)


class _Asked(NamedTuple):
    """A reply, None if nobody was there, and how often the shard had moved by then."""

    moves: int
    reply: Reply | None


class _Sent(NamedTuple):
    """A push under way: what was sent to each shard, and the replies."""

    parcels: list[Parcel]
    replies: list[_Asked]


class _Away:
    """Surroundings of a replica whose shards are other processes."""

    def __init__(
        self,
        replica: int,
        life: int,
        shards: Sequence[Address],
        shard_bytes: tuple[int, ...],
        next_id: int,
        zero: float,
        timeout: float,
        combine: bool,
    ) -> None:
        self.replica, self.life, self.next = replica, life, next_id
        self.clocks: Any = None
        self._shards, self._bytes = list(shards), shard_bytes
        self._combine, self._timeout = combine, timeout
        self._recorder = Recorder(zero=zero)
        self._journal: list[Any] = []
        self._under_way: collections.deque[_Sent] = collections.deque()
        self._brought: list[Answer] | None = None
        self._news = threading.Condition()
        self._moves = [0] * len(self._shards)

    def moved(self, shard: int, address: Address) -> None:
        with self._news:
            self._shards[shard] = address
            self._moves[shard] += 1
            self._news.notify_all()

    def take_rows(self) -> list[Any]:
        return _take(self._recorder.rows)

    # Surroundings, see there.

    def now(self) -> float:
        return self._recorder.now()

    def fetch(self, turn: int) -> list[Fetched]:
        self.wait()
        answers, self._brought = self._brought, None
        if answers is None:
            answers = self._fetch()
            self._hear(answers)
        return [
            Fetched(from_wire(answer.params), answer.version, answer.incarnation)
            for answer in answers
        ]

    def release(self, turn: int) -> None:
        pass  # what was fetched goes with the last reference to it

    def landed(self, step: int, start: float, fetched: list[Fetched]) -> None:
        for shard, answer in enumerate(fetched):
            self._note(
                FETCH, start, shard, step, version=answer.version,
                nbytes=self._bytes[shard], incarnation=answer.incarnation,
            )  # fmt: skip

    def begun(self) -> None:
        pass  # the report says so

    def computed(self, step: int, batch: int, start: float) -> None:
        self._note(COMPUTE, start, step=step, batch=batch)

    def wait_to_push(self) -> None:
        pass  # it is ordered when it may be

    def next_id(self) -> int:
        self.next += 1
        return self.next - 1

    def push(self, step: int, messages: list[Push], count: int, fetches: bool) -> None:
        journal = tuple(_take(self._journal))
        fetches = fetches and self._combine
        bases = tuple((message.base, message.origin) for message in messages)
        parcels = [
            Parcel(
                message._replace(
                    gradients=to_wire(message.gradients),
                    stale_params=to_wire(message.stale_params),
                ),
                *(self.life, count, bases, self.clocks, journal, fetches),
            )
            for message in messages
        ]
        replies = [self._ask(s, "push", parcel) for s, parcel in enumerate(parcels)]
        self._under_way.append(_Sent(parcels, replies))
        while len(self._under_way) > WINDOW:
            self._wait_for_oldest()

    def wait(self) -> None:
        """Wait until every push is acknowledged."""
        while self._under_way:
            self._wait_for_oldest()

    def _note(self, kind: int, start: float, shard: int = -1, step: int = -1, **rest):
        row = self._recorder.add(kind, self.replica, start, shard, step, **rest)
        self._journal.append(row)

    def _ask(self, shard: int, method: str, *args: Any, **lane: str) -> _Asked:
        with self._news:
            moves, address = self._moves[shard], self._shards[shard]
        try:
            return _Asked(moves, address.ask(method, *args, **lane))
        except Gone:
            return _Asked(moves, None)

    def _wait_for_oldest(self) -> None:
        sent = self._under_way[0]
        answers = [self._answer_to_push(s, sent) for s in range(len(sent.parcels))]
        self._under_way.popleft()
        self._hear(answers)
        if sent.parcels[0].fetches:
            self._brought = answers

    def _hear(self, answers: list[Answer]) -> None:
        """Pass on what shards say of pushes, which may be known nowhere else."""
        for answer in answers:
            self._recorder.rows += answer.rows
            self._journal += answer.rows

    def _answer_to_push(self, shard: int, sent: _Sent) -> Answer:
        """Wait for a shard's answer; where it died, send all again to the next one."""

        def again() -> _Asked:
            for other in self._under_way:
                parcel = other.parcels[shard]
                other.replies[shard] = self._ask(shard, "push", parcel)
            return sent.replies[shard]

        answer = self._patiently(shard, sent.replies[shard], again)
        if answer.status == FENCED:
            raise Gone(f"replica {self.replica}: this life of it has been given up")
        return answer

    def _fetch(self) -> list[Answer]:
        def ask(shard: int) -> _Asked:
            return self._ask(shard, "fetch", (self.replica, self.life), lane=SIDE)

        asked = list(map(ask, range(len(self._shards))))
        return [self._fetched(shard, ask, first) for shard, first in enumerate(asked)]

    def _fetched(
        self, shard: int, ask: Callable[[int], _Asked], asked: _Asked
    ) -> Answer:
        while True:
            answer = self._patiently(shard, asked, lambda: ask(shard))
            try:
                return answer._replace(params=answer.params.get(self._timeout))
            except Gone:  # it died after it had answered
                asked = asked._replace(reply=None)

    def _patiently(
        self, shard: int, asked: _Asked, again: Callable[[], _Asked]
    ) -> Answer:
        """Wait for an answer; ask again when the shard has come back elsewhere."""
        while True:
            if asked.reply is not None:
                try:
                    return asked.reply.result(self._timeout)
                except Gone:
                    pass
            moves = asked.moves
            with self._news:
                there = self._news.wait_for(
                    lambda moves=moves: self._moves[shard] > moves, self._timeout
                )
            if not there:
                raise Late(
                    f"replica {self.replica} has waited {self._timeout:g} s for shard "
                    f"{shard} to come back"
                )
            asked = again()


def _take(rows: list[Any]) -> list[Any]:
    """Take what a list holds now; another thread may append meanwhile."""
    now = len(rows)
    taken = rows[:now]
    del rows[:now]
    return taken
