"""A live replica's hands: carries out its actor's requests on arrays."""

from typing import Any

import jax

from dbjax.downpour.problem import Problem, copy
from dbjax.server.messages import Fetched, Push
from dbjax.typing import Params


class ReplicaHands:
    """One replica's parameters, accrued gradients and local optimizer state.

    Args:
      problem: what is trained.
      replica: whose hands these are.
    """

    def __init__(self, problem: Problem, replica: int) -> None:
        self.problem, self.replica = problem, replica
        self.params: Params = None
        self.fetched: list[Fetched] = []
        self.accrued: Any = None
        self.base: list[Fetched] = []
        self.finite, self.accrued_count = True, 0
        self.local_state: Any = None

    def install(self, fetched: list[Fetched]) -> None:
        """Take the shards' parameters: they replace the replica's own, or draw them."""
        if self.accrued_count and "stale_params" in self.problem.provide:
            # The oldest version is let go now, but its push is yet to come.
            self.base = [one._replace(params=copy(one.params)) for one in self.base]
        self.fetched = fetched
        parts = tuple(self.problem.publish(one.params) for one in fetched)
        own, approach = self.params, self.problem.approach
        self.params = self.problem.fetch(parts, self.replica)
        if approach is not None and own is not None:
            me = self.replica
            self.params = self.problem.call(me, approach, own, self.params)

    def compute(self, batch: int, step: int) -> None:
        """Add the gradient of minibatch `batch` to the accrued gradients."""
        problem, examples = self.problem, self.problem.batch(self.replica, batch)
        me = self.replica
        gradients, finite = problem.compute(self.params, examples, me, batch, on=me)
        finite = bool(finite)
        if problem.local_step is not None and problem.local_init is not None:
            if self.local_state is None:
                self.local_state = problem.call(me, problem.local_init, self.params)
            if finite:
                self.params, self.local_state, pushed = problem.call(
                    me, problem.local_step, self.params, self.local_state, gradients
                )
                gradients = gradients if pushed is None else pushed
        if self.accrued_count:
            self.accrued = problem.call(me, problem.accrue, self.accrued, gradients)
        else:
            self.accrued, self.finite, self.base = gradients, True, self.fetched
        self.finite &= finite
        self.accrued_count += 1

    def push(self, id_: int, step: int) -> list[Push]:
        """Give the accrued gradients away, a message a shard, and zero them."""
        parts = self.problem.split(self.problem.here(self.accrued, self.replica))
        messages = [
            Push(
                replica=self.replica,
                id=id_,
                step=step,
                gradients=part,
                base=base.version,
                taken=self.finite,
                stale_params=self._seen(base.params),
                origin=base.incarnation,
            )
            for part, base in zip(parts, self.base, strict=True)
        ]
        self.accrued, self.accrued_count = None, 0
        return messages

    def let_go(self) -> None:
        """Give up the shards' parameters: others come before they are used again."""
        self.fetched, self.base = [], []
        if self.problem.approach is None:
            self.params = None

    def _seen(self, params: Params) -> Params:
        """A version as the gradient saw it, if the optimizer asks for that."""
        if "stale_params" not in self.problem.provide:
            return None
        published = self.problem.publish(params)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), published, params)

    def count(self) -> int:
        """How many gradients are accrued."""
        return self.accrued_count

    def local(self) -> list[Any] | None:
        """Leaves of the local optimizer's state, whole; None if there is none."""
        if self.local_state is None:
            return None
        return jax.tree.leaves(self.problem.here(self.local_state, self.replica))
