"""Loss and gradient of the whole batch, portion by portion, in this process.

The first of the drivers of `Portions`: replicas take turns in one thread, so nobody is
slow and nobody dies; orders and sums are those of every other driver.
"""

import collections
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dbjax.sandblaster.messages import (
    Compute,
    Done,
    Drop,
    Finished,
    Joined,
    Keep,
    Push,
    Pushed,
)
from dbjax.sandblaster.portions import Order, Portions
from dbjax.sandblaster.vectors import Vectors
from dbjax.typing import Batch, LossFn, Params


class PortionData(Protocol):
    """What a batch method asks of data: the batch, cut in portions."""

    @property
    def num_portions(self) -> int:
        """How many portions the batch has."""
        ...

    def portion(self, i: int) -> Batch:
        """Give the `i`-th portion, arrays `[P, ...]`; portions may differ in length."""
        ...


class InProcess:
    """Evaluates the batch at a named vector, its gradient into another.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch.
      data: the portions; their lengths are looked up once.
      vectors: where the vectors live; the coordinator sees the loss only.
      replicas: how many replicas share the work.
      push_every: portions summed before a push.

    Attributes:
      evaluations: how often the batch was evaluated.

    Raises:
      ValueError: the batch is empty, or a number is below 1.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        data: PortionData,
        vectors: Vectors,
        *,
        replicas: int = 1,
        push_every: int = 4,
    ) -> None:
        self._data, self._vectors = data, vectors
        self._examples = [_length(data.portion(i)) for i in range(data.num_portions)]
        if not sum(self._examples):
            raise ValueError("data holds no examples: the batch must not be empty")
        self._desk = Portions(data.num_portions, replicas, push_every=push_every)
        for replica in range(replicas):
            self._desk.handle(Joined(replica))
        self._gradient = jax.jit(jax.value_and_grad(loss_fn))
        self._params: Params = None
        self._finished: dict[int, tuple[int, Params]] = {}
        self._sums: dict[int, Params] = {}
        self.evaluations = 0

    def evaluate(self, at: str, into: str) -> float:
        """Evaluate the batch.

        Args:
          at: the vector at which.
          into: the vector that becomes the gradient, `sum_p n_p g_p / sum_p n_p`.

        Returns:
          The mean loss; the same however the portions were shared.
        """
        self._vectors.elementwise(into, "zero", at)
        self._params = self._vectors.get(at)
        orders = collections.deque(self._desk.begin())
        done = False
        while orders:
            order = orders.popleft()
            if isinstance(order, Done):
                done = True
            else:
                orders.extend(self._carry_out(order, into))
        assert done, "every portion counts when nobody has an order left"
        self.evaluations += 1
        self._vectors.combine(into, {into: 1 / sum(self._examples)})
        return self._desk.value(self._examples)

    def _carry_out(self, order: Order, into: str) -> list[Order]:
        if isinstance(order, Compute):
            batch = self._data.portion(order.portion)
            value, gradients = self._gradient(self._params, batch)
            self._finished[order.replica] = order.portion, gradients
            value = float(value)
            return self._desk.handle(
                Finished(order.replica, order.life, order.task, value)
            )
        if isinstance(order, Keep):
            portion, gradients = self._finished.pop(order.replica)
            accrued = self._sums.get(order.replica)
            examples = float(self._examples[portion])
            self._sums[order.replica] = _accrue(accrued, gradients, examples)
        elif isinstance(order, Push):
            accrued = self._sums.pop(order.replica)
            self._vectors.add(into, accrued, order.replica, order.life, order.id)
            return self._desk.handle(Pushed(order.replica, order.life, order.id))
        else:
            assert isinstance(order, Drop)
            self._finished.pop(order.replica)
        return []


@functools.partial(jax.jit, donate_argnums=0)
def _accrue(accrued: Params | None, gradients: Params, examples: Any) -> Params:
    """Add a portion's mean gradient, times its examples, to the accrued sum.

    Sums are float32 at least.
    """

    def weigh(g: jax.Array) -> jax.Array:
        return examples * g.astype(jnp.promote_types(g.dtype, jnp.float32))

    weighted = jax.tree.map(weigh, gradients)
    if accrued is None:
        return weighted
    return jax.tree.map(lambda a, w: a + w, accrued, weighted)


def _length(batch: Batch) -> int:
    return len(jax.tree.leaves(batch)[0])
