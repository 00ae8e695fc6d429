"""One replica's life: carry out what its actor asks for, wherever its shards are."""

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from dbjax.runtime.base import Program
from dbjax.server.messages import Fetched, Push


class Hands(Protocol):
    """What carries out a replica's requests on arrays; made by the algorithm."""

    def install(self, fetched: list[Fetched]) -> None:
        """Take the shards' parameters: they replace the replica's own."""
        ...

    def compute(self, batch: int, step: int) -> None:
        """Add the gradient of minibatch `batch` to the accrued gradients."""
        ...

    def push(self, id_: int, step: int) -> list[Push]:
        """Give the accrued gradients away, a message a shard, and zero them."""
        ...

    def let_go(self) -> None:
        """Give up the shards' parameters: others come before they are used again."""
        ...

    def count(self) -> int:
        """How many gradients are accrued."""
        ...


class Surroundings(Protocol):
    """Where a replica lives: its shards, its clock, and who is to be told."""

    def now(self) -> float:
        """Give the seconds since the run began."""
        ...

    def fetch(self, turn: int) -> list[Fetched]:
        """Wait for all shards' parameters, held until this turn is released."""
        ...

    def release(self, turn: int) -> None:
        """The versions of a turn are needed no more."""
        ...

    def landed(self, step: int, start: float, fetched: list[Fetched]) -> None:
        """A fetch is installed: record it."""
        ...

    def begun(self) -> None:
        """The replica has the parameters for its minibatch."""
        ...

    def computed(self, step: int, batch: int, start: float) -> None:
        """A minibatch is done: record it."""
        ...

    def wait_to_push(self) -> None:
        """Wait until the protocol lets it push."""
        ...

    def next_id(self) -> int:
        """Give the next number of the replica's push counter."""
        ...

    def push(self, step: int, messages: list[Push], count: int, fetches: bool) -> None:
        """Hand a push to every shard; `fetches`: nothing comes before a fetch."""
        ...


class Life:
    """Carries out one replica's requests, in order.

    Args:
      program: the algorithm.
      hands: carry out requests on arrays.
      around: where the replica lives.
      replica: which it is.
      batch: the first of its minibatches.
      jitter: seconds; each request first waits a random time of up to this much.
      seed: of the jitter.

    Attributes:
      state: the actor's.
      newest: the newest ticket it was given.
    """

    def __init__(
        self,
        program: Program,
        hands: Hands,
        around: Surroundings,
        replica: int,
        batch: int,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.program, self.hands, self.around = program, hands, around
        self.state = program.begin(program.state._replace(batch=batch))
        self.newest = -1
        self._periods = program.periods[replica]
        self._courier = ThreadPoolExecutor(1) if self._periods.overlap else None
        self._away: list[Future[None]] = []
        self._arrived: tuple[int, float, list[Fetched]] | None = None
        self._jitter, self._random = jitter, random.Random(f"{seed} {replica}")
        self._turn = 0

    def take(self, ticket: int | None) -> None:
        """Go on with the answer to a request for a ticket."""
        if ticket is not None:
            self.newest = ticket
        self._advance(ticket)

    def carry_on(self, *until: str) -> None:
        """Carry out requests until the actor asks for one of these."""
        while self.state.asked not in until:
            self.carry_out()

    def carry_out(self) -> None:
        """Carry out one request, which is not for a ticket."""
        words, asked = self.program.requests, self.state.asked
        self.hesitate()
        if asked == words.fetch:
            self._fetch()
        elif asked == words.compute:
            self._compute()
        elif asked == words.push:
            self._push()
        self._advance()

    def hesitate(self) -> None:
        """Wait a random time, to try out other orders."""
        if self._jitter:
            time.sleep(self._random.random() * self._jitter)

    def flush(self) -> None:
        """Push what is accrued, before everything is held still."""
        if self.hands.count():
            self._push()
            self.state = self.state._replace(accrued=0)
        self.wait()

    def end(self) -> None:
        """After the last request: nothing is under way any more."""
        self.wait()
        self.around.release(self._turn)

    def close(self) -> None:
        """Stop the courier, also after an error."""
        if self._courier is not None:
            self._courier.shutdown()

    def wait(self) -> None:
        """Wait for the exchange under way, and install what it brought."""
        for future in self._away:
            future.result()
        self._away = []
        if self._arrived is not None:
            arrived, self._arrived = self._arrived, None
            self._land(*arrived)

    def _advance(self, ticket: int | None = None) -> None:
        self.state = self.program.advance(self.state, self._periods, ticket)

    def _fetch(self) -> None:
        step, start, around = self.state.step, self.around.now(), self.around
        # What a turn fetches is held beside the version in use, which is let go when
        # it takes its place.
        if self._courier is None or self.state.fresh:
            self.wait()
            self._land(step, start, around.fetch(self._turn + 1))
            return
        self._install()
        turn = self._turn + 1

        def fetch() -> None:
            self._arrived = step, start, around.fetch(turn)
            around.begun()

        self._away.append(self._courier.submit(fetch))

    def _land(self, step: int, start: float, fetched: list[Fetched]) -> None:
        self.hands.install(fetched)
        self.around.release(self._turn)
        self.around.landed(step, start, fetched)
        self._turn += 1

    def _install(self) -> None:
        """Install a fetch that has come back."""
        if all(future.done() for future in self._away):
            self.wait()

    def _compute(self) -> None:
        if self._away:  # a fetch: it says itself when it is back
            self._install()
        else:
            self.around.begun()
        state, start = self.state, self.around.now()
        self.hands.compute(state.batch, state.step)
        self.around.computed(state.step, state.batch, start)

    def _push(self) -> None:
        around, step = self.around, self.newest
        self.wait()
        around.wait_to_push()
        count = self.hands.count()
        messages = self.hands.push(around.next_id(), step)
        fetches = self.state.batch % self._periods.n_fetch == 0
        stale = any(message.stale_params is not None for message in messages)
        if self._courier is None and fetches and not stale:
            # So that a version which only this replica has seen is updated in place.
            self.hands.let_go()
            around.release(self._turn)
        if self._courier is None:
            around.push(step, messages, count, fetches)
        else:
            self._away.append(
                self._courier.submit(around.push, step, messages, count, fetches)
            )
