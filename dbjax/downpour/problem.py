"""What is trained, compiled once: the jitted pieces executors and replicas call."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.loss import (
    GradientFn,
    all_finite,
    check_loss,
    make_gradient,
    shapes_of,
)
from dbjax.server.layout import Layout
from dbjax.server.shard import Shard, check_provide, make_shard
from dbjax.server.split_check import check_split
from dbjax.typing import Batch, Data, Gradients, LossFn, Params


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, its data, and a rule, laid out on shards.

    `gradient_fn` is the plain function, for executors that compile it into something
    larger; the jitted `gradient`, `accrue`, `split`, `merge`, `local_step` and `shard`
    are what live replicas and the exact executor call, one after the other.
    """

    params: Params
    data: Data
    layout: Layout
    shard: Shard
    optimizer: optax.GradientTransformation
    provide: tuple[str, ...]
    gradient_fn: GradientFn
    gradient: Callable[..., tuple[Gradients, jax.Array]]
    accrue: Callable[[Gradients, Gradients], Gradients]
    split: Callable[[Params], tuple[Params, ...]]
    merge: Callable[[tuple[Params, ...]], Params]
    local_optimizer: optax.GradientTransformation | None
    local_step: Callable[..., tuple[Params, Any]] | None
    version_dtype: Any
    per_shard: bool
    seed: int | None
    batch_spec: tuple[Any, ...]

    def batch(self, replica: int, index: int) -> Batch:
        """One minibatch, checked against the first one's shapes."""
        batch = self.data.batch(replica, index)
        if shapes_of(batch) != self.batch_spec:
            raise ValueError(
                f"minibatch {index} of replica {replica} has other shapes or dtypes "
                f"than the first one: {shapes_of(batch)[1:]}, not {self.batch_spec[1:]}"
            )
        return batch

    def publish(self, params: Params) -> Params:
        """Give what replicas get: the parameters, in `version_dtype` if one is set."""
        return params if self.version_dtype is None else self._narrow(params)

    @functools.cached_property
    def _narrow(self) -> Callable[[Params], Params]:
        return jax.jit(
            lambda tree: jax.tree.map(lambda x: x.astype(self.version_dtype), tree)
        )

    @functools.cached_property
    def widen(self) -> Callable[[Params], Params]:
        """Bring a whole tree of parameters back to its own dtypes."""
        dtypes = self.layout.dtypes
        if self.version_dtype is None:
            return lambda tree: tree

        def wide(tree: Params) -> Params:
            leaves, treedef = jax.tree.flatten(tree)
            pairs = zip(leaves, dtypes, strict=True)
            return treedef.unflatten([leaf.astype(dtype) for leaf, dtype in pairs])

        return jax.jit(wide)


def make_problem(
    loss_fn: LossFn,
    params: Params,
    data: Data,
    *,
    optimizer: optax.GradientTransformation,
    shards: int,
    replicas: int = 1,
    provide: tuple[str, ...] = (),
    local_optimizer: optax.GradientTransformation | None = None,
    split: str = "even",
    per_shard: bool = False,
    version_dtype: Any = None,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
) -> Problem:
    """Check everything that can be checked before a run, and compile nothing twice.

    Raises:
      TypeError, ValueError: what is wrong with the parameters, the loss, the data or
        the optimizer.
    """
    _check_kinds(loss_fn, data, optimizer, local_optimizer, version_dtype)
    check_provide(provide)
    layout = Layout.of(params, shards, split)
    # Our own copy: the run recycles buffers, and NumPy memory may change under us.
    # Of its own dtype, not a weak one, which the first update would change.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), params)
    if not per_shard:
        check_split(optimizer, params, layout, split, provide)
    if hasattr(data, "start"):
        data.start(replicas)  # iterators begin anew, one a replica
    first = data.batch(0, 0)
    check_loss(loss_fn, params, first, rng=rng, has_aux=has_aux, seed=seed)
    gradient_fn = make_gradient(loss_fn, rng=rng, has_aux=has_aux, seed=seed)

    def gradient(params: Params, batch: Batch, replica: Any, index: Any) -> Any:
        gradients = gradient_fn(params, batch, replica, index)
        return gradients, all_finite(gradients)

    def local_step(params: Params, state: Any, gradients: Gradients) -> Any:
        assert local_optimizer is not None
        updates, state = local_optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    single = layout.shards == 1
    return Problem(
        params=params,
        data=data,
        layout=layout,
        shard=make_shard(optimizer, provide),
        optimizer=optimizer,
        provide=provide,
        gradient_fn=gradient_fn,
        gradient=jax.jit(gradient),
        accrue=jax.jit(
            lambda sum_, more: jax.tree.map(jnp.add, sum_, more), donate_argnums=(0,)
        ),
        split=layout.split if single else jax.jit(layout.split),
        merge=layout.merge if single else jax.jit(layout.merge),
        local_optimizer=local_optimizer,
        local_step=None if local_optimizer is None else jax.jit(local_step),
        version_dtype=version_dtype,
        per_shard=per_shard,
        seed=seed if rng else None,
        batch_spec=shapes_of(first),
    )


def _check_kinds(
    loss_fn: Any, data: Any, optimizer: Any, local_optimizer: Any, version_dtype: Any
) -> None:
    """Raise if something is not at all what it should be."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    if not callable(getattr(data, "batch", None)):
        raise TypeError(
            f"data must give batch(replica, step), as from_arrays does; a "
            f"{type(data).__name__} does not"
        )
    rules = {"optimizer": optimizer}
    if local_optimizer is not None:
        rules["local_optimizer"] = local_optimizer
    for name, rule in rules.items():
        if not (hasattr(rule, "init") and hasattr(rule, "update")):
            raise TypeError(
                f"{name} must be an optax.GradientTransformation, got {rule!r}"
            )
    if version_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(version_dtype), jnp.floating)
    except TypeError:  # it names no dtype
        floating = False
    if not floating:
        raise ValueError(f"version_dtype must be a float dtype, got {version_dtype!r}")


def digest(params: Params) -> int:
    """A checksum of a tree's bits, never 0 (which means: none recorded)."""
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value or 1


def copy(tree: Any) -> Any:
    """Fresh buffers with the same values."""
    return jax.tree.map(jnp.copy, tree)
