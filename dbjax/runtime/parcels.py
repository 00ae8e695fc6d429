"""What replicas, shards and the driver send one another between processes."""

from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax.server.messages import Push
from dbjax.trace import TAKEN
from dbjax.typing import Params

FENCED = -1
"""Status of a push from a replica's former life: nothing has been done."""


class Parcel(NamedTuple):
    """A push on its way to one shard.

    Attributes:
      push: whose, which, and the gradients.
      life: which life of the replica sends it; one that was given up is fenced.
      count: how many gradients are summed.
      bases: by shard, `push.base` and `push.origin`.
      clocks: the protocol's, where it looks at them.
      journal: rows of the replica since its last push, so that a shard knows what was
        computed even if the replica dies before it tells anybody else.
      fetches: whether the answer is to bring the parameters.
    """

    push: Push
    life: int
    count: int
    bases: tuple[tuple[int, int], ...]
    clocks: Any = None
    journal: tuple[Any, ...] = ()
    fetches: bool = False


class Answer(NamedTuple):
    """A shard's, to a push or a fetch.

    Attributes:
      version: what the push made, or what is fetched.
      incarnation: of the shard.
      status: of the push.
      params: the shard's part of the parameters, or a `Shared` reference to it.
      rows: of the Trace, of pushes handled since this replica heard of any: whoever has
        seen a version knows how it was made, even if the shard dies.
    """

    version: int
    incarnation: int
    status: int = TAKEN
    params: Params = None
    rows: tuple[Any, ...] = ()


class Held(NamedTuple):
    """All that a shard holds, to make another one of it.

    Attributes:
      params: its part, NumPy arrays.
      optimizer_state: the leaves of its state; None: as at the beginning.
      version: pushes handled.
      incarnation: of the shard.
      handled: by replica: the life, id, version and status of its last push.
      log: rows of the pushes handled since they were last collected.
      digests: `(shard, version, checksum)` since then.
      origins: the versions that its incarnations 1, 2, ... began from.
      dropped: the versions that pushes made which the protocol did not take.
    """

    params: Params
    optimizer_state: list[Any] | None = None
    version: int = 0
    incarnation: int = 0
    handled: dict[int, tuple[int, int, int, int]] = {}  # noqa: RUF012
    log: tuple[Any, ...] = ()
    digests: tuple[tuple[int, int, int], ...] = ()
    origins: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


class Report(NamedTuple):
    """What a replica says when it has carried out an order.

    Attributes:
      rows: of the Trace, since the last report.
      asked: what its actor asks for now.
      batch: its next minibatch.
      accrued: gradients that it holds.
      next_id: of its pushes.
      state: what of it belongs into a checkpoint, if it has stopped.
    """

    rows: list[Any]
    asked: str
    batch: int
    accrued: int
    next_id: int
    state: Any = None


def to_wire(tree: Any) -> Any:
    """Give a tree's arrays as NumPy's, without a copy where they are in host memory."""
    return jax.tree.map(np.asarray, tree)


def from_wire(tree: Any) -> Any:
    """Give a tree's arrays as JAX's, in place where what came is aligned."""
    return jax.device_put(tree)
