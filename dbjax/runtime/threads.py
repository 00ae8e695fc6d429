"""Real asynchrony in one process: a thread a replica, a lock a shard, no polling.

JAX releases the interpreter lock while it computes, so replicas use all cores. A push
is handled in its replica's thread, under the shard's lock; only its dispatch is, the
update itself runs behind. What happens is recorded in causal order.
"""

import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dbjax.runtime import interrupts
from dbjax.runtime.base import MOST_REJECTED, Program, RejectedTooOften
from dbjax.runtime.life import Hands, Life
from dbjax.runtime.live_shard import LiveShard, Snapshot
from dbjax.runtime.recorder import Recorder
from dbjax.server.messages import Fetched, Push
from dbjax.server.shard import Shard, ShardState
from dbjax.trace import COMPUTE, FAIL, FETCH, JOIN, LEAVE, PUSH
from dbjax.typing import Params

LOOK_UP = 1.0
"""Seconds until a Ctrl-C is heard that came at the one moment when nobody listens."""


@dataclasses.dataclass(frozen=True)
class Threads:
    """Run replicas as threads of this process, on this machine's cores.

    Attributes:
      digest_every: every so many versions a shard's parameters are checksummed into the
        Trace, so that `replay(verify=True)` can name the first divergence; 0 for never.
      jitter: seconds; each request first waits a random time of up to this much, to try
        out other orders.
      seed: seed of the jitter.

    >>> Threads().digest_every
    100
    """

    digest_every: int = 100
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.digest_every < 0:
            raise ValueError(
                f"digest_every must be at least 0, got {self.digest_every}"
            )
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"jitter must be at least 0 seconds, got {self.jitter}")


class ReplicaError(RuntimeError):
    """A replica's thread has failed; the cause is chained."""


class Crew:
    """A running crew of replica threads and their shards.

    Args:
      program: the algorithm: its actor, periods and ticket desk.
      hands: `hands(replica)` carries out that replica's requests on arrays.
      shard: the shard's functions; `states` and `shard_bytes` one a shard.
      runtime: the `Threads` settings.
      digest: checksum of a shard's parameters.
      batches, ids: where each replica's minibatches and pushes go on (after a resume).
      recorder: the Trace so far.
    """

    def __init__(
        self,
        program: Program,
        hands: Callable[[int], Hands],
        shard: Shard,
        states: list[ShardState],
        shard_bytes: tuple[int, ...],
        runtime: Threads,
        digest: Callable[[Params], int],
        recorder: Recorder,
        batches: list[int],
        ids: list[int],
    ) -> None:
        self.program, self.hands, self.runtime = program, hands, runtime
        self.digest, self.recorder = digest, recorder
        self.batches, self.ids = batches, ids
        self.shards = [
            LiveShard(i, shard, state, nbytes)
            for i, (state, nbytes) in enumerate(zip(states, shard_bytes, strict=True))
        ]
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.change = threading.Condition()
        self.alive = self.still = 0
        self.paused = self.stopped = False
        self.marks: dict[str, int] = {}
        self.in_a_row = 0
        self.threads: list[threading.Thread] = []

    # What the driver does.

    @contextlib.contextmanager
    def running(self, marks: dict[str, int]) -> Iterator[None]:
        """Start the replicas; on leaving, they have stopped, whatever happened.

        `marks`: an event of this name is sent each time so many more minibatches are
        done.
        """
        self.marks = marks
        self.alive = self.program.replicas
        for r in range(self.program.replicas):
            self.program.tickets.enter(r)
        self.threads = [
            threading.Thread(
                target=self._live, args=(r,), name=f"replica-{r}", daemon=True
            )
            for r in range(self.program.replicas)
        ]
        pressed: list[bool] = []
        try:
            # A thread half started can neither be joined nor be left alone.
            with interrupts.deferred(lambda: True, lambda: pressed.append(True)):
                for thread in self.threads:
                    thread.start()
            if pressed:
                raise KeyboardInterrupt
            yield
        finally:
            self.stop()
            for thread in self.threads:
                if thread.ident is not None:  # started
                    thread.join()

    def next_event(self) -> tuple[str, Any]:
        """Wait for what the driver should know."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.events.get(timeout=LOOK_UP)

    def stop(self) -> None:
        """No more tickets: replicas push what they have accrued, and leave."""
        with self.change:
            self.stopped, self.paused = True, False
            self.change.notify_all()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold everything still: all is pushed, nothing is in flight."""
        with self.change:
            self.paused = True
            self.change.notify_all()
            # A signal that comes just before a wait does not end it: look up at times.
            while not self.change.wait_for(lambda: self.still == self.alive, LOOK_UP):
                pass
        try:
            yield
        finally:
            with self.change:
                self.paused = False
                self.change.notify_all()

    def snapshot(self, step: int) -> Snapshot:
        """Hold the newest versions of all shards."""
        who = object()
        states = tuple(shard.hold(who) for shard in self.shards)

        def release() -> None:
            for shard in self.shards:
                shard.release(who)

        return Snapshot(step, self.recorder.now(), states, release)

    # What a replica's thread does.

    def _live(self, replica: int) -> None:
        life = Life(
            self.program, self.hands(replica), _Here(self, replica), replica,
            self.batches[replica], self.runtime.jitter, self.runtime.seed,
        )  # fmt: skip
        try:
            self._live_through(replica, life)
        except BaseException as error:
            now, step = self.recorder.now(), life.newest
            # What it had accrued goes with it, and is counted.
            self.recorder.add(FAIL, replica, now, step=step, count=life.hands.count())
            self.events.put(("error", (replica, step, error)))
            self.stop()
        finally:
            life.close()
            with self.change:
                self.program.tickets.leave(replica)
                self.alive -= 1
                last = not self.alive
                self.change.notify_all()
            if last:
                self.events.put(("over", None))

    def _live_through(self, replica: int, life: Life) -> None:
        """Live, to the last push."""
        words, tickets = self.program.requests, self.program.tickets
        self.recorder.add(JOIN, replica, self.recorder.now())
        known = self.batches[replica]
        while life.state.asked != words.stop:
            life.hesitate()
            if life.state.batch > known:
                known = life.state.batch
                if not tickets.protocol.free_running:
                    life.wait()
                self.done(replica)
            life.take(self.ticket(replica, life.flush))
            life.carry_on(words.ticket, words.stop)
        life.end()
        self.recorder.add(LEAVE, replica, self.recorder.now())

    def ticket(self, replica: int, flush: Callable[[], None]) -> int | None:
        """Wait for a ticket; `flush` comes first where the crew is to fall quiet."""
        tickets = self.program.tickets

        def goes_on() -> bool:
            # A round that others have begun is finished first: they wait for this one.
            return not self.paused or tickets.is_awaited(replica)

        while True:
            with self.change:
                while goes_on():
                    step = None if self.stopped else tickets.ask(replica)
                    if step is None:
                        self._has_begun(replica)  # there is nothing it has to fetch
                    if step is None or step >= 0:
                        return step
                    self.change.wait()
            flush()
            with self.change:
                self.still += 1
                self.change.notify_all()
                self.change.wait_for(goes_on)
                self.still -= 1

    def _has_begun(self, replica: int) -> None:
        if self.program.tickets.gated:
            self.program.tickets.begun(replica)
            self.change.notify_all()

    def begun(self, replica: int) -> None:
        """A replica has the parameters for its minibatch."""
        if self.program.tickets.gated:
            with self.change:
                self._has_begun(replica)

    def wait_to_push(self, replica: int) -> None:
        """Wait until the protocol lets it push."""
        tickets = self.program.tickets
        if tickets.gated:
            with self.change:
                self.change.wait_for(lambda: tickets.may_push(replica))

    def done(self, replica: int) -> None:
        """A minibatch is finished: tell the desk, and the driver where it asked."""
        with self.change:
            self.program.tickets.done(replica)
            finished = self.program.tickets.finished
            self.change.notify_all()
            # Under the lock, so that the driver hears of minibatches in order.
            for name, every in self.marks.items():
                if every and finished % every == 0:
                    what = self.snapshot(finished) if name == "eval" else finished
                    self.events.put((name, what))

    def push(self, replica: int, step: int, messages: list[Push], count: int) -> None:
        """Hand a push to every shard."""
        start = self.recorder.now()
        protocol, clocks = self.program.tickets.protocol, self.program.tickets.clocks

        def takes(missed: int) -> bool:
            return protocol.takes is None or protocol.takes(clocks, replica, missed)

        def recording(shard: LiveShard, message: Push) -> Callable[[int, int], object]:
            place = PUSH, replica, start, shard.index, step, -1
            return lambda version, status: self.recorder.add(
                *place, version, message.base, count, status, shard.nbytes, message.id
            )

        who, every = object(), self.runtime.digest_every

        def keep(version: int) -> object | None:
            return who if every and version % every == 0 else None

        for shard, message in zip(self.shards, messages, strict=True):
            state = shard.push(message, takes, recording(shard, message), keep)
            if keep(state.version) is not None:
                digest = self.digest(state.params)
                self.recorder.digests.append((shard.index, state.version, digest))
                shard.release(who)
        self.in_a_row = 0 if messages[0].taken else self.in_a_row + 1
        if self.in_a_row >= MOST_REJECTED:
            raise RejectedTooOften(self.in_a_row, replica, step)


class _Here:
    """A thread's surroundings: shards and clock are those of its crew."""

    def __init__(self, crew: Crew, replica: int) -> None:
        self.crew, self.replica = crew, replica

    def now(self) -> float:
        return self.crew.recorder.now()

    def fetch(self, turn: int) -> list[Fetched]:
        states = [shard.hold((self.replica, turn)) for shard in self.crew.shards]
        return [Fetched(state.params, state.version) for state in states]

    def release(self, turn: int) -> None:
        for shard in self.crew.shards:
            shard.release((self.replica, turn))

    def landed(self, step: int, start: float, fetched: list[Fetched]) -> None:
        for shard, answer in zip(self.crew.shards, fetched, strict=True):
            self.crew.recorder.add(
                FETCH, self.replica, start, shard.index, step, version=answer.version,
                nbytes=shard.nbytes,
            )  # fmt: skip

    def begun(self) -> None:
        self.crew.begun(self.replica)

    def computed(self, step: int, batch: int, start: float) -> None:
        self.crew.batches[self.replica] = batch + 1
        self.crew.recorder.add(COMPUTE, self.replica, start, step=step, batch=batch)

    def wait_to_push(self) -> None:
        self.crew.wait_to_push(self.replica)

    def next_id(self) -> int:
        id_ = self.crew.ids[self.replica]
        self.crew.ids[self.replica] += 1
        return id_

    def push(self, step: int, messages: list[Push], count: int, fetches: bool) -> None:
        self.crew.push(self.replica, step, messages, count)
