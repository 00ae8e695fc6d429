"""Processes that compute as one: each does what the first of them does.

They share a `jax.distributed` world, where all must run the same programs in the same
order. So whatever the leader does on their devices it has asked of its followers
before. None can go on without the others: they live and die together.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ThreadPoolExecutor,
    wait,
)
from typing import Any, NamedTuple

import jax

from dbjax.runtime.transport import SIDE, Address, Gone, Late, Reply

GRACE = 10.0
"""Seconds until a death that is felt must have been heard of."""

LAST = 0.5
"""Seconds that a leader outlives a follower."""


class World(NamedTuple):
    """Where the processes of a group meet, before any of them uses a device.

    Attributes:
      coordinator: host and port, on which the leader listens.
      processes: how many they are.
      index: which this one is; the leader is 0.
    """

    coordinator: str
    processes: int
    index: int

    def join(self, timeout: float) -> None:
        """Wait for the others; jax ends a process that has waited for `timeout`."""
        jax.distributed.initialize(
            self.coordinator,
            self.processes,
            self.index,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout) + 1,
            coordinator_bind_address=self.coordinator,
        )


class Group:
    """A leader's followers; when one of them dies, so does this process.

    Args:
      followers: where they are.
    """

    def __init__(self, followers: Sequence[Address]) -> None:
        self.followers = followers
        self._asked: set[Future[Reply]] = set()
        # What waits for a follower that has failed must not keep us from hearing it.
        self._own = ThreadPoolExecutor(1, "leader")
        for follower in followers:
            follower.ask("alive", lane=SIDE).then(self._end)

    def _end(self, reply: Reply) -> None:
        """End this process, unless the whole group is being ended just now."""
        threading.Timer(LAST, os._exit, (1,)).start()

    def ask(self, method: str, *args: Any) -> list[Reply]:
        """Ask the same of every follower."""
        return [follower.ask(method, *args) for follower in self.followers]

    def do(
        self,
        own: Callable[[], Any],
        asked: Iterable[Reply],
        timeout: float | None = None,
    ) -> Any:
        """Do this process's part of something.

        Args:
          own: the part.
          asked: of the followers; they may be behind when this returns, but not with
            what came before it.
          timeout: seconds in which something must get done.

        Returns:
          What `own()` has returned.

        Raises:
          Gone: a follower is no more.
          Late: after `timeout`.
          Exception: whatever `own` or a follower has raised.
        """
        mine = self._own.submit(own)
        awaited = {mine, *self._asked}
        self._asked |= set(map(_future, asked))
        pending = {mine, *self._asked}
        try:
            while not awaited.isdisjoint(pending):
                done, pending = wait(pending, timeout, FIRST_COMPLETED)
                if not done:
                    raise Late(f"no part of it was done for {timeout:g} s")
                for future in done - {mine}:
                    future.result().result()
            return mine.result()
        except Late:
            raise
        except Exception:
            self._hear_of_deaths(mine)
            raise
        finally:
            self._asked &= pending

    def _hear_of_deaths(self, mine: Future[Any]) -> None:
        """Raise if a follower is gone: then the others' errors are of its making."""
        wait({mine, *self._asked}, GRACE)
        for future in self._asked:
            if future.done() and isinstance(_error(future.result()), Gone):
                raise Gone("a follower is no more")


class Follower:
    """Does what the leader does, and keeps what comes of it to itself.

    Args:
      part: this process's part of what the leader has.
    """

    def __init__(self, part: Any) -> None:
        self._part = part

    def follow(self, method: str, *args: Any) -> None:
        """Call a method of the part."""
        getattr(self._part, method)(*args)


def _future(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    reply.then(future.set_result)
    return future


def _error(reply: Reply) -> Exception | None:
    try:
        reply.result()
    except Exception as error:
        return error
    return None
