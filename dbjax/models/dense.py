"""Fully connected networks: the paper's speech model, others, logistic regression.

Partitions exchange little if two layers in a row share one cut. The first is cut by
columns: each partition computes some of the units, from all inputs. The second is cut
by rows: each partition reads its own units only and gives a share of every sum, so that
one all-reduce gives the sums. Letters: `B` examples, `C` classes, `P` partitions.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dbjax.mesh import Rules
from dbjax.models.base import Model, cut_over_model

SPEECH_SIZES = (440, 2560, 2560, 2560, 2560, 8192)


def dense(
    sizes: Sequence[int],
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    gain: float = 4.0,
    name: str = "dense",
) -> Model:
    r"""A fully connected network with softmax and cross-entropy.

    .. math::
      x_{i+1} = f(x_i W_i + b_i), \qquad
      W_i \sim \mathcal{N}(0, g_i^2 / \text{inputs}_i), \qquad b_i = 0

    The paper does not state its first weights. Here `g` is 1 in the first layer, which
    reads inputs of variance about 1, and in the last; in the others it is `gain`, by
    default the inverse of a sigmoid's slope at 0. Of the signal, how far units differ
    between examples, a fifth then passes from the first to the fourth layer; with a
    gain of 1 it is a hundredth, and training hardly begins.

    Args:
      sizes: inputs, units of each hidden layer, classes.
      activation: `f` of the hidden layers.
      gain: see above; say `2 ** 0.5` for relu and 1 for tanh.
      name: what messages call it.

    Returns:
      The model; examples have shape `[sizes[0]]`. For what its partitions cost, see
      `exchanged_bytes`.

    Raises:
      ValueError: there are fewer than two sizes, or one is below 1.

    >>> import jax, numpy as np
    >>> model = dense((4, 8, 3))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, np.ones((5, 4), np.float32)).shape
    (5, 3)
    """
    sizes = tuple(map(operator.index, sizes))
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            f"sizes={sizes}: allowed are inputs, units and classes, each from 1"
        )
    gains = [float(gain)] * (len(sizes) - 1)
    gains[0] = gains[-1] = 1.0
    return Model(
        name=name,
        make=functools.partial(_Dense, sizes, tuple(gains), activation),
        losses=softmax_cross_entropy,
        input_shape=sizes[:1],
        classes=sizes[-1],
        rules=_rules(sizes),
    )


def speech() -> Model:
    """The paper's acoustic model: 41,777,152 parameters (section 5).

    An example is 11 frames of 40 log-energies, 440 numbers; four layers of 2560 sigmoid
    units and a softmax of 8192 states follow. A step on a minibatch of 128 exchanges
    5.2 MB between partitions; the gradients, 167 MB, stay where they are.

    >>> f"{speech().num_parameters:,}"
    '41,777,152'
    """
    return dense(SPEECH_SIZES, name="speech")


def logistic_regression(features: int, *, classes: int = 2) -> Model:
    """Logistic regression: linear outputs, softmax, cross-entropy; starts at zero.

    Two classes have one vector of weights: the output of class 0 is 0 and that of class
    1 is `w x + b`, so the softmax is the logistic function and the minimum is unique.
    More classes have a vector each.

    Args:
      features: numbers in an example.
      classes: `C`, from 2.

    Returns:
      The model. With two classes its features are what partitions cut, else its classes
      or its features, whatever costs less.

    Raises:
      ValueError: a number is too small.

    >>> logistic_regression(30).num_parameters
    31
    >>> logistic_regression(30, classes=3).num_parameters
    93
    """
    if features < 1 or classes < 2:
        raise ValueError(
            f"features={features}, classes={classes}: allowed are features from 1 and "
            "classes from 2"
        )
    sizes = (features, classes if classes > 2 else 1)
    return Model(
        name="logistic_regression",
        make=functools.partial(
            _Binary if classes == 2 else _Dense, sizes, (0.0,), jax.nn.identity
        ),
        losses=softmax_cross_entropy,
        input_shape=(features,),
        classes=classes,
        rules=_rules(sizes),
    )


def exchanged_bytes(sizes: Sequence[int], batch_size: int, partitions: int) -> int:
    r"""Give the bytes that partitions must sum up in a step: loss and gradient.

    Per example a layer cut by rows sums its outputs, in the forward pass, and one cut
    by columns sums its inputs' gradients, in the backward pass, save the first layer.
    If the last layer is cut by columns, its softmax sums three numbers: the largest
    output, the sum of exponentials and the label's output; outputs are never gathered.
    Layers alternate, and begin with the kind that makes the total smaller.

    These are the results of all-reduces in float32, the same for any `P` above 1. In a
    ring each partition sends and receives :math:`2 (P - 1) / P` times as much.

    Args:
      sizes: as for `dense`.
      batch_size: `B`.
      partitions: `P`.

    Returns:
      The bytes.

    >>> exchanged_bytes(SPEECH_SIZES, batch_size=128, partitions=2)
    5244416
    """
    if partitions == 1:
        return 0
    return 4 * batch_size * _sums_of(sizes)(_columns(sizes))


def softmax_cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Give minus the log-probability of each label.

    It is made of reductions over classes, so that outputs which are cut there need not
    be gathered, whatever a compiler does with the look-up of a label's output.

    Args:
      outputs: `[B, C]`, before softmax.
      labels: `[B]` integers from 0 to `C - 1`.

    Returns:
      `[B]`.
    """
    own = jnp.arange(outputs.shape[-1]) == labels[:, None]
    label_output = jnp.sum(jnp.where(own, outputs, 0), axis=-1)
    return jax.nn.logsumexp(outputs, axis=-1) - label_output


class _Dense(nnx.Module):
    def __init__(
        self,
        sizes: tuple[int, ...],
        gains: tuple[float, ...],
        activation: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
    ):
        self.activation, self.columns = activation, _columns(sizes)
        self.layers = nnx.List(
            [
                nnx.Linear(
                    inputs,
                    units,
                    kernel_init=nnx.initializers.normal(gain / math.sqrt(inputs)),
                    rngs=rngs,
                )
                for gain, (inputs, units) in zip(
                    gains, itertools.pairwise(sizes), strict=True
                )
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer(x if i in self.columns else cut_over_model(x))
            if i < len(self.layers) - 1:
                x = self.activation(x)
        return x


class _Binary(_Dense):
    """One output, the log-odds of class 1, and a zero for class 0 before it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.pad(super().__call__(x), ((0, 0), (1, 0)))


def _columns(sizes: Sequence[int]) -> range:
    """Which layers are cut by columns: every other one, so that the sums are few."""
    layers = len(sizes) - 1
    return min((range(0, layers, 2), range(1, layers, 2)), key=_sums_of(sizes))


def _sums_of(sizes: Sequence[int]) -> Callable[[range], int]:
    """Make the count of numbers to be summed per example; see `exchanged_bytes`."""
    layers = range(len(sizes) - 1)

    def count(columns: range) -> int:
        forward = sum(sizes[i + 1] for i in layers if i not in columns)
        backward = sum(sizes[i] for i in columns if i > 0)
        return forward + backward + (3 if layers[-1] in columns else 0)

    return count


def _rules(sizes: Sequence[int]) -> Rules:
    rules = []
    for i in range(len(sizes) - 1):
        if i in _columns(sizes):
            rules += [
                (f"layers/{i}/kernel", PartitionSpec(None, "model")),
                (f"layers/{i}/bias", PartitionSpec("model")),
            ]
        else:  # the bias is whole: it is added to the sums
            rules.append((f"layers/{i}/kernel", PartitionSpec("model", None)))
    return tuple(rules)
