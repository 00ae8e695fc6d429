"""What the battery trains: four tiny problems, nothing downloaded, the same every time.

Examples are drawn once, so that a seed chooses first parameters, the order of examples
and the Trace, and nothing else: two rules with equal seeds differ in the rule only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbjax
from dbjax.models.locally_connected import locally_connected
from dbjax.typing import Batch, Data, LossFn, Params
from experiments import streams
from experiments.workload import split


@dataclasses.dataclass(frozen=True)
class Workload:
    """A problem of the battery.

    Attributes:
      name: on the page, and in `--only`.
      about: what it is, in a few words.
      init: `init(seed) -> params`.
      scores: `scores(params, batch) -> (losses [B, ...], right [B, ...])`.
      training: examples to train on, by name.
      held_out: examples to judge by, never trained on.
      batch: examples in a minibatch.
      target: a held-out loss that a good run reaches before it ends.
    """

    name: str
    about: str
    init: Callable[[int], Params]
    scores: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    training: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    batch: int
    target: float

    @property
    def loss_fn(self) -> LossFn:
        """The mean loss of a minibatch."""
        return lambda params, batch: self.scores(params, batch)[0].mean()

    def data(self, seed: int) -> Data:
        """The minibatches, in an order of the seed's."""
        return dbjax.from_arrays(dict(self.training), self.batch, seed=seed)

    def measure(self, params: Params) -> jax.Array:
        """Held-out loss and accuracy, `[2]`; pure."""
        losses, right = self.scores(params, dict(self.held_out))
        return jnp.stack([losses.mean(), right.mean(dtype=losses.dtype)])


@functools.lru_cache
def logistic(features: int = 40, training: int = 8_192) -> Workload:
    """Logistic regression, with features of very different sizes: convex, and slow."""
    chance = np.random.default_rng(1)
    scale = np.geomspace(1.0, 0.05, features)
    truth = chance.standard_normal(features) / scale**0.5
    x = chance.standard_normal((training + 2_048, features)) * scale
    positive = chance.random(len(x)) < 1 / (1 + np.exp(-x @ truth))
    rows = {"x": x.astype(np.float32), "positive": positive.astype(np.float32)}

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = batch["x"] @ params["weights"] + params["bias"]
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["positive"])
        return losses, (logits > 0) == (batch["positive"] > 0)

    def init(seed: int) -> Params:
        del seed  # convex: everybody starts at zero
        return {"weights": jnp.zeros(features), "bias": jnp.zeros(())}

    return Workload(
        "logistic", f"logistic regression, {features} features of unequal size", init,
        scores, *_cut(rows, training), batch=8, target=0.41,
    )  # fmt: skip


@functools.lru_cache
def digits(hidden: int = 32, training: int = 8_192) -> Workload:
    """A network with one hidden layer, on moved and noisy handwritten digits."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    train, test = split(len(labels), held_out=497)
    stream = streams.AugmentedImages(images[train], labels[train], training)
    flat = images[test].reshape(-1, 64) - stream.mean

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x = jax.nn.relu(_dense(params["hidden"], batch["image"]))
        return _classified(_dense(params["output"], x), batch["label"])

    @jax.jit
    def init(seed: int) -> Params:
        first, second = jax.random.split(jax.random.key(seed))
        return {
            "hidden": _dense_init(first, 64, hidden),
            "output": _dense_init(second, hidden, 10),
        }

    return Workload(
        "digits", f"8 x 8 digits, network 64-{hidden}-10", init, scores,
        stream.batch(0, 0), {"image": flat, "label": labels[test]}, batch=8,
        target=0.20,
    )  # fmt: skip


@functools.lru_cache
def local(side: int = 8, maps: int = 4, training: int = 8_192) -> Workload:
    """A locally connected layer and a dense one, on painted shapes in colour."""
    shapes = streams.PaintedShapes(1, classes=24, seed=1, size=side)
    patch, stride, below = 4, 2, 3
    places = side // stride
    depth = (places, places, stride * patch * below, patch // stride, maps)

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        seen = batch["image"].transpose(1, 2, 0, 3)
        x = locally_connected(seen, params["kernel"], params["bias"], stride=stride)
        x = jax.nn.relu(x).transpose(2, 0, 1, 3).reshape(seen.shape[2], -1)
        return _classified(_dense(params["output"], x), batch["label"])

    @jax.jit
    def init(seed: int) -> Params:
        first, second = jax.random.split(jax.random.key(seed))
        scale = (patch**2 * below) ** -0.5
        return {
            "kernel": scale * jax.random.normal(first, depth),
            "bias": jnp.zeros((places, places, maps)),
            "output": _dense_init(second, places**2 * maps, 24),
        }

    return Workload(
        "local", f"{side} x {side} painted shapes, a locally connected layer", init,
        scores, *_cut(shapes.held_out(training + 1_024), training), batch=8,
        target=0.90,
    )  # fmt: skip


@functools.lru_cache
def language(
    symbols: int = 8, motif: int = 4, width: int = 16, training: int = 8_192
) -> Workload:
    """One block of a transformer, on text that repeats itself.

    A sentence is a motif from a Markov chain, three times over: what follows what is
    learned soon, to look back for the rest takes attention.
    """
    heads, length = 2, 3 * motif - 1
    rows = _sentences(symbols, motif, training + 512)

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        text = batch["text"]
        x = params["embedding"][text[:, :-1]] + params["position"]
        x = x + _attend(params, _normalise(x), heads)
        hidden = jax.nn.gelu(_dense(params["up"], _normalise(x)))
        x = x + _dense(params["down"], hidden)
        return _classified(_dense(params["output"], _normalise(x)), text[:, 1:])

    @jax.jit
    def init(seed: int) -> Params:
        keys = jax.random.split(jax.random.key(seed), 7)
        return {
            "embedding": jax.random.normal(keys[0], (symbols, width)),
            "position": 0.5 * jax.random.normal(keys[1], (length, width)),
            "attend": _dense_init(keys[2], width, 3 * width),
            "mix": _dense_init(keys[3], width, width),
            "up": _dense_init(keys[4], width, 2 * width),
            "down": _dense_init(keys[5], 2 * width, width),
            "output": _dense_init(keys[6], width, symbols),
        }

    return Workload(
        "language", f"a transformer of one block, {symbols} symbols", init, scores,
        *_cut({"text": rows}, training), batch=8, target=0.55,
    )  # fmt: skip


WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "logistic": logistic,
    "digits": digits,
    "local": local,
    "language": language,
}


def _cut(
    rows: Mapping[str, np.ndarray], training: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The examples to train on, and the held-out ones."""
    first = {name: values[:training] for name, values in rows.items()}
    return first, {name: values[training:] for name, values in rows.items()}


def _dense_init(key: jax.Array, inputs: int, outputs: int) -> Params:
    kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _dense(layer: Params, x: Any) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _classified(logits: jax.Array, labels: Any) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, logits.argmax(-1) == labels


def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _attend(params: Params, x: jax.Array, heads: int) -> jax.Array:
    """Causal attention, `[B, L, width]`."""
    batch, length, width = x.shape
    parts = _dense(params["attend"], x).reshape(batch, length, 3, heads, -1)
    query, key, value = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
    score = jnp.einsum("blhd,bmhd->bhlm", query, key) * (width / heads) ** -0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    share = jax.nn.softmax(jnp.where(seen, score, -1e9))
    mixed = jnp.einsum("bhlm,bmhd->blhd", share, value)
    return _dense(params["mix"], mixed.reshape(batch, length, width))


def _sentences(symbols: int, motif: int, count: int) -> np.ndarray:
    """Draw from the language, int32 `[count, 3 * motif]`."""
    chance = np.random.default_rng(2)
    ladder = chance.dirichlet([0.5] * symbols, size=symbols).cumsum(-1)
    text = chance.integers(symbols, size=(count, motif))
    for at in range(1, motif):
        drawn = (chance.random(count)[:, None] > ladder[text[:, at - 1]]).sum(1)
        text[:, at] = np.minimum(drawn, symbols - 1)  # a sum may round below 1
    return np.tile(text, 3).astype(np.int32)
