"""The discrete events of emulated evaluations: one heap, and the coordinator's orders.

On one link messages do not overtake each other. A shard adds pushes first come, first
served; a replica's pushes run beside its computing. Nobody asks for time: the clock is
the heap's.
"""

import array
import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dbjax.cluster import Cluster, Constant
from dbjax.runtime.network import ahead
from dbjax.sandblaster.messages import (
    Compute,
    Died,
    Done,
    Drop,
    Finished,
    Joined,
    Keep,
    Push,
    Pushed,
)
from dbjax.sandblaster.portions import Message, Order, Portions
from dbjax.trace import COMPUTE, DROPPED, FAIL, FETCH, JOIN, PUSH, RESTART, TAKEN

_FIELDS = (
    "kind time start replica shard step batch version base count status bytes id"
).split()
_STATUS = _FIELDS.index("status")


class Emulation:
    """Evaluations of one batch on an emulated cluster, from time 0 on.

    Args:
      desk: the coordinator's `Portions`, at its beginning.
      cluster: how long everything takes.
      seed: seed of its draws.
      shard_bytes: size of the parameters on each shard.

    Attributes:
      now: the coordinator's time.
      landed: `(push, shard)` as the evaluation's pushes were added, in their order.
    """

    def __init__(
        self, desk: Portions, cluster: Cluster, seed: int, shard_bytes: float
    ) -> None:
        replicas, shards = desk.replicas, desk.shards
        self._desk, self._cluster, self._seed = desk, cluster, seed
        self._bytes, self._transfer = shard_bytes, cluster.transfer_time(shard_bytes)
        self._times = ahead(functools.partial(cluster.compute_times, seed), replicas)
        # To each shard and, last, to the coordinator; and back.
        self._there, self._back = (
            self._latencies(direction, shards + 1) for direction in (0, 1)
        )
        self._service = _draws(
            cluster.shard_service,
            functools.partial(cluster.service_times, seed, shards=shards),
            replicas,
            shards,
        )
        self._rows = array.array("d")  # row by row; there may be millions
        self._heap: list[Any] = []
        self._order = itertools.count()
        self._done_at: float | None = None
        self.now = 0.0  # of the coordinator
        self._firsts: list[int] = []  # of each evaluation, its first portion's ticket
        self.landed: list[tuple[Push, int]] = []
        # Of each replica:
        self._up = [0] * replicas  # counts its ups and downs; odd: up
        self._fetched = [-1] * replicas  # the evaluation whose parameters it has
        self._batches = [0] * replicas
        self._unsent = [0] * replicas  # gradients that a failure would take
        self._computing: list[tuple[Compute, float] | None] = [None] * replicas
        self._row = [-1] * replicas  # where that of the gradient just finished begins
        ends = shards + 1
        self._last = [([0.0] * ends, [0.0] * ends) for _ in range(replicas)]
        # Of each push under way: shards that have not added it, or not said so.
        self._open: list[dict[int, list[int]]] = [{} for _ in range(replicas)]
        self._landed = [[0] * shards for _ in range(replicas)]
        # Of each shard:
        self._busy = [0.0] * shards
        self._versions = [0] * shards
        self._base = [0] * shards  # at the beginning of the evaluation
        for replica, join in enumerate(cluster.join_times(seed, np.arange(replicas))):
            self._at(float(join), self._enter, replica, JOIN)

    def round(self) -> float:
        """Let the coordinator ask every shard for scalars; give the time after."""
        self.now += self._ways(self._desk.replicas)
        return self.now

    def evaluate(self, groups: Sequence[int] | None = None) -> float:
        """Let one more evaluation happen.

        Args:
          groups: see `Portions.begin`.

        Returns:
          The time at which it is done.

        Raises:
          RuntimeError: it can never be done.
        """
        now = self.now
        before = self._firsts[-1] + self._desk.portions if self._firsts else 0
        self._firsts.append(before)
        self._done_at = None
        self._base = list(self._versions)
        self.landed = []
        while self._heap and self._heap[0][0] <= now:  # who is there by now
            self._step()
        self._carry_out(self._desk.begin(groups), now)
        while self._done_at is None:
            if not self._heap:
                raise RuntimeError(
                    f"evaluation {self._desk.evaluation} can never be done: nobody is "
                    "left who could compute"
                )
            self._step()
        self.now = self._done_at
        return self.now

    def columns(self) -> dict[str, np.ndarray]:
        """Give the Trace's columns, by time."""
        table = np.array(self._rows).reshape(-1, len(_FIELDS))
        table = table[np.argsort(table[:, _FIELDS.index("time")], kind="stable")]
        return dict(zip(_FIELDS, table.T, strict=True))

    # Events.

    def _at(self, time: float, what: Any, *args: Any) -> None:
        heapq.heappush(self._heap, (time, next(self._order), what, args))

    def _step(self) -> None:
        time, _, what, args = heapq.heappop(self._heap)
        what(time, *args)

    def _enter(self, now: float, replica: int, kind: int) -> None:
        self._up[replica] += 1
        self._note(kind, now, now, replica)
        self._landed[replica] = [0] * self._desk.shards
        if self._cluster.fails:
            up, down = self._cluster.outage(self._seed, replica, self._up[replica] // 2)
            self._at(now + up, self._fail, replica, down)
        self._send(now, replica, Joined(replica))

    def _fail(self, now: float, replica: int, downtime: float) -> None:
        self._up[replica] += 1
        self._note(FAIL, now, now, replica, count=self._unsent[replica])
        self._unsent[replica] = 0
        self._fetched[replica] = -1
        self._computing[replica] = None
        self._open[replica].clear()
        # Pushes that have not reached a shard by now are fenced off there.
        landed = tuple(self._landed[replica])
        died = Died(replica, self._desk.life(replica), landed)
        self._carry_out(self._desk.handle(died), now)
        self._at(now + downtime, self._enter, replica, RESTART)

    def _begin(self, now: float, replica: int, up: int) -> None:
        """The parameters are there: compute."""
        if up != self._up[replica]:
            return
        computing = self._computing[replica]
        assert computing is not None
        order = computing[0]
        if self._fetched[replica] != order.evaluation:
            self._fetched[replica] = order.evaluation
            ticket = self._ticket(order)
            for shard, version in enumerate(self._base):
                self._note(
                    FETCH, now, computing[1], replica, shard, step=ticket,
                    version=version, nbytes=self._bytes,
                )  # fmt: skip
        self._computing[replica] = order, now
        self._at(now + next(self._times[replica]), self._end, replica, up)

    def _end(self, now: float, replica: int, up: int) -> None:
        if up != self._up[replica]:
            return
        computing = self._computing[replica]
        assert computing is not None
        order, start = computing
        self._computing[replica] = None
        self._row[replica] = len(self._rows)
        self._note(
            COMPUTE, now, start, replica, batch=self._batches[replica],
            step=self._ticket(order),
            count=order.copy, status=DROPPED,  # unless it is kept
        )  # fmt: skip
        self._batches[replica] += 1
        self._send(now, replica, Finished(replica, order.life, order.task))

    def _arrive(
        self, now: float, replica: int, up: int, order: Push, shard: int, sent: float
    ) -> None:
        """A push reaches a shard: it is added, in its turn."""
        if up != self._up[replica]:
            return
        start = max(now, self._busy[shard])
        done = start + self._service(replica)[shard]
        self._busy[shard] = done
        self._landed[replica][shard] = order.id + 1
        self._open[replica][order.id][0] -= 1
        if not self._open[replica][order.id][0]:
            self._unsent[replica] -= len(order.portions)
        self._versions[shard] += 1
        self.landed.append((order, shard))
        ticket = self._firsts[-1] + order.portions[-1]
        self._note(
            PUSH, done, start, replica, shard, step=ticket, id_=order.id,
            version=self._versions[shard], base=self._base[shard],
            count=len(order.portions), nbytes=self._bytes,
        )  # fmt: skip
        back = self._link(1, done, replica, shard)
        if back > now:
            self._at(back, self._acknowledged, replica, up, order)
        else:
            self._acknowledged(now, replica, up, order)

    def _acknowledged(self, now: float, replica: int, up: int, order: Push) -> None:
        if up != self._up[replica]:
            return
        self._open[replica][order.id][1] -= 1
        if not self._open[replica][order.id][1]:
            del self._open[replica][order.id]
            life = self._desk.life(replica)
            self._send(now, replica, Pushed(replica, life, order.id))

    # Coordinator.

    def _send(self, now: float, replica: int, message: Message) -> None:
        time = self._link(0, now, replica, self._desk.shards)
        if time > now:
            self._at(time, self._hear, replica, self._up[replica], message)
        else:
            self._hear(now, replica, self._up[replica], message)

    def _hear(self, now: float, replica: int, up: int, message: Message) -> None:
        # What the dead have sent is too late: their death was noticed at once.
        if up == self._up[replica]:
            self._carry_out(self._desk.handle(message), now)

    def _carry_out(self, orders: list[Order], now: float) -> None:
        for order in orders:
            if isinstance(order, Done):
                self._done_at = now
                continue
            time = self._link(1, now, order.replica, self._desk.shards)
            if time > now:
                self._at(time, self._obey, order, self._up[order.replica])
            else:
                self._obey(now, order, self._up[order.replica])

    def _obey(self, now: float, order: Any, up: int) -> None:
        """A replica carries out an order."""
        replica = order.replica
        if up != self._up[replica]:
            return
        if isinstance(order, Compute):
            self._computing[replica] = order, now
            time = now
            if self._fetched[replica] != order.evaluation:
                time += self._fetch_time(replica)
            if time > now:
                self._at(time, self._begin, replica, up)
            else:
                self._begin(now, replica, up)
        elif isinstance(order, Keep):
            self._unsent[replica] += 1
            self._rows[self._row[replica] + _STATUS] = TAKEN
        elif isinstance(order, Push):
            shards = order.shards
            every = range(self._desk.shards) if shards is None else shards
            self._open[replica][order.id] = [len(every)] * 2
            for shard in every:
                time = self._link(0, now, replica, shard, self._transfer)
                if time > now:
                    self._at(time, self._arrive, replica, up, order, shard, now)
                else:
                    self._arrive(now, replica, up, order, shard, now)
        else:  # nobody is suspected wrongly here
            assert isinstance(order, Drop)

    # Links.

    def _latencies(self, direction: int, ends: int) -> Any:
        draw = functools.partial(
            self._cluster.latencies, self._seed, shards=ends, direction=direction
        )
        # One more than replicas: the coordinator has its own links to the shards.
        return _draws(self._cluster.latency, draw, self._desk.replicas + 1, ends)

    def _link(
        self, direction: int, now: float, replica: int, end: int, more: float = 0.0
    ) -> float:
        """Give when a message sent now arrives; none overtakes another."""
        latency = (self._back if direction else self._there)(replica)[end]
        last = self._last[replica][direction]
        last[end] = max(last[end], now + latency + more)
        return last[end]

    def _fetch_time(self, replica: int) -> float:
        return self._transfer + self._ways(replica)

    def _ways(self, who: int) -> float:
        """Seconds to ask every shard and hear from the last; `R`: the coordinator."""
        there, back = self._there(who), self._back(who)
        ways = [a + b for a, b in zip(there, back, strict=True)]
        return max(ways[: self._desk.shards])

    def _ticket(self, order: Compute) -> int:
        """Number the portions of all evaluations; late ones keep their number."""
        behind = self._desk.evaluation - order.evaluation
        return self._firsts[-1 - behind] + order.portion

    def _note(
        self, kind: int, time: float, start: float, replica: int, shard: int = -1,
        step: int = -1, batch: int = -1, version: int = -1, base: int = -1,
        count: int = 0, status: int = TAKEN, nbytes: float = 0, id_: int = -1,
    ) -> None:  # fmt: skip
        self._rows.extend(
            (kind, time, start, replica, shard, step, batch, version, base, count,
             status, int(nbytes), id_)
        )  # fmt: skip


def _draws(distribution: Any, draw: Any, replicas: int, width: int) -> Any:
    """Give `next(replica) -> [width]`, a message's seconds; a constant is one list."""
    if isinstance(distribution, Constant):
        constant = [distribution.mean] * width
        return lambda replica: constant
    iterators: list[Iterator[Any]] = ahead(draw, replicas)
    return lambda replica: next(iterators[replica])
