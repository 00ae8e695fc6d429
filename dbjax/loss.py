"""What a user's loss gives: its gradient, and whether that is finite; checks of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.typing import Batch, Gradients, LossFn, Params

GradientFn = Callable[[Params, Batch, Any, Any], Gradients]


def make_loss(
    loss_fn: LossFn, *, rng: bool = False, has_aux: bool = False, seed: int = 0
) -> Callable[..., jax.Array]:
    """Make `loss(params, batch, *names) -> scalar` of a user's loss.

    Args:
      loss_fn: `loss_fn(params, batch)`, or `loss_fn(params, batch, key)` with `rng`.
      rng: whether the loss takes a key, a pure function of (seed, *names).
      has_aux: whether the loss returns `(loss, aux)`; `aux` is not used.
      seed: the key's seed.

    Returns:
      The pure function; `names` are integers that say which batch it is.
    """

    def loss(params: Params, batch: Batch, *names: Any) -> jax.Array:
        args = ()
        if rng:
            key = jax.random.key(seed)
            args = (functools.reduce(jax.random.fold_in, names, key),)
        out = loss_fn(params, batch, *args)
        return out[0] if has_aux else out

    return loss


def make_gradient(
    loss_fn: LossFn, *, rng: bool = False, has_aux: bool = False, seed: int = 0
) -> GradientFn:
    """Make `gradient(params, batch, replica, index)`; arguments as for `make_loss`."""
    return jax.grad(make_loss(loss_fn, rng=rng, has_aux=has_aux, seed=seed))


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
    finite: bool = True,
) -> None:
    """Raise unless the loss of the first minibatch is a finite scalar float.

    Args:
      loss_fn: see `make_loss`, as are `rng`, `has_aux` and `seed`.
      params: the first parameters.
      batch: the first minibatch.
      rng: whether it takes a key.
      has_aux: whether it returns more than a value.
      seed: of the key.
      finite: whether the value must be finite; without it nothing is computed.

    Raises:
      ValueError: what the loss gave instead.
    """
    args = (jax.random.key(seed),) if rng else ()
    call = jax.jit(loss_fn) if finite else functools.partial(jax.eval_shape, loss_fn)
    value = call(params, batch, *args)
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
    if finite and not bool(jnp.isfinite(value)):
        raise ValueError(
            f"loss_fn gives {float(value)} on the first minibatch: check the data, the "
            "initial parameters and the loss"
        )
