"""The discrete events of an emulated run: one heap, the actors, the desk, the network.

A *turn* is one visit to a replica: it goes on until it has to wait, for a minibatch, a
message or the desk. Turns at the same time come in the order of the replicas, and
messages that arrive at that time before them, in the order in which they were sent.
"""

import functools
import heapq
import math
from typing import Any

import numpy as np

from dbjax.cluster import Cluster
from dbjax.runtime.base import Program
from dbjax.runtime.network import Message, Network, Push, ahead
from dbjax.runtime.rows import Rows
from dbjax.trace import FAIL, JOIN, LEAVE, RESTART

# What happens at a replica's turn: it joins, it has the parameters for its minibatch
# (where pushes wait for that), its minibatch ends, it goes on with what it asked for,
# it fails, it comes back.
_JOIN, _BEGIN, _END, _GO, _FAIL, _RESTART = range(6)
# What follows when all shards have answered a message.
_NOTHING, _COMPUTE, _FINISH, _BACK, _LEAVE = range(5)
# Arrivals stand before turns of the same time: their order is below every replica.
_ARRIVALS = 1 << 62
_PACK = 1 << 16  # turns between two times that rows are packed


class Events:
    """One emulated run; `run` may be called once."""

    def __init__(
        self,
        program: Program,
        cluster: Cluster,
        seed: int,
        shard_bytes: tuple[int, ...],
    ) -> None:
        """Put every replica's join on the heap.

        Args:
          program: what is run.
          cluster: how long everything takes.
          seed: seed of the draws.
          shard_bytes: size of each shard `[S]`.
        """
        replicas = program.replicas
        self._advance, self._begin = program.advance, program.begin
        self._periods, self._asks = program.periods, program.requests
        self._wait, self._desk = program.wait, program.tickets
        self._free = self._desk.protocol.free_running
        self._gated = self._desk.gated
        self._overlap = self._periods[0].overlap
        self._cluster, self._seed, self._shard_bytes = cluster, seed, shard_bytes
        self._rows = Rows()
        takes = self._desk.protocol.takes
        if takes is not None:
            takes = functools.partial(takes, self._desk.clocks)
        self._network = Network(
            cluster, seed, replicas, shard_bytes, takes=takes, rows=self._rows
        )
        self._quick = self._network.near and not self._overlap
        draw = functools.partial(cluster.compute_times, seed)
        self._times = ahead(draw, replicas)
        self._turn = 0
        self._waiting: dict[int, None] = {}  # for a ticket
        self._holding: dict[int, None] = {}  # with a push in hand
        # Of each replica:
        self._state = [program.state] * replicas
        self._finished = [False] * replicas  # a minibatch that the desk knows not of
        self._began = [0.0] * replicas
        self._begins = [math.inf] * replicas  # when the desk hears that it has begun
        self._newest = [-1] * replicas
        self._pushes = [0] * replicas
        self._versions = [[0] * program.shards] * replicas
        self._base = list(self._versions)  # versions of the oldest accrued gradient
        self._exchange: list[Message | None] = [None] * replicas  # beside the minibatch
        self._awaits = [False] * replicas  # whether it waits for that
        self._failures = [0] * replicas
        self._fails_at = [math.inf] * replicas
        self._downtime = [0.0] * replicas  # after that failure
        join = cluster.join_times(seed, np.arange(replicas)).tolist()
        self._heap: list[Any] = [(time, r, _JOIN) for r, time in enumerate(join)]
        heapq.heapify(self._heap)

    def run(self) -> dict[str, np.ndarray]:
        """Let everything happen.

        Returns:
          Columns for `Trace.from_columns`.

        Raises:
          RuntimeError: replicas are left that wait for ever.
        """
        heap, pop, end = self._heap, heapq.heappop, self._end
        others = {
            _JOIN: self._join,
            _BEGIN: self._begin_round,
            _GO: self._go,
            _FAIL: self._fail,
            _RESTART: self._restart,
        }
        while heap:
            event = pop(heap)
            if event[1] < 0:
                now, _, shard, message = event
                self._network.arrive(message, shard, now)
                if not message.open:
                    self._answered(message)
                continue
            now, replica, what = event
            self._turn += 1
            if self._turn % _PACK == 0:
                self._rows.pack()
            if what == _END:
                end(replica, now)
            else:
                others[what](replica, now)
        waiting = sorted([*self._waiting, *self._holding])
        if waiting:
            raise RuntimeError(
                f"protocol {self._desk.protocol.name!r} lets replicas "
                f"{waiting} wait for ever: nobody is left who could "
                "finish a minibatch."
            )
        return self._rows.columns(self._shard_bytes)

    # What happens at a turn.

    def _join(self, replica: int, now: float) -> None:
        self._note(JOIN, replica, now)
        self._enter(replica, now)

    def _restart(self, replica: int, now: float) -> None:
        self._note(RESTART, replica, now)
        self._enter(replica, now)

    def _enter(self, replica: int, now: float) -> None:
        self._desk.enter(replica)
        self._release(now)
        if self._cluster.fails:
            failures = self._failures[replica]
            uptime, downtime = self._cluster.outage(self._seed, replica, failures)
            self._fails_at[replica] = now + uptime
            self._downtime[replica] = downtime
        if self._network.draws:
            self._network.next_turn(replica)
        self._state[replica] = self._begin(self._state[replica])
        self._go(replica, now)

    def _begin_round(self, replica: int, now: float) -> None:
        if self._begins[replica] == now:  # or it has failed before
            self._begins[replica] = math.inf
            self._desk.begun(replica)
            self._release(now)

    def _end(self, replica: int, now: float) -> None:
        state = self._state[replica]
        self._rows.compute.append(
            (now, self._turn, self._began[replica], replica, state.step, state.batch)
        )
        if not state.accrued:
            self._base[replica] = self._versions[replica]
        self._newest[replica] = state.step
        self._finished[replica] = True
        self._state[replica] = self._advance(state, self._periods[replica])
        if self._network.draws:
            self._network.next_turn(replica)
        self._go(replica, now)

    def _fail(self, replica: int, now: float) -> None:
        state = self._state[replica]
        self._note(FAIL, replica, now, state.step, state.accrued)
        self._exchange[replica], self._begins[replica] = None, math.inf
        # The lost minibatch is not computed again.
        self._state[replica] = state._replace(batch=state.batch + 1)
        self._desk.lost(replica)
        self._desk.leave(replica)
        self._release(now)
        self._failures[replica] += 1
        event = now + self._downtime[replica], replica, _RESTART
        heapq.heappush(self._heap, event)

    # Carrying out what the actor asks for.

    def _go(self, replica: int, now: float) -> None:
        """Carry out one request after the other, until one takes time."""
        asks, advance, periods = self._asks, self._advance, self._periods[replica]
        network, state = self._network, self._state[replica]
        push, handled = None, now
        if self._overlap:
            self._install(replica, now)
        while True:
            asked = state.asked
            if asked == asks.ticket:
                if self._finished[replica]:
                    if self._gated and self._exchange[replica] is not None:
                        self._await_exchange(replica)  # it belongs to this round
                        break
                    self._report(replica, now)
                    if not self._free:  # others at this time may come first
                        heapq.heappush(self._heap, (now, replica, _GO))
                        break
                ticket = self._desk.ask(replica)
                if ticket == self._wait:
                    self._waiting[replica] = None
                    break
                if ticket is None and self._gated:  # the others' round goes on without
                    self._desk.begun(replica)
                    self._release(now)
                state = advance(state, periods, ticket)
            elif asked == asks.fetch:
                if self._overlap and not state.fresh:
                    if self._exchange[replica] is not None:
                        self._await_exchange(replica)
                        break
                    self._send(replica, now, push, state.step, _BACK)
                    push = None
                elif self._quick:
                    landed, turn, versions = network.fetch(replica, self._turn, now)
                    self._versions[replica] = versions
                    for shard, version in enumerate(versions):
                        row = landed, turn, now, replica, shard, state.step, version
                        self._rows.fetch.append(row)
                    self._compute(replica, landed, advance(state, periods))
                    return
                else:
                    self._state[replica] = state
                    self._send(replica, now, push, state.step, _COMPUTE)
                    return
                state = advance(state, periods)
            elif asked == asks.compute:
                if push is not None:
                    then = _BACK if self._overlap else _NOTHING
                    self._send(replica, now, push, -1, then)
                self._compute(replica, now, state)
                return
            elif asked == asks.push:
                if self._exchange[replica] is not None:
                    self._await_exchange(replica)
                    break
                if self._gated and not self._desk.may_push(replica):
                    self._holding[replica] = None
                    break
                push = self._pack(replica, state.accrued)
                state = advance(state, periods)
                # Unless all is free, the desk hears of a push when it is handled.
                if self._quick:
                    handled = network.push(replica, self._turn, now, push)
                    push = None
                    if handled > now and not self._free:
                        heapq.heappush(self._heap, (handled, replica, _GO))
                        break
                elif not self._free:
                    self._state[replica] = state
                    self._send(replica, now, push, -1, _FINISH)
                    return
            else:
                if push is not None:
                    self._send(replica, now, push, -1, _LEAVE)
                else:
                    self._note(LEAVE, replica, handled)
                self._desk.leave(replica)
                self._release(now)
                break
        self._state[replica] = state

    def _report(self, replica: int, now: float) -> None:
        """Tell the desk that a minibatch is finished."""
        self._finished[replica] = False
        self._desk.done(replica)
        if self._waiting:
            self._release(now)

    def _release(self, now: float) -> None:
        """Let those who wait for the desk ask again, if it has an answer by now."""
        for replica in self._desk.ready(self._waiting):
            del self._waiting[replica]
            heapq.heappush(self._heap, (now, replica, _GO))
        for replica in self._desk.ready_to_push(self._holding):
            del self._holding[replica]
            heapq.heappush(self._heap, (now, replica, _GO))

    def _pack(self, replica: int, count: int) -> Push:
        number = self._pushes[replica]
        self._pushes[replica] = number + 1
        return Push(self._newest[replica], count, number, self._base[replica])

    def _compute(self, replica: int, now: float, state: Any) -> None:
        """Begin a minibatch; it ends, or the replica fails before."""
        self._state[replica], self._began[replica] = state, now
        if self._gated and self._exchange[replica] is None:
            self._begins_at(replica, now)
        end, fails_at = now + next(self._times[replica]), self._fails_at[replica]
        event = (end, replica, _END)
        if fails_at < end:
            event = (max(fails_at, now), replica, _FAIL)
        heapq.heappush(self._heap, event)

    def _begins_at(self, replica: int, time: float) -> None:
        """Let the desk hear then that it has the parameters for its minibatch."""
        self._begins[replica] = time
        heapq.heappush(self._heap, (time, replica, _BEGIN))

    # Messages.

    def _send(
        self, replica: int, now: float, push: Push | None, step: int, then: int
    ) -> None:
        """Send a message to all shards."""
        network, turn = self._network, self._turn
        message = Message(replica, turn, now, push, step, then)
        if then == _BACK:
            self._exchange[replica] = message
        for shard, time in enumerate(network.send(message)):
            if time == now:
                network.arrive(message, shard, now)
            else:
                event = (time, turn - _ARRIVALS, shard, message)
                heapq.heappush(self._heap, event)
        if not message.open:
            self._answered(message)

    def _answered(self, message: Message) -> None:
        """All shards have handled the message: go on when their answers are back."""
        replica, then = message.replica, message.then
        if then == _COMPUTE:
            self._fetched(message, message.over, message.stands)
            state = self._advance(self._state[replica], self._periods[replica])
            self._compute(replica, message.over, state)
        elif then == _FINISH:
            heapq.heappush(self._heap, (message.over, replica, _GO))
        elif then == _LEAVE:
            row = message.over, message.turn, message.over, replica, LEAVE, -1, 0
            self._rows.other.append(row)
        elif self._exchange[replica] is message:
            if self._gated:  # and there is no push in it, only a fetch
                self._begins_at(replica, message.over)
            if self._awaits[replica]:
                self._await_exchange(replica)

    def _fetched(self, message: Message, now: float, turn: int) -> None:
        """Install what was fetched."""
        replica, sent, step = message.replica, message.sent, message.step
        self._versions[replica] = message.versions
        for shard, version in enumerate(message.versions):
            row = now, turn, sent, replica, shard, step, version
            self._rows.fetch.append(row)

    # With overlap: the exchange beside the minibatch.

    def _await_exchange(self, replica: int) -> None:
        """Go on when the exchange under way is over."""
        message = self._exchange[replica]
        self._awaits[replica] = True
        if message is not None and not message.open:
            self._awaits[replica] = False
            heapq.heappush(self._heap, (message.over, replica, _GO))

    def _install(self, replica: int, now: float) -> None:
        """Install what a finished exchange has fetched."""
        message = self._exchange[replica]
        if message is None or message.open or message.over > now:
            return
        self._exchange[replica] = None
        if message.step >= 0:
            self._fetched(message, now, self._turn)

    def _note(
        self, kind: int, replica: int, now: float, step: int = -1, count: int = 0
    ) -> None:
        self._rows.other.append((now, self._turn, now, replica, kind, step, count))
