"""Replicas on threads of this process, and shards behind locks."""

from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp

from dbjax.runtime.mailboxes import Mailboxes
from dbjax.runtime.recorder import Recorder
from dbjax.runtime.threads import Threads
from dbjax.sandblaster.hand import Hand, Published, PushRow
from dbjax.sandblaster.messages import Added, Push
from dbjax.sandblaster.problem import Problem
from dbjax.sandblaster.vectors import Vectors
from dbjax.typing import Gradients, Params


class ThreadCrew:
    """A crew, see `live.Crew`, and what is around each of its hands.

    Args:
      problem: what is minimised.
      vectors: where the vectors live.
      replicas: how many.
      runtime: the `Threads` settings.
      shard_bytes: size of the parameters on each shard.
    """

    def __init__(
        self,
        problem: Problem,
        vectors: Vectors,
        replicas: int,
        runtime: Threads,
        shard_bytes: tuple[int, ...],
    ) -> None:
        self.problem, self._vectors = problem, vectors
        self.shard_bytes = shard_bytes
        self.recorder = Recorder()
        self.published: Published | None = None
        self.x64 = jnp.result_type(float) == jnp.float64
        self.begin_at([0] * len(shard_bytes))
        self._hands = [Hand(self, replica) for replica in range(replicas)]
        self._boxes = Mailboxes([hand.obey for hand in self._hands], runtime)

    # Of a crew.

    def begin_at(self, versions: list[int]) -> None:
        """Count the versions of the shards, which are new, on from these."""
        self._first_versions, self.versions = tuple(versions), list(versions)

    def count_on(self, replica: int, batches: int, first_id: int) -> None:
        """Let what a replica computes and pushes have later numbers than these."""
        self._hands[replica].count_on(batches, first_id)

    def open(self) -> AbstractContextManager[None]:
        """Start the replicas; on leaving they have stopped."""
        return self._boxes.open()

    def publish(self, published: Published) -> None:
        """Let all see an evaluation, of which orders come next."""
        params = self._vectors.get(published.request.at)
        self.published = published._replace(params=params)

    def send(self, replica: int, order: Any) -> None:
        """Give an order."""
        self._boxes.send(replica, order)

    def receive(self) -> Any:
        """Wait for a message."""
        return self._boxes.receive()

    def restart(self, replica: int) -> bool:
        """A thread outlives its errors."""
        del replica
        return True

    def computed(self, replica: int) -> list[Any]:
        """Give the row of the portion that a replica has finished."""
        return self._hands[replica].computed

    def settle(self) -> None:
        """All rows are there, in their order."""

    # Around a hand.

    def params(self, seen: Published, replica: int) -> Params:
        """See `Around`."""
        return self.problem.here(seen.params, replica)

    def add(self, into: str, accrued: Gradients, order: Push, row: PushRow) -> None:
        """See `Around`."""

        def record(shard: int, added: Added) -> None:
            # While the shard waits: its rows must stand in the order of its versions.
            if added.taken:  # else it is fenced, and counts as lost
                version = self._first_versions[shard] + added.version
                self.versions[shard] = version
                row.write(self.recorder, shard, version)

        self._vectors.add(
            into, accrued, order.replica, order.life, order.id, order.shards, record
        )
