"""A shard behind a lock, its versions counted by who holds them."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from dbjax.server.messages import Push
from dbjax.server.shard import Shard, ShardState
from dbjax.trace import DROPPED, NOT_FINITE, TAKEN
from dbjax.trace.history import missed_taken
from dbjax.typing import Params


class Snapshot(NamedTuple):
    """The shards' newest versions at a moment, held until `release` is called."""

    step: int
    time: float
    states: tuple[ShardState, ...]
    release: Callable[[], None]


class LiveShard:
    """One shard of a live run. A version that nobody holds is recycled."""

    def __init__(
        self, index: int, shard: Shard, state: ShardState, nbytes: int
    ) -> None:
        self.index, self.shard, self.state, self.nbytes = index, shard, state, nbytes
        self.lock = threading.Lock()
        self.holders: dict[int, tuple[Params, int]] = {}
        self.held_by: dict[Any, Params] = {}
        self.dead: list[Params] = []
        self.dropped: list[int] = []
        self.most_versions = 1

    def hold(self, who: Any) -> ShardState:
        """Give `who` the newest version, instead of the one it held."""
        with self.lock:
            return self._hold(who)

    def release(self, who: Any) -> None:
        """`who` needs its version no more."""
        with self.lock:
            self._let_go(who)

    def _hold(self, who: Any) -> ShardState:
        params = self.state.params
        _, count = self.holders.get(id(params), (params, 0))
        self.holders[id(params)] = params, count + 1
        self._let_go(who)
        self.held_by[who] = params
        return self.state

    def _let_go(self, who: Any) -> None:
        params = self.held_by.pop(who, None)
        if params is None:
            return
        _, count = self.holders.pop(id(params))
        if count > 1:
            self.holders[id(params)] = params, count - 1
        elif params is not self.state.params:
            self.dead.append(params)

    def push(
        self,
        message: Push,
        takes: Callable[[int], bool],
        record: Callable[[int, int], object],
        keep: Callable[[int], Any] = lambda version: None,
    ) -> ShardState:
        """Handle a push if `takes(missed)`; `record` comes before it shows.

        The version made is held for whom `keep(version)` names, if it does, before
        another push can follow.
        """
        with self.lock:
            before, status = self.state, TAKEN if message.taken else NOT_FINITE
            missed = before.version - message.base
            missed = missed_taken(before.version, missed, self.dropped)
            if message.taken and not takes(missed):
                message, status = message._replace(taken=False), DROPPED
                self.dropped.append(before.version + 1)
            spare = None
            if message.taken and id(before.params) not in self.holders:
                spare = before.params  # nobody sees it: written in place
                del self.dead[:1]  # so few hold versions that they come one by one
            elif message.taken and self.dead:
                spare = self.dead.pop()
            after, reply = self.shard.handle(before, message, spare=spare)
            record(reply.version, status)
            self.state = after
            self.most_versions = max(
                self.most_versions, len(self.holders) + 1 + len(self.dead)
            )
            who = keep(reply.version)
            return after if who is None else self._hold(who)
