"""What `bench_lbfgs` minimises: full batches in memory, the same for every side."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from dbjax.typing import Params


class Problem(NamedTuple):
    """A loss to bring down.

    Attributes:
      loss: `loss(params) -> scalar`, over the whole batch.
      params: where to start.
      target: the loss to reach.
    """

    loss: Callable[[Params], jax.Array]
    params: Params
    target: float


def digits() -> Problem:
    """All 1,797 digits, 64-512-512-10 sigmoid units, Glorot's uniform start."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.array(images / 16, jnp.float32), jnp.array(labels)
    random = np.random.default_rng(0)

    def layer(inputs: int, outputs: int) -> Params:
        limit = np.sqrt(6 / (inputs + outputs))
        w = random.uniform(-limit, limit, (inputs, outputs))
        return {"w": jnp.array(w, jnp.float32), "b": jnp.zeros(outputs)}

    def loss(params: Params) -> jax.Array:
        h = x
        for layer in params[:-1]:
            h = jax.nn.sigmoid(h @ layer["w"] + layer["b"])
        logits = h @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return Problem(loss, [layer(64, 512), layer(512, 512), layer(512, 10)], 0.02)


def clicks(examples: int = 4_000, buckets: int = 200_000) -> Problem:
    """Logistic regression on clicks: convex, 200,014 features, correlated and sparse.

    13 numbers and 26 categories an example, the categories (some frequent, most rare)
    hashed into buckets, with a small l2: what advertisers have. The minimum is 0.03797,
    the start 0.693.
    """
    random = np.random.default_rng(0)
    numbers = random.standard_normal((examples, 13))
    category = np.minimum(random.zipf(1.3, (examples, 26)), 20_000)
    bucket = (category * 2_654_435_761 + np.arange(26) * 40_503) % buckets
    logits = numbers @ (0.5 * random.standard_normal(13))
    logits += 0.5 * random.standard_normal(buckets)[bucket].sum(1)
    clicked = random.random(examples) < 1 / (1 + np.exp(-logits))
    x, at = jnp.array(numbers, jnp.float32), jnp.array(bucket, jnp.int32)
    y = jnp.array(clicked, jnp.float32)

    def loss(params: Params) -> jax.Array:
        logits = x @ params["number"] + params["category"][at].sum(1) + params["bias"]
        l2 = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return optax.sigmoid_binary_cross_entropy(logits, y).mean() + 0.5e-5 * l2

    start = {"bias": jnp.zeros([]), "number": jnp.zeros(13)}
    return Problem(loss, start | {"category": jnp.zeros(buckets)}, 0.0386)


def ratings(count: int = 50_000, users: int = 20_000, items: int = 5_000) -> Problem:
    """Matrix factorisation of rank 16 with biases, 425,001 parameters, not convex."""
    random, rank = np.random.default_rng(0), 16
    user = random.integers(0, users, count)
    item = np.minimum(random.zipf(1.2, count) - 1, items - 1)
    taste, kind = random.standard_normal((users, 3)), random.standard_normal((items, 3))
    stars = 3.5 + 0.5 * random.standard_normal(users)[user]
    stars += 0.5 * random.standard_normal(items)[item]
    stars += 0.5 * (taste[user] * kind[item]).sum(1)
    stars += 0.3 * random.standard_normal(count)
    u, i, y = jnp.array(user), jnp.array(item), jnp.array(stars, jnp.float32)

    def loss(params: Params) -> jax.Array:
        fit = params["mean"] + params["user_bias"][u] + params["item_bias"][i]
        fit += jnp.sum(params["user"][u] * params["item"][i], 1)
        l2 = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean((fit - y) ** 2) + 1e-5 * l2

    def factors(rows: int) -> jax.Array:
        return jnp.array(0.1 * random.standard_normal((rows, rank)), jnp.float32)

    start = {"mean": jnp.zeros([]), "user": factors(users), "item": factors(items)}
    biases = {"user_bias": jnp.zeros(users), "item_bias": jnp.zeros(items)}
    return Problem(loss, start | biases, 0.09)


PROBLEMS = {make.__name__: make for make in (digits, clicks, ratings)}
