"""The words every room uses; no behaviour lives here."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = Any
"""Any pytree of float arrays."""
Gradients: TypeAlias = Any
"""A pytree like the parameters it belongs to."""
Batch: TypeAlias = Any
"""Any pytree of arrays; all batches of a run have the same shapes."""
LossFn: TypeAlias = Callable[..., Any]
"""`loss_fn(params, batch) -> scalar`, the mean over the batch."""
EvalFn: TypeAlias = Callable[[Params, int, float], Mapping[str, float]]
"""`eval_fn(params, step, time) -> {name: scalar}`."""


class Data(Protocol):
    """What training asks of data: the same arguments, the same batch, everywhere.

    More methods are used where there are any: `batches(replicas, steps)`, which gives
    many minibatches at once; `start(replicas)`, which is called before a run for data
    that then begins anew; and `state_after(counts)` with `set_state(state)`, so that
    such data goes on from a checkpoint without being read again.
    """

    def batch(self, replica: int, step: int) -> Batch:
        """Give the `step`-th minibatch of `replica`'s own stream.

        Args:
          replica: from 0.
          step: from 0, counted by each replica for itself.

        Returns:
          A pytree of arrays, of the same shapes for all arguments.
        """
        ...
