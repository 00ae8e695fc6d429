"""What lives in the process of one replica: a hand, and what is around it."""

import functools
from typing import Any, NamedTuple

import jax

from dbjax.runtime.recorder import Recorder
from dbjax.runtime.remote_mailboxes import Report
from dbjax.runtime.transport import Shared
from dbjax.sandblaster.hand import Hand, Published, PushRow
from dbjax.sandblaster.messages import Push
from dbjax.sandblaster.problem import Problem, Programs, make_programs
from dbjax.sandblaster.remote_vectors import Shards, on_processes
from dbjax.server.layout import Layout
from dbjax.typing import Gradients, Params


class Recipe(NamedTuple):
    """What a process needs to make the problem again, which was checked.

    Attributes:
      loss_fn: a reference to it, which equals others to the same.
      data: a reference to them.
      options: `rng`, `has_aux` and `seed`, see `minimize`.
      examples: how many each portion has.
      x64: whether numbers may have 64 bits.
    """

    loss_fn: Shared
    data: Shared
    options: dict[str, Any]
    examples: tuple[int, ...]
    x64: bool

    def make(self, timeout: float) -> Problem:
        """Make the problem; wait for its parts, `timeout` seconds each at most."""
        programs = _programs(self.loss_fn, timeout, **self.options)
        return Problem(self.data.get(timeout), self.examples, *programs)


@functools.lru_cache(maxsize=4)
def _programs(loss_fn: Shared, timeout: float, **options: Any) -> Programs:
    """A process that serves several runs of one loss compiles it once."""
    return make_programs(loss_fn.get(timeout), **options)


class ReplicaHost:
    """Carries out orders, one after the other; see `Around` for the rest.

    Args:
      replica: which it is.
      recipe: what is minimised.
      layout: how parameters lie on shards.
      shards: where these are.
      zero: when the run began.
      batches: see `Hand`.
      first_id: see `Hand`.
    """

    def __init__(
        self,
        replica: int,
        recipe: Recipe,
        layout: Layout,
        shards: Shards,
        zero: float,
        batches: int,
        first_id: int,
    ) -> None:
        self.problem, self.x64 = recipe.make(shards.timeout), recipe.x64
        self.shard_bytes = layout.nbytes
        self.recorder = Recorder(zero=zero)
        self.published: Published | None = None
        # What comes is used in place.
        self._vectors = on_processes(layout, shards, jax.device_put)
        self._hand = Hand(self, replica, batches, first_id)

    def obey(self, order: Any, news: Published | None) -> Report:
        """Carry out an order.

        Args:
          order: see `Hand`.
          news: the evaluation under way, unless it is known here.

        Returns:
          Messages, and the rows that are new.
        """
        if news is not None:
            self.published = news
        messages = list(self._hand.obey(order))
        rows, self.recorder.rows = self.recorder.rows, []
        return Report(messages, rows)

    def params(self, seen: Published, replica: int) -> Params:
        """See `Around`."""
        del replica
        return self._vectors.get(seen.request.at)

    def add(self, into: str, accrued: Gradients, order: Push, row: PushRow) -> None:
        """See `Around`."""
        self._vectors.add(
            into, accrued, order.replica, order.life, order.id, order.shards, row
        )
