"""A network as pure functions on plain dicts: `init`, `apply`, `loss`.

Networks are written with flax NNX. What dbjax trains is a nested dict of arrays and a
pure loss, so a module is made and taken apart here, under `jit`, where that costs
nothing. Letters: `B` examples, `C` classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from dbjax.mesh import Rules
from dbjax.models import halo
from dbjax.typing import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, its loss, and how it is partitioned.

    Where a mesh is set (`jax.set_mesh`, or `mesh=` of a run) and has the axis "model",
    the network is partitioned over it; otherwise it runs whole.

    Attributes:
      name: what it is called in messages.
      make: makes the NNX module; `module(inputs)` gives outputs `[B, C]`.
      losses: `losses(outputs, labels) -> [B]`.
      input_shape: of one example.
      classes: `C`; labels are from 0 to `C - 1`.
      rules: parameter-path patterns -> PartitionSpec over the axis "model".
    """

    name: str
    make: Callable[[nnx.Rngs], nnx.Module]
    losses: Callable[[jax.Array, jax.Array], jax.Array]
    input_shape: tuple[int, ...]
    classes: int
    rules: Rules

    def init(self, key: jax.Array) -> Params:
        """Give first parameters, drawn with `key`: nested dicts of arrays."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key)), nnx.Param))

    @functools.cached_property
    def shapes(self) -> Params:
        """The parameters' shapes and dtypes; nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def apply(self, params: Params, inputs: Array) -> jax.Array:
        """Give the network's outputs.

        Args:
          params: as `init` gives them.
          inputs: `[B, *input_shape]`.

        Returns:
          `[B, C]`, before softmax or logistic function.

        Raises:
          ValueError: the inputs are of another shape, or the parameters of another
            structure.
        """
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{self.name}: inputs must have shape [B, "
                f"{', '.join(map(str, self.input_shape))}], got {inputs.shape}"
            )
        if jax.tree.structure(params) != jax.tree.structure(self.shapes):
            raise ValueError(
                f"{self.name}: params must have the structure that init gives, "
                f"{jax.tree.structure(self.shapes)}; got {jax.tree.structure(params)}"
            )
        return nnx.merge(_graphdef(self.make), params)(inputs)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """Give the mean loss over a batch.

        Args:
          params: as `init` gives them.
          batch: a mapping with `label` `[B]`, integers, and one more array, the inputs
            `[B, *input_shape]`; or the pair `(inputs, labels)`.

        Returns:
          A scalar. NaN where a label is out of range and could not be looked at before,
          as under `jit`: a run refuses such a minibatch, or counts its push rejected.

        Raises:
          ValueError: the batch is something else, or a label is out of range.
        """
        inputs, labels = _inputs_and_labels(self.name, batch)
        known = (labels >= 0) & (labels < self.classes)
        if not isinstance(known, jax.core.Tracer) and not bool(np.all(known)):
            raise ValueError(
                f"{self.name}: labels must be from 0 to {self.classes - 1}, got "
                f"{int(np.min(labels))} to {int(np.max(labels))}"
            )
        outputs = self.apply(params, jnp.asarray(inputs))
        losses = self.losses(outputs, jnp.asarray(labels))
        # A product, so that the gradient is not finite either, and is caught.
        return jnp.mean(losses * jnp.where(known, 1.0, jnp.nan))


def cut_over_model(x: jax.Array) -> jax.Array:
    """Have the last axis cut over the mesh axis "model", where a mesh is set.

    Parameters say where they lie, and mostly all else follows. Where an input that is
    whole meets a kernel that is cut, its gradient would be made whole on every device.
    """
    if halo.partitions() == 1:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*others, halo.AXIS))


@functools.lru_cache(maxsize=64)
def _graphdef(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
    """The module without its arrays, for `nnx.merge` with those of some parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def _inputs_and_labels(name: str, batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    elif isinstance(batch, Mapping) and "label" in batch and len(batch) == 2:
        labels = batch["label"]
        (inputs,) = (value for key, value in batch.items() if key != "label")
    else:
        what = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name}: a batch must be a mapping with `label` and one more array, or "
            f"the pair (inputs, labels); got {what}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: labels must be integers, got {labels.dtype}")
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"{name}: labels must have shape [B] for inputs [B, ...], got labels "
            f"{labels.shape} for inputs {inputs.shape}"
        )
    return inputs, labels
