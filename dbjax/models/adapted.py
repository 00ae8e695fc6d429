"""A flax module for training: plain parameters, a pure loss, and the way back.

What NNX and Linen have in common; `adapters.py` has what differs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dbjax.typing import Batch, LossFn, Params

State = dict[str, Any]
"""What a module holds besides parameters and keys; its "batch_stats" and the rest."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A flax module for training; made by `from_nnx` and `from_linen`.

    Attributes:
      params: the first parameters, nested dicts of arrays.
      loss_fn: `loss_fn(params, batch)`, or with a key as third argument; pure.
    """

    params: Params
    loss_fn: LossFn
    _flax: "Flax"

    def merge(
        self,
        params: Params,
        batches: Iterable[Batch] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Any:
        """Give the module with these parameters, ready for use.

        Batch normalisation needs averages for evaluation. They are the plain mean, over
        the batches given here, of each one's statistics, which the loss makes as in
        training, with these parameters. Other state that is not trained is carried from
        batch to batch, as the loss changes it.

        Args:
          params: trained ones, of the structure of `self.params`.
          batches: some training batches, of the training's size; or `()`, to keep all
            state as it was given. Needed only if there are batch statistics.
          key: for random numbers in these batches; a fixed one if not given.

        Returns:
          From NNX a new module in evaluation mode, as after `module.eval()`; from
          Linen variables for `module.apply`.

        Raises:
          ValueError: the parameters are of another structure; there are batch
            statistics and it is not said what they are to be; or there is no batch.
        """
        _check_structure(params, self.params)
        state = self._flax.state
        if batches is None and jax.tree.leaves(state.get("batch_stats", {})):
            raise ValueError(
                "batches: the module has batch statistics, which are not trained. Give "
                "some training batches, to take the statistics of these parameters; or "
                "batches=() to keep those it was given with"
            )
        keep = batches is None or (isinstance(batches, tuple) and not batches)
        key = jax.random.key(0) if key is None else key
        count = 0
        for batch in () if batches is None else batches:
            own = jax.random.fold_in(key, count)
            # The mean of those before, and this one's share of a mean with it.
            momentum = count / (count + 1)
            state = self._after(params, state, batch, own, momentum)
            jax.block_until_ready(state)  # one program of several devices at a time
            count += 1
        if not (count or keep):
            raise ValueError("batches: there were none")
        return self._flax.build(params, state)

    @functools.cached_property
    def _after(self) -> Callable[..., State]:
        return jax.jit(lambda *args: self._flax.run(*args)[1])


class Flax(Protocol):
    """What differs between NNX and Linen."""

    @property
    def state(self) -> State:
        """The state as it was given."""
        ...

    def run(
        self,
        params: Params,
        state: State,
        batch: Batch,
        key: jax.Array | None,
        momentum: Any = None,
    ) -> tuple[Any, State]:
        """Give what the loss returns, and the state after it.

        `momentum` takes the place of that of batch normalisation.
        """
        ...

    def build(self, params: Params, state: State) -> Any:
        """Give what `merge` gives."""
        ...


def adapt(flax: Flax, params: Params, loss: Any) -> Adapted:
    """Make an `Adapted`, or say why these parameters or this loss cannot be trained."""
    if not callable(loss):
        raise TypeError(f"loss must be callable, loss(module, batch); got {kind(loss)}")
    _check_params(params)
    params = jax.tree.map(jnp.array, params)

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None = None) -> Any:
        """Give the loss of the module with these parameters."""
        _check_structure(params, shapes)
        return flax.run(params, flax.state, batch, key)[0]

    shapes = jax.eval_shape(lambda: params)  # keeps no first parameters alive
    return Adapted(params, loss_fn, flax)


def _check_params(params: Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the module has no parameters to train")
    for path, leaf in leaves:
        if not hasattr(leaf, "__array__"):
            what = f"{kind(leaf)}; give a module that holds arrays"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            what = f"{leaf.dtype}; what is not trained must not be a parameter"
        else:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"parameter {name} must be an array of floats, got {what}")


def _check_structure(params: Params, expected: Params) -> None:
    if jax.tree.structure(params) != jax.tree.structure(expected):
        raise ValueError(
            f"params must have the structure {jax.tree.structure(expected)}, got "
            f"{jax.tree.structure(params)}"
        )


def kind(value: Any) -> str:
    """Say what something is, for messages."""
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"a {name}"
