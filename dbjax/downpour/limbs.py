"""The hands of a replica that spans processes."""

from typing import Any

import jax
import numpy as np

from dbjax.downpour.hands import ReplicaHands
from dbjax.runtime.group import Group
from dbjax.server.messages import Fetched, Push


class GroupHands:
    """A leader's hands: its followers' do whatever they do, on their own devices.

    Args:
      hands: the leader's part.
      group: its followers, each with a `Follower` of such hands.
    """

    def __init__(self, hands: ReplicaHands, group: Group) -> None:
        self.problem, self.replica = hands.problem, hands.replica
        self._hands, self._group = hands, group

    def install(self, fetched: list[Fetched]) -> None:
        """Take the shards' parameters: they replace the replica's own."""
        self._all("install", fetched)

    def compute(self, batch: int, step: int) -> None:
        """Add the gradient of minibatch `batch` to the accrued gradients."""
        self._all("compute", batch, step)

    def push(self, id_: int, step: int) -> list[Push]:
        """Give the accrued gradients away, a message a shard, and zero them."""
        return self._all("push", id_, step)

    def let_go(self) -> None:
        """Give up the shards' parameters: others come before they are used again."""
        self._all("let_go")

    def count(self) -> int:
        """How many gradients are accrued."""
        return self._hands.count()

    def local(self) -> list[jax.Array] | None:
        """Leaves of the local optimizer's state, whole; None if there is none."""
        return self._all("local")

    def _all(self, method: str, *args: Any) -> Any:
        sent = jax.tree.map(
            lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, args
        )
        asked = self._group.ask("follow", method, *sent)
        return self._group.do(lambda: getattr(self._hands, method)(*args), asked)
