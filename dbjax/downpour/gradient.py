"""A replica's gradient of one minibatch, and whether it is finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.typing import Batch, Gradients, LossFn, Params

GradientFn = Callable[[Params, Batch, Any, Any], Gradients]


def make_gradient(
    loss_fn: LossFn, *, rng: bool = False, has_aux: bool = False, seed: int = 0
) -> GradientFn:
    """Make `gradient(params, batch, replica, index)` of a loss.

    Args:
      loss_fn: `loss_fn(params, batch)`, or `loss_fn(params, batch, key)` with `rng`.
      rng: whether the loss takes a key, a pure function of (seed, replica, index).
      has_aux: whether the loss returns `(loss, aux)`; `aux` is not used.
      seed: the key's seed.

    Returns:
      The pure gradient function.
    """

    def gradient(params: Params, batch: Batch, replica: Any, index: Any) -> Gradients:
        if not rng:
            out = jax.grad(loss_fn, has_aux=has_aux)(params, batch)
        else:
            key = jax.random.fold_in(jax.random.key(seed), replica)
            key = jax.random.fold_in(key, index)
            out = jax.grad(loss_fn, has_aux=has_aux)(params, batch, key)
        return out[0] if has_aux else out

    return gradient


def all_finite(tree: Gradients) -> jax.Array:
    """Whether every number in a tree is finite, at about the speed of reading it once.

    XLA's reductions run element by element on CPU; a product with a vector does not.
    The factor 2^-40 keeps sums of finite numbers finite; NaN and infinity survive it.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.isfinite(leaf).all()
        rows = leaf.reshape(-1, leaf.shape[-1])
        if rows.dtype.itemsize < 4:
            rows = rows.astype(jnp.float32)
        return jnp.isfinite(rows @ jnp.full(rows.shape[-1], 2.0**-40, rows.dtype)).all()

    return functools.reduce(jnp.logical_and, map(one, jax.tree.leaves(tree)))


def shapes_of(batch: Batch) -> tuple[Any, ...]:
    """A batch's structure, shapes and dtypes, to compare with another's."""
    leaves, treedef = jax.tree.flatten(batch)
    return (
        treedef,
        *((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves),
    )


def check_loss(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    *,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
) -> None:
    """Raise unless the loss of the first minibatch is a finite scalar float.

    Raises:
      ValueError: what the loss gave instead.
    """
    args = (jax.random.key(seed),) if rng else ()
    value = jax.jit(loss_fn)(params, batch, *args)
    if has_aux:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError("has_aux=True: loss_fn must return (loss, aux)")
        value = value[0]
    if not hasattr(value, "dtype"):
        hint = "" if has_aux else " (has_aux=True if it returns (loss, aux))"
        raise ValueError(
            f"loss_fn must return a scalar float, got a {type(value).__name__}{hint}"
        )
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a scalar float (the mean over the batch), got shape "
            f"{value.shape} and dtype {value.dtype}"
        )
    if not bool(jnp.isfinite(value)):
        raise ValueError(
            f"loss_fn gives {float(value)} on the first minibatch: check the data, the "
            "initial parameters and the loss"
        )
