"""What a workload is, and what those of one kind share."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dbjax.mesh import Rules
from dbjax.models.base import Model
from dbjax.typing import Batch, Data, LossFn, Params

_PART = 500  # examples that are evaluated at once


@dataclasses.dataclass(frozen=True)
class Workload:
    """A problem to train.

    Attributes:
      name: as in the config.
      about: one line on the data and the model.
      init: `init(seed) -> params`.
      loss: `loss(params, batch) -> scalar`, the mean over the batch.
      data: gives `batch(replica, step)`.
      batch_size: examples in one minibatch.
      evaluate: `evaluate(params) -> {"test_loss", "test_accuracy", ...}`, on data that
        is never trained on; `"train_loss"` is what is minimised, penalties included.
      fixed: all that there is to train on, for methods that need the whole of it; None
        where training data has no end.
      rules: how the parameters are partitioned over a mesh's axis "model"; None where
        the model is not made for it.
    """

    name: str
    about: str
    init: Callable[[int], Params]
    loss: LossFn
    data: Data
    batch_size: int
    evaluate: Callable[[Params], dict[str, float]]
    fixed: Batch | None = None
    rules: Rules | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        leaves = jax.tree.leaves(jax.eval_shape(self.init, 0))
        return sum(math.prod(leaf.shape) for leaf in leaves)

    def describe(self) -> str:
        """Say in one line what is trained."""
        return (
            f"{self.name}: {self.about}; {self.num_parameters:,} parameters, "
            f"minibatches of {self.batch_size}"
        )


def of_model(
    name: str,
    about: str,
    model: Model,
    data: Data,
    batch_size: int,
    *,
    test: Mapping[str, np.ndarray],
    keys: tuple[str, str] = ("image", "label"),
    prepare: Callable[[Any], Any] = lambda inputs: inputs,
    fixed: Batch | None = None,
) -> Workload:
    """Make a workload of one of `dbjax.models`, with its loss and its partitions.

    Args:
      name: as in the config.
      about: one line on the data and the model.
      model: what is trained.
      data: gives batches with the two keys.
      batch_size: examples in one minibatch.
      test: likewise, all at once; it is evaluated in parts.
      keys: of the inputs and of the labels.
      prepare: makes the model's inputs of a batch's, on the device: bytes stay bytes
        until there.
      fixed: as for `Workload`.

    Returns:
      The workload.
    """
    inputs, labels = keys

    def loss(params: Params, batch: Batch) -> jax.Array:
        return model.loss(params, (prepare(batch[inputs]), batch[labels]))

    @jax.jit
    def sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(params, prepare(batch[inputs]))
        losses = model.losses(outputs, batch[labels])
        return losses.sum(), (outputs.argmax(-1) == batch[labels]).sum()

    def evaluate(params: Params) -> dict[str, float]:
        count, total = len(test[labels]), np.zeros(2)
        for begin in range(0, count, _PART):
            part = {key: test[key][begin : begin + _PART] for key in keys}
            total += np.array([float(x) for x in sums(params, part)])
        mean_loss, accuracy = (total / count).tolist()
        return {"test_loss": mean_loss, "test_accuracy": accuracy}

    init = jax.jit(lambda seed: model.init(jax.random.key(seed)))
    return Workload(
        name, about, init, loss, data, batch_size, evaluate, fixed, model.rules
    )


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Split examples into training and test, always in the same way.

    Args:
      count: how many there are.
      held_out: how many are the test.

    Returns:
      The indices of both.
    """
    order = np.random.Generator(np.random.Philox(2012)).permutation(count)
    return order[held_out:], order[:held_out]


def arrows(sizes: Sequence[int]) -> str:
    """Say what the layers' sizes are."""
    return "-".join(str(size) for size in sizes)
