"""Links and shards of an emulated cluster: when messages arrive, queue and are served.

A message goes to every shard. On one link messages do not overtake each other; a shard
handles pushes first come, first served, and makes them versions 1, 2, 3, ... A fetch is
served at once, but never before the pushes that its own replica has sent earlier.
"""

import bisect
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dbjax.cluster import Cluster, Constant
from dbjax.runtime.rows import Rows
from dbjax.trace import DROPPED, TAKEN
from dbjax.trace.history import missed_taken

_FIRST, _MOST = 16, 512  # draws taken ahead for one replica, at first and at most


def ahead(
    draw: Callable[[np.ndarray, int, int], np.ndarray], replicas: int
) -> list[Iterator[Any]]:
    """Give each replica's draws for steps 0, 1, 2, ..., asking for many at a time.

    Args:
      draw: `(replicas [R], first, count) -> [R, count, ...]`.
      replicas: the number of replicas.

    Returns:
      An endless iterator for each replica.
    """

    def follow(replica: int, known: list) -> Iterator[Any]:
        ids, first = np.array([replica]), 0
        while True:
            yield from known
            first += len(known)
            count = min(2 * len(known), _MOST)
            known = draw(ids, first, count)[0].tolist()

    known = draw(np.arange(replicas), 0, _FIRST).tolist()
    return [follow(replica, begin) for replica, begin in enumerate(known)]


class Push:
    """Accrued gradients on their way: what they are, not what they hold.

    Attributes:
      step: the newest ticket among them.
      count: how many they are.
      id: the replica's own push counter.
      base: `[S]` versions that the oldest was computed on.
    """

    __slots__ = ("base", "count", "id", "step")

    def __init__(self, step: int, count: int, id_: int, base: list[int]) -> None:
        self.step, self.count, self.id, self.base = step, count, id_, base


class Message:
    """A push, a fetch or both, from one turn of a replica to every shard.

    Attributes:
      replica: who sends it.
      turn: number of the turn that sends it.
      sent: when it was sent.
      push: the push in it.
      step: the ticket of the fetch in it, -1: none.
      then: what the sender does when all shards have answered.
      open: how many shards have not handled it yet.
      there: `[S]` seconds to the shards.
      back: `[S]` seconds back.
      over: when the push in it is handled and the reply to the fetch has landed.
      versions: `[S]` versions fetched.
      stands: number of the turn at which the rows of the fetch stand.
    """

    __slots__ = tuple(
        "replica turn sent push step then open there back over versions stands".split()
    )

    def __init__(
        self,
        replica: int,
        turn: int,
        sent: float,
        push: Push | None,
        step: int,
        then: int,
    ) -> None:
        self.replica, self.turn, self.sent = replica, turn, sent
        self.push, self.step, self.then = push, step, then
        self.open, self.over, self.stands = 0, sent, turn
        self.versions: list[int] = []
        self.there: list[float] = []
        self.back: list[float] = []


class Network:
    """The links and shards of one run.

    Attributes:
      versions: `[S]` how many pushes each shard has been given.
      near: whether messages arrive as they are sent.
      draws: whether `next_turn` must be called at each turn.
    """

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        replicas: int,
        shard_bytes: tuple[int, ...],
        takes: Callable[[int, int], bool] | None,
        rows: Rows,
    ) -> None:
        """Start with all shards idle at version 0.

        Args:
          cluster: how long things take.
          seed: seed of the draws.
          replicas: the number of replicas.
          shard_bytes: size of each shard `[S]`.
          takes: `(replica, staleness) -> bool`, None: every push is taken.
          rows: where pushes are noted down.
        """
        shards = len(shard_bytes)
        self._rows, self._takes, self._queues = rows, takes, cluster.queues
        self._transfer = [cluster.transfer_time(size) for size in shard_bytes]
        self.versions = [0] * shards
        self.near = cluster.latency == Constant(0.0) and not any(self._transfer)
        # Of each replica, at its turn: seconds there, back and of service, `[S]` each.
        latency, service = _mean(cluster.latency), _mean(cluster.shard_service)
        self._there = [[latency] * shards] * replicas
        self._back = [[latency] * shards] * replicas
        self._service = [[service] * shards] * replicas
        self._ahead = []
        if not isinstance(cluster.latency, Constant):
            for direction, seconds in enumerate((self._there, self._back)):
                draw = functools.partial(
                    cluster.latencies, seed, shards=shards, direction=direction
                )
                self._ahead.append((seconds, ahead(draw, replicas)))
        if not isinstance(cluster.shard_service, Constant):
            draw = functools.partial(cluster.service_times, seed, shards=shards)
            self._ahead.append((self._service, ahead(draw, replicas)))
        self.draws = bool(self._ahead)
        # Of each replica, at each shard: its last message's arrival, its last push.
        self._arrived = [[0.0] * shards for _ in range(replicas)]
        self._done = [[0.0] * shards for _ in range(replicas)]
        self._made = [[0] * shards for _ in range(replicas)]
        # Of each shard: which versions dropped pushes made; when its pushes were done,
        # and at which turn they stand.
        self._dropped: list[list[int]] = [[] for _ in range(shards)]
        self._dones: list[list[float]] = [[] for _ in range(shards)]
        self._turns: list[list[int]] = [[] for _ in range(shards)]

    def next_turn(self, replica: int) -> None:
        """Draw the seconds of the replica's next turn."""
        for seconds, iterators in self._ahead:
            seconds[replica] = next(iterators[replica])

    # Near: a message is handled as it is sent.

    def push(self, replica: int, turn: int, now: float, push: Push) -> float:
        """Let all shards handle a push that arrives now; give when the last is done."""
        last = now
        for shard in range(len(push.base)):
            done = self._handle(replica, turn, shard, now, push)
            if done > last:
                last = done
        return last

    def fetch(
        self, replica: int, turn: int, now: float
    ) -> tuple[float, int, list[int]]:
        """Let all shards serve a fetch that arrives now.

        Returns:
          When the last shard has served it, the number of the turn at which its rows
          stand, and the versions `[S]`.
        """
        if not self._queues:
            return now, turn, self.versions.copy()
        landed, stands, versions = now, turn, []
        for shard in range(len(self.versions)):
            served, at, version = self._serve(replica, turn, shard, now)
            landed, stands = max(landed, served), max(stands, at)
            versions.append(version)
        return landed, stands, versions

    # Far: a message is on its way first.

    def send(self, message: Message) -> list[float]:
        """Put a message on its links; give when it arrives at each shard, `[S]`."""
        replica, sent, transfer = message.replica, message.sent, self._transfer
        there, back = self._there[replica], self._back[replica]
        # Added up as by `free_running`, to the last bit.
        if message.push is not None:
            there = [a + b for a, b in zip(there, transfer, strict=True)]
        message.there, message.open = there, len(there)
        if message.step >= 0:
            message.back = [a + b for a, b in zip(back, transfer, strict=True)]
            message.versions = [0] * len(there)
        before = self._arrived[replica]
        arrived = [max(sent + a, b) for a, b in zip(there, before, strict=True)]
        self._arrived[replica] = arrived
        return arrived

    def arrive(self, message: Message, shard: int, now: float) -> None:
        """Let a shard handle a message that has arrived."""
        replica, turn, over = message.replica, message.turn, now
        if message.push is not None:
            over = self._handle(replica, turn, shard, now, message.push)
        if message.step >= 0:
            served, version = now, self.versions[shard]
            if self._queues:
                served, at, version = self._serve(replica, turn, shard, now)
                message.stands = max(message.stands, at)
            message.versions[shard] = version
            there, back = message.there[shard], message.back[shard]
            if served == message.sent + there:
                over = message.sent + (there + back)
            else:  # it had to wait
                over = served + back
        if over > message.over:
            message.over = over
        message.open -= 1

    # At a shard.

    def _handle(
        self, replica: int, turn: int, shard: int, now: float, push: Push
    ) -> float:
        """Queue and handle a push; give when it is done."""
        start = done = now
        if self._queues:
            dones, turns = self._dones[shard], self._turns[shard]
            if dones and dones[-1] > now:
                start = dones[-1]
            done = start + self._service[replica][shard]
            if dones and dones[-1] == done and turns[-1] > turn:
                turn = turns[-1]  # its row stands after that of the push before it
            dones.append(done)
            turns.append(turn)
            self._done[replica][shard] = done
        base, version = push.base[shard], self.versions[shard] + 1
        status, takes = TAKEN, self._takes
        if takes is not None:
            dropped = self._dropped[shard]
            missed = missed_taken(version - 1, version - 1 - base, dropped)
            if not takes(replica, missed):
                status = DROPPED
                dropped.append(version)
        self.versions[shard] = self._made[replica][shard] = version
        row = done, turn, start, replica, shard, push.step
        self._rows.push.append((*row, version, base, push.count, status, push.id))
        return done

    def _serve(
        self, replica: int, turn: int, shard: int, now: float
    ) -> tuple[float, int, int]:
        """Serve a fetch; give when, at which turn its row stands, and the version."""
        served = max(now, self._done[replica][shard])
        dones, turns = self._dones[shard], self._turns[shard]
        seen = bisect.bisect_right(dones, served)
        while seen and dones[seen - 1] == served and turns[seen - 1] > turn:
            seen -= 1  # done at the same time, but by a later turn
        seen = max(seen, self._made[replica][shard])
        if seen and dones[seen - 1] == served:
            turn = max(turn, turns[seen - 1])
        return served, turn, seen


def _mean(distribution: Any) -> float:
    return distribution.mean  # a number given as one became a `Constant`
