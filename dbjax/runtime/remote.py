"""The driver of a run whose replicas and shards are processes of their own.

One thread hears of everything, one thing after the other: reports of replicas, deaths,
and what the run asks for. It hands out tickets, replaces whoever dies, and never waits;
replicas exchange arrays with the shards, not with it.
"""

import bisect
import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dbjax.runtime.base import MOST_REJECTED, Program, RejectedTooOften
from dbjax.runtime.causal import CausalOrder
from dbjax.runtime.live_shard import Snapshot
from dbjax.runtime.parcels import Held, Parcel, Report
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.remote_shards import RemoteShards
from dbjax.runtime.replica_host import FAILED_AT
from dbjax.runtime.transport import SIDE, Address, Gone, Reply, Transport
from dbjax.server.shard import ShardState
from dbjax.trace import COMPUTE, FAIL, JOIN, LEAVE, NOT_FINITE, PUSH, RESTART

MOST_DEATHS = 5
"""So many deaths of a replica in a row, without a minibatch between, end a run."""

LOOK_UP = 1.0
"""Seconds between looks at who has not answered for too long."""

LASTS = 0.05
"""Seconds that an order is to last: short minibatches are ordered several at once."""

_AT = {name: place for place, name in enumerate(COLUMNS)}
_OUT, _COMING, _HERE, _DEAD = "out", "coming", "here", "dead"


class Progress(NamedTuple):
    """How a run goes.

    Attributes:
      step: minibatches finished.
      time: seconds since the run began.
      updates_per_second: pushes that the shards have handled, since the last time.
      staleness: their mean staleness.
      replicas: how many are alive.
      deaths: of replicas and shards, so far.
    """

    step: int
    time: float
    updates_per_second: float
    staleness: float
    replicas: int
    deaths: int


class Order(NamedTuple):
    """What a replica was told to do.

    Attributes:
      name: the method of its `ReplicaHost`.
      steps: the tickets it got.
    """

    name: str
    steps: tuple[int, ...] = ()


class Terms(NamedTuple):
    """What a crew needs to know of its run.

    Attributes:
      make_replica: `make_replica(replica, life, shards, batch, next_id, zero)` gives
        what makes a `ReplicaHost` in its process.
      make_shard: `make_shard(shard, held, zero)` gives what makes a `ShardHost`.
      devices: of a replica.
      processes: that these are spread over.
      standby: whether each shard has one.
      snapshot_every: minibatches between copies of the shards; 0 for none.
      timeout: seconds until a process that does not answer is given up.
      replicas_at: how many replicas are wanted after so many minibatches.
      watch: told how the run goes.
      watch_every: seconds between.
    """

    make_replica: Callable[..., Callable[[], Any]]
    make_shard: Callable[..., Callable[[], Any]]
    devices: int
    processes: int
    standby: bool
    snapshot_every: int
    timeout: float
    replicas_at: Callable[[int], int] | None = None
    watch: Callable[[Progress], None] | None = None
    watch_every: float = 1.0


class Member:
    """What the driver knows of one replica.

    Attributes:
      address: where it lives.
      life: how often it has begun.
      place: out, coming, here, or dead, while that is being settled.
      orders: those that it has not reported on.
      since: when it last reported, or got the first of them.
      pace: seconds that a ticket of its last order took.
      asked: what its actor asked for at the last report.
      batch: its next minibatch.
      next_id: of its pushes.
      rows: of the Trace, not yet merged.
      steps: those that it is known to have computed.
      seen: names of its rows, and numbers of its pushes, that are known.
      unpushed: by life, gradients that are known to be computed, and not to be pushed.
      firsts: by life, its first push.
      failed: by life, the row that says how many of them were lost.
      deaths: in a row.
      still: whether nothing of it is under way.
      done: whether there was nothing left for it to do.
      state: what of it belongs into a checkpoint, where it has left.
    """

    def __init__(self, batch: int, next_id: int) -> None:
        self.address: Address | None = None
        self.life, self.place = -1, _OUT
        self.orders: list[Order] = []
        self.since, self.pace, self.asked = 0.0, math.inf, ""
        self.batch, self.next_id = batch, next_id
        self.rows: list[Any] = []
        self.steps: set[int] = set()
        self.seen: set[Any] = set()
        self.unpushed: list[int] = []
        self.firsts: list[int] = []
        self.failed: dict[int, list[Any]] = {}
        self.deaths = 0
        self.still, self.done = True, False
        self.state: Any = None

    def begin(self) -> None:
        """Begin another life."""
        self.life += 1
        self.firsts.append(self.next_id)
        self.unpushed.append(0)

    def count(self, life: int, change: int) -> None:
        """Take note of gradients of a life, which may have ended already."""
        self.unpushed[life] += change
        if life in self.failed:
            self.failed[life][_AT["count"]] = max(0, self.unpushed[life])

    def pushed(self, id_: int, count: int) -> None:
        """Take note of a push, if it is news."""
        if id_ not in self.seen:
            self.seen.add(id_)
            self.count(bisect.bisect_right(self.firsts, id_) - 1, -count)


class RemoteCrew:
    """Replicas and shards as processes, and who looks after them.

    Args:
      program: the algorithm: its actor, periods and ticket desk.
      transport: starts processes.
      terms: of the run.
      begin: what each shard begins with.
      recorder: the Trace so far.
      batches, ids: where each replica's minibatches and pushes go on (after a resume).
    """

    def __init__(
        self,
        program: Program,
        transport: Transport,
        terms: Terms,
        begin: list[Held],
        recorder: Recorder,
        batches: list[int],
        ids: list[int],
    ) -> None:
        self.program, self.transport, self.terms = program, transport, terms
        self.recorder, self.batches, self.ids = recorder, batches, ids
        self._inbox: queue.Queue[Callable[[], Any]] = queue.Queue()
        self._zero = recorder.zero()
        self._clock = Recorder(zero=self._zero)  # this thread's own
        pairs = zip(batches, ids, strict=True)
        self._members = [Member(batch, id_) for batch, id_ in pairs]
        self.shards = RemoteShards(
            transport,
            lambda shard, held: terms.make_shard(shard, held, self._zero),
            *(begin, terms.standby, terms.timeout, self._clock),
            *(self._do, self._shard_moved),
        )
        self._order = CausalOrder(len(begin))
        self._order.begin_at((held.version, held.incarnation) for held in begin)
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._marks: dict[str, int] = {}
        self._paused = self._stopped = self._over = False
        self._still, self._empty = threading.Event(), threading.Event()
        self._looked = time.monotonic()
        self._in_a_row = self.deaths = 0
        self._updates, self._staleness = 0, 0  # since the watch was last told
        self._told = time.monotonic()

    # What the run does.

    @property
    def alive(self) -> int:
        """How many replicas are at work."""
        return sum(member.place != _OUT for member in self._members)

    @property
    def gaps(self) -> int:
        """How many rows of the record have a cause that nobody knows any more."""
        return self._order.gaps

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Start the shards; on leaving, every process has been let go."""
        hearing = threading.Thread(target=self._hear, name="replica-driver")
        try:
            hearing.start()
            self.shards.start()
            yield
        finally:
            self._inbox.put(self._end)
            hearing.join()
            self.shards.end()

    @contextlib.contextmanager
    def running(self, marks: dict[str, int]) -> Iterator[None]:
        """Start the replicas; on leaving, they have stopped, whatever happened.

        `marks`: an event of this name is sent each time so many more minibatches are
        done.
        """
        self._marks = marks
        self._inbox.put(self._invite)
        try:
            yield
        finally:
            self.stop()
            while not self._empty.wait(LOOK_UP):
                pass

    def next_event(self) -> tuple[str, Any]:
        """Wait for what the run should know."""
        while True:
            with contextlib.suppress(queue.Empty):
                name, what = self.events.get(timeout=LOOK_UP)
                return name, self.shards.snapshot(*what) if name == "eval" else what

    def stop(self) -> None:
        """No more tickets: replicas push what they have accrued, and leave."""
        self._inbox.put(self._stop)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold everything still: all is pushed, nothing is in flight."""
        # An event of its own: the end of the last pause may not have been heard of yet.
        still = threading.Event()
        self._inbox.put(lambda: self._pause(still))
        # A signal that comes just before a wait does not end it: look up at times.
        while not still.wait(LOOK_UP):
            pass
        try:
            yield
        finally:
            self._inbox.put(self._go_on)

    def snapshot(self, step: int) -> Snapshot:
        """Give the newest versions of all shards."""
        asked = self.shards.ask_all_to_show()
        return self.shards.snapshot(step, self.recorder.now(), asked)

    def collect(self) -> list[ShardState]:
        """Complete the record, while nothing is under way; give the shards' states."""
        while True:
            held, heard, done = self.shards.collect(), threading.Event(), []
            self._inbox.put(lambda h=held, d=done: d.append(self._merge(h)))
            self._inbox.put(heard.set)
            while not heard.wait(LOOK_UP):
                pass
            if done == [True]:
                break
        # Some may have been given before, by a shard that died before it forgot them.
        digests = dict.fromkeys(self.recorder.digests)
        for one in held:
            digests |= dict.fromkeys(one.digests)
        self.recorder.digests = list(digests)
        return [
            ShardState(one.params, one.optimizer_state, one.version, one.incarnation)
            for one in held
        ]

    def states_of_replicas(self) -> dict[int, Any]:
        """Give what of each replica belongs into a checkpoint; all must be still."""
        asked = {
            replica: member.address.ask("state")
            for replica, member in enumerate(self._members)
            if member.place == _HERE and member.address is not None
        }
        there = {r: reply.result(self.terms.timeout) for r, reply in asked.items()}
        left = {r: m.state for r, m in enumerate(self._members) if m.state is not None}
        return left | there

    # The thread that hears of everything.

    def _merge(self, held: list[Held]) -> bool:
        """Put the record in order, unless a shard has died since it was collected."""
        if not self.shards.are_still(held):
            return False
        lines = [member.rows for member in self._members]
        self.recorder.rows += self._order.merge([*lines, *self.shards.lines()])
        for replica, member in enumerate(self._members):
            member.rows = []
            self.batches[replica], self.ids[replica] = member.batch, member.next_id
        return True

    def _hear(self) -> None:
        while not self._over:
            call: Callable[[], Any] = self._look_around
            with contextlib.suppress(queue.Empty):
                call = self._inbox.get(timeout=LOOK_UP)
            try:
                call()
                self._look_around()
            except BaseException as error:  # or the run would wait for ever
                self._fail(-1, -1, error)
                for replica in range(len(self._members)):
                    self._let_go(replica)

    def _do(self, call: Callable[[], Any]) -> None:
        self._inbox.put(call)

    def _when(self, reply: Reply, call: Callable[[Reply], None]) -> None:
        """Have `call(reply)` called by this thread when the reply is there."""
        reply.then(lambda reply: self._inbox.put(lambda: call(reply)))

    def _look_around(self) -> None:
        """See whether all is still, or over, and who is silent."""
        if time.monotonic() - self._looked > LOOK_UP:
            self._looked = time.monotonic()
            self._look_for_the_silent()
        if self.terms.watch is not None:
            self._tell(self.terms.watch)
        members = [member for member in self._members if member.place != _OUT]
        over = not members and (self._stopped or self.program.tickets.is_empty())
        if over and not self._empty.is_set():
            self._stopped = True
            self._empty.set()
            self._still.set()
            self.events.put(("over", None))
        quiet = all(m.place == _HERE and m.still for m in members)
        if self._paused and quiet and not self.shards.moving:
            self._still.set()

    def _tell(self, watch: Callable[[Progress], None]) -> None:
        """Tell how the run goes, if it is time."""
        seconds = time.monotonic() - self._told
        if seconds < self.terms.watch_every or self._empty.is_set():
            return
        pushes, self._told = self._updates, time.monotonic()
        watch(
            Progress(
                step=self.program.tickets.finished,
                time=self._clock.now(),
                updates_per_second=pushes / len(self.shards) / seconds,
                staleness=self._staleness / max(1, pushes),
                replicas=sum(member.place == _HERE for member in self._members),
                deaths=self.deaths + self.shards.deaths,
            )
        )
        self._updates = self._staleness = 0

    # Who is there.

    def _invite(self) -> None:
        """Let those replicas join which are wanted and not there."""
        wanted = self._wanted()
        for replica, member in enumerate(self._members):
            done = self._stopped or self.program.tickets.is_empty()
            out = member.place == _OUT and not member.done
            if out and replica < wanted and not done:
                self._join(replica)

    def _wanted(self) -> int:
        most, how_many = len(self._members), self.terms.replicas_at
        if how_many is None:
            return most
        return max(1, min(most, int(how_many(self.program.tickets.finished))))

    def _join(self, replica: int) -> None:
        member = self._members[replica]
        member.place = _COMING
        member.begin()
        make = self.terms.make_replica(
            replica, member.life, self.shards.addresses(), member.batch,
            member.next_id, self._zero,
        )  # fmt: skip
        member.since, member.still = time.monotonic(), True
        member.address, there = self.transport.host(
            f"replica {replica}", make, kind="replica", devices=self.terms.devices,
            processes=self.terms.processes,
        )  # fmt: skip
        life = member.life
        self._when(there, lambda reply: self._joined(replica, life, reply))
        self._watch(replica, life)

    def _watch(self, replica: int, life: int) -> None:
        """Be told when a replica's process dies."""
        member = self._members[replica]

        def told(reply: Reply) -> None:
            if member.life != life or member.place not in (_HERE, _COMING):
                return
            try:
                reply.result(self.terms.timeout)
            except Gone:
                self._died(replica, life)
            else:  # somebody who had it before has let it go
                self._watch(replica, life)

        assert member.address is not None
        self._when(member.address.ask("alive", lane=SIDE), told)

    def _joined(self, replica: int, life: int, reply: Reply) -> None:
        member = self._members[replica]
        if member.life != life or member.place != _COMING:
            return
        try:
            reply.result(self.terms.timeout)
        except Gone:
            return  # it is heard of elsewhere
        except Exception as error:
            self._fail(replica, -1, error)
            self._let_go(replica)
            return
        member.place, member.asked = _HERE, self.program.requests.ticket
        member.state = None
        self._record(RESTART if life else JOIN, replica)
        assert member.address is not None
        for shard, address in enumerate(self.shards.addresses()):
            member.address.ask("moved", shard, address, lane=SIDE)  # if it has
        self.program.tickets.enter(replica)
        self._feed_all()

    def _shard_moved(self, shard: int, address: Address) -> None:
        for member in self._members:
            if member.place == _HERE and member.address is not None:
                member.address.ask("moved", shard, address, lane=SIDE)

    def _let_go(self, replica: int) -> None:
        """A replica's process is needed no more."""
        member = self._members[replica]
        member.place, member.orders = _OUT, []
        if member.address is not None:
            self.transport.end(member.address)
            member.address = None

    # What they are told, and what they say.

    def _feed_all(self) -> None:
        for replica in range(len(self._members)):
            self._feed(replica)

    def _feed(self, replica: int) -> None:
        """Give a replica what to do, as far as there is something."""
        member, tickets = self._members[replica], self.program.tickets
        # One ahead, so that it need not wait for us; unless others decide what is next.
        depth = 2 if tickets.protocol.free_running else 1
        while member.place == _HERE and len(member.orders) < depth:
            if not all(order.steps for order in member.orders):
                return  # what comes next depends on it
            if member.asked == self.program.requests.push:
                if not tickets.may_push(replica):
                    return
                self._send(replica, Order("push"))
                continue
            leaves = self._stopped or replica >= self._wanted()
            # A round that others have begun is finished first: they wait for this one.
            if self._paused and not leaves and not tickets.is_awaited(replica):
                if not member.orders and not member.still:
                    self._send(replica, Order("flush"))
                return
            step = None if leaves else tickets.ask(replica)
            if step is None and not member.orders:
                tickets.begun(replica)  # there is nothing it has to fetch
                self._send(replica, Order("take"))
            if step is None or step < 0:
                return
            more = range(self._at_once(member) - 1)
            steps = [step, *(tickets.ask(replica) for _ in more)]
            given = tuple(step for step in steps if step is not None and step >= 0)
            self._send(replica, Order("take", given))

    def _at_once(self, member: Member) -> int:
        """How many tickets to give at once, so that we are not what takes time."""
        tickets, replicas = self.program.tickets, len(self._members)
        if not (tickets.protocol.free_running and tickets.warm):
            return 1  # others decide what is next
        left = tickets.steps - tickets.next  # all are to end together
        return max(1, min(int(LASTS / member.pace), left // (8 * replicas)))

    def _send(self, replica: int, order: Order) -> None:
        member, tickets = self._members[replica], self.program.tickets
        assert member.address is not None
        if not member.orders:
            member.since = time.monotonic()
        member.orders.append(order)
        member.still = False
        clocks = None if tickets.protocol.free_running else tickets.clocks
        args = (order.steps,) if order.name == "take" else ()
        reply, life = member.address.ask(order.name, *args, clocks), member.life
        self._when(reply, lambda reply: self._reported(replica, life, reply))

    def _reported(self, replica: int, life: int, reply: Reply) -> None:
        """A replica has carried out its oldest order."""
        member, tickets = self._members[replica], self.program.tickets
        if member.life != life or member.place != _HERE:
            return
        try:
            report: Report = reply.result(self.terms.timeout)
        except Gone:
            return  # its death is heard of elsewhere
        except Exception as error:
            steps = [step for order in member.orders for step in order.steps]
            step = getattr(error, FAILED_AT, steps[0] if steps else -1)
            self._fail(replica, step, error)
            self._died(replica, life)
            return
        order, now = member.orders.pop(0), time.monotonic()
        if order.steps:
            member.pace = max((now - member.since) / len(order.steps), 1e-4)
        member.since = now
        member.asked, member.next_id = report.asked, report.next_id
        member.batch = max(member.batch, report.batch)
        self._learn(member, life, report.rows)
        words = self.program.requests
        if order.steps:
            member.deaths = 0
            tickets.begun(replica)
        if order.name == "flush":
            member.still = True
        elif report.asked == words.stop:
            self._record(LEAVE, replica)
            member.state = report.state
            tickets.leave(replica)
            self._let_go(replica)
            member.done = replica < self._wanted()
        elif report.asked == words.ticket:
            for _ in range(max(1, len(order.steps))):
                tickets.done(replica)
                self._finished()
        if tickets.protocol.free_running and tickets.warm:
            self._feed(replica)
        else:
            self._feed_all()

    def _finished(self) -> None:
        """A minibatch is finished: tell whoever has asked for that."""
        finished = self.program.tickets.finished
        for name, every in self._marks.items():
            if every and finished % every == 0:
                what: Any = finished
                if name == "eval":
                    asked = self.shards.ask_all_to_show()
                    what = finished, self._clock.now(), asked
                self.events.put((name, what))
        if self.terms.snapshot_every and finished % self.terms.snapshot_every == 0:
            self.shards.copy()
        if self.terms.replicas_at is not None:
            self._invite()
        if finished == self.program.tickets.warmstart_steps:  # the others' turn
            self._feed_all()

    def _learn(self, member: Member, life: int, rows: Any) -> None:
        """Take the rows that are not known yet, of the replica itself or of shards."""
        for row in rows:
            if row[_AT["kind"]] == PUSH:
                if self.shards.heard(row):
                    self._count(row)
                continue
            # A step that was given back may be its own again, in another life.
            name = life, row[_AT["kind"]], row[_AT["step"]], row[_AT["shard"]]
            if name in member.seen:
                continue
            member.seen.add(name)
            member.rows.append(row)
            if row[_AT["kind"]] == COMPUTE:
                member.steps.add(row[_AT["step"]])
                member.batch = max(member.batch, row[_AT["batch"]] + 1)
                member.count(life, 1)

    def _count(self, row: Any) -> None:
        """Take note of a push that a shard has handled."""
        if row[_AT["replica"]] < 0:
            return
        self._members[row[_AT["replica"]]].pushed(row[_AT["id"]], row[_AT["count"]])
        self._updates += 1
        self._staleness += max(0, row[_AT["version"]] - 1 - row[_AT["base"]])
        if row[_AT["shard"]] == 0:
            bad = row[_AT["status"]] == NOT_FINITE
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if self._in_a_row == MOST_REJECTED:
                replica, step = row[_AT["replica"]], row[_AT["step"]]
                error = RejectedTooOften(MOST_REJECTED, replica, step)
                self._fail(replica, step, error)

    def _record(self, kind: int, replica: int) -> list[Any]:
        row = self._clock.make_row(kind, replica)
        self._members[replica].rows.append(row)
        return row

    # Beginning and end.

    def _fail(self, replica: int, step: int, error: BaseException) -> None:
        """Let the run end with an error of the user's code, or ours."""
        self.events.put(("error", (replica, step, error)))
        self._stop()

    def _stop(self) -> None:
        self._stopped, self._paused = True, False
        self._feed_all()

    def _end(self) -> None:
        self._over = True

    def _pause(self, still: threading.Event) -> None:
        self._paused, self._still = True, still
        self._feed_all()

    def _go_on(self) -> None:
        self._paused = False
        self._feed_all()

    # Deaths.

    def _look_for_the_silent(self) -> None:
        """Kill those that have not answered for too long: they are replaced."""
        now = time.monotonic()
        if not self._empty.is_set():
            self.shards.look_for_the_silent(now)
        for member in self._members:
            waits = member.orders or member.place == _COMING
            steps = len(member.orders[0].steps) if member.orders else 1
            if waits and now - member.since > self.terms.timeout * max(1, steps):
                assert member.address is not None
                self.transport.kill(member.address)
                member.since = now

    def _died(self, replica: int, life: int) -> None:
        """A replica is gone: find out what became of its pushes."""
        member = self._members[replica]
        if member.life != life or member.place not in (_HERE, _COMING):
            return
        self.deaths += 1
        member.deaths += 1
        was_here, member.place = member.place == _HERE, _DEAD
        if not was_here:
            self._replace(replica)
            return
        self.shards.lives[replica] = life + 1
        calls = dict.fromkeys(range(len(self.shards)), ("fence", (replica, life)))
        self.shards.ask(calls, functools.partial(self._settle, replica))

    def _settle(self, replica: int, sent: dict[int, list[Parcel]]) -> None:
        """Let pushes that reached some shards count on all, as dropped on the others.

        What these were to get is lost with the replica.
        """
        member = self._members[replica]
        parcels = {p.push.id: p for some in sent.values() for p in some}
        for id_ in sorted(parcels):
            self._learn(member, parcels[id_].life, parcels[id_].journal)
            member.next_id = max(member.next_id, id_ + 1)
            member.pushed(id_, parcels[id_].count)
        known, missing = self.shards.acknowledged(replica), {}
        for shard, some in sent.items():
            there = {p.push.id for p in some}
            torn = [parcels[i] for i in sorted(parcels) if i not in there]
            if torn := [p for p in torn if p.push.id > known[shard]]:
                missing[shard] = "settle", (torn,)
        self.shards.ask(missing, lambda answers: self._settled(replica))

    def _settled(self, replica: int) -> None:
        """Count what is lost with a replica, and give back what it had not begun."""
        member, tickets = self._members[replica], self.program.tickets
        member.failed[member.life] = self._record(FAIL, replica)
        member.count(member.life, 0)
        for step in [step for order in member.orders for step in order.steps]:
            if step in member.steps:
                tickets.lost(replica)
                self._finished()
            else:
                tickets.give_back(step)
        tickets.leave(replica)
        self._replace(replica)

    def _replace(self, replica: int) -> None:
        """Let a replica begin again, or give up."""
        member = self._members[replica]
        self._let_go(replica)
        if member.deaths >= MOST_DEATHS:
            error = RuntimeError(f"its process has died {member.deaths} times in a row")
            self._fail(replica, -1, error)
        done = self._stopped or self.program.tickets.is_empty()
        if replica < self._wanted() and not done:
            self._join(replica)
        self._feed_all()
