"""What is trained, compiled once: the jitted pieces executors and replicas call."""

import contextlib
import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dbjax.loss import (
    GradientFn,
    all_finite,
    check_loss,
    make_gradient,
    shapes_of,
)
from dbjax.mesh import Rules, batch_sharding, check_memory, device_memory
from dbjax.optim.local import MOVEMENT, POSITION, LocalRule, as_local_rule
from dbjax.runtime.launch import launch, turn
from dbjax.server.layout import Layout
from dbjax.server.placement import Placement
from dbjax.server.shard import Shard, check_provide, make_shard
from dbjax.server.split_check import check_split
from dbjax.typing import Batch, Data, Gradients, LossFn, Params


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, its data, and a rule, laid out on shards.

    `gradient_fn` is the plain function, for executors that compile it into something
    larger; the jitted `gradient`, `accrue`, `split`, `merge`, `local_step` and `shard`
    are what live replicas and the exact executor call, one after the other. Where
    replicas are partitioned, `placement` says how, and programs on the devices of a
    replica go through `call`. `local_step` also gives what is pushed in place of the
    gradients, if anything is, and `approach` what a fetch makes of a replica's own
    parameters, if it does not replace them. `recipe` is what `assemble` was given
    beside parameters, data and places: another process makes the same of it.
    """

    params: Params
    data: Data
    layout: Layout
    shard: Shard
    optimizer: optax.GradientTransformation
    provide: tuple[str, ...]
    gradient_fn: GradientFn
    gradient: Callable[..., Any]
    finite: Callable[[Gradients], jax.Array]
    accrue: Callable[[Gradients, Gradients], Gradients]
    split: Callable[[Params], tuple[Params, ...]]
    merge: Callable[..., Params]
    local_optimizer: LocalRule | None
    local_init: Callable[[Params], Any] | None
    local_step: Callable[..., tuple[Params, Any, Any]] | None
    approach: Callable[[Params, Params], Params] | None
    version_dtype: Any
    per_shard: bool
    seed: int | None
    batch_spec: tuple[Any, ...]
    recipe: dict[str, Any]
    placement: Placement | None = None
    rules: Rules | None = None

    def call(self, on: int, program: Callable[..., Any], *args: Any) -> Any:
        """Call a program on the devices of replica `on`."""
        if self.placement is None:
            return program(*args)
        return launch(self.placement.mesh(on), program, *args)

    def compute(
        self, params: Params, batch: Batch, replica: int, index: int, on: int = 0
    ) -> tuple[Gradients, jax.Array]:
        """Give a minibatch's gradient and whether it is finite.

        Args:
          params: as `fetch` gives them.
          batch: the minibatch.
          replica: whose it is.
          index: which of its minibatches.
          on: on whose devices `params` are.

        Returns:
          Both, not waited for unless several devices compute them.
        """
        if self.placement is None:
            return self.gradient(params, batch, replica, index)
        where = batch_sharding(batch, self.placement.mesh(on), self.rules)
        put = _put_part if self.placement.spans_processes else jax.device_put
        batch = jax.tree.map(put, batch, where)
        gradients = self.call(on, self.gradient, params, batch, replica, index)
        # By itself: within the other program XLA may compute large gradients twice.
        return gradients, self.call(on, self.finite, gradients)

    def here(self, tree: Any, on: int) -> Any:
        """What lies on the devices of replica `on`, within reach of this process.

        If they are of several processes, each of these must ask for it.
        """
        if self.placement is None or not self.placement.spans_processes:
            return tree
        whole = self.call(on, self._gather, tree)
        return jax.tree.map(lambda x: x.addressable_data(0), whole)

    @functools.cached_property
    def _gather(self) -> Callable[[Any], Any]:
        assert self.placement is not None
        everywhere = NamedSharding(self.placement.mesh(0), PartitionSpec())
        return jax.jit(lambda tree: tree, out_shardings=everywhere)

    def fetch(self, parts: tuple[Params, ...], on: int = 0) -> Params:
        """Put the shards' published parameters together, for replica `on`."""
        if self.placement is None:
            return self.widen(self.merge(parts))
        return self.widen(self.merge(parts, on))

    def whole(self, parts: tuple[Params, ...]) -> Params:
        """The parameters for a user's function, in buffers of their own."""
        if self.placement is not None:
            return self.placement.whole(parts)
        merged = self.merge(parts)
        return copy(merged) if self.layout.shards == 1 else merged

    def last(self, parts: tuple[Params, ...]) -> Params:
        """The parameters at the end, when the shards write no more."""
        if self.placement is None:
            return self.merge(parts)
        return self.placement.whole(parts, consume=True)

    def like(self, leaf: jax.Array, saved: np.ndarray) -> jax.Array:
        """Bring a saved array to where `leaf` is."""
        where = None if self.placement is None else leaf.sharding
        return jnp.array(saved, device=where)

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
    local_optimizer: optax.GradientTransformation | LocalRule | None = None,
    split: str = "even",
    per_shard: bool = False,
    version_dtype: Any = None,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Problem:
    """Check everything that can be checked before a run, and compile nothing twice.

    The problem's `params` are the run's own: made by `params()` if that is a function,
    copied otherwise.

    Raises:
      TypeError, ValueError: what is wrong with the parameters, the loss, the data or
        the optimizer.
    """
    _check_kinds(loss_fn, data, optimizer, local_optimizer, version_dtype)
    check_provide(provide)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if mesh is None and rules is not None:
        raise ValueError("rules are of a mesh: give mesh= as well")
    shapes = jax.eval_shape(params) if _is_function(params) else params
    placement = (
        None if mesh is None else Placement.of(shapes, shards, mesh, rules, split)
    )
    layout = Layout.of(shapes, shards, split) if placement is None else placement.layout
    _check_fits(shapes, placement, rules, optimizer)
    params = _own(params, placement)
    if not per_shard:
        check_split(optimizer, params, layout, split, provide)
    if hasattr(data, "start"):
        data.start(replicas)  # iterators begin anew, one a replica
    first = data.batch(0, 0)
    with contextlib.nullcontext() if placement is None else turn(placement.mesh(0)):
        check_loss(loss_fn, params, first, rng=rng, has_aux=has_aux, seed=seed)
    return assemble(
        params, data, layout, placement, shapes_of(first), loss_fn=loss_fn,
        optimizer=optimizer, provide=provide, local_optimizer=local_optimizer,
        per_shard=per_shard, version_dtype=version_dtype, rng=rng, has_aux=has_aux,
        seed=seed, rules=rules,
    )  # fmt: skip


def assemble(
    params: Params,
    data: Any,
    layout: Layout,
    placement: Placement | None,
    batch_spec: tuple[Any, ...],
    **recipe: Any,
) -> Problem:
    """Make the jitted pieces of what `make_problem` has checked.

    Args:
      params: the first parameters, the problem's own; None where others hold them.
      data: gives minibatches; None where each process has its own.
      layout: how parameters lie on shards.
      placement: how they lie on replicas' partitions, if they do.
      batch_spec: shapes of a minibatch.
      **recipe: arguments of `make_problem` that are left.

    Returns:
      The problem.
    """
    loss_fn, optimizer, rng = recipe["loss_fn"], recipe["optimizer"], recipe["rng"]
    rule = recipe["local_optimizer"]
    rule = None if rule is None else as_local_rule(rule)
    has_aux, seed = recipe["has_aux"], recipe["seed"]
    gradient_fn = make_gradient(loss_fn, rng=rng, has_aux=has_aux, seed=seed)

    def gradient(params: Params, batch: Batch, replica: Any, index: Any) -> Any:
        gradients = gradient_fn(params, batch, replica, index)
        return gradients, all_finite(gradients)

    def local_step(params: Params, state: Any, gradients: Gradients) -> Any:
        assert rule is not None
        updates, state = rule.optimizer.update(gradients, state, params)
        new = optax.apply_updates(params, updates)
        pushed = None  # the gradients, which are there
        if rule.push == MOVEMENT:
            pushed = jax.tree.map(jnp.subtract, params, new)
        elif rule.push == POSITION:
            pushed = new
        return new, state, pushed

    def accrue(sum_: Any, more: Any) -> Any:
        return jax.tree.map(jnp.add, sum_, more)

    def approach(own: Params, fetched: Params) -> Params:
        assert rule is not None
        return jax.tree.map(lambda x, w: x + rule.attraction * (w - x), own, fetched)

    specs = None
    split_fn: Callable[..., Any] = layout.split
    merge_fn: Callable[..., Any] = layout.merge
    if placement is None and layout.shards > 1:
        split_fn, merge_fn = jax.jit(layout.split), jax.jit(layout.merge)
    if placement is not None:
        split_fn, merge_fn = placement.split, placement.merge
        specs = [sharding.spec for sharding in placement.shardings[0]]
        specs = layout.treedef.unflatten(specs)
    return Problem(
        params=params,
        data=data,
        layout=layout,
        shard=make_shard(optimizer, recipe["provide"]),
        optimizer=optimizer,
        provide=recipe["provide"],
        gradient_fn=gradient_fn,
        gradient=(
            jax.jit(gradient)
            if placement is None
            else jax.jit(gradient_fn, out_shardings=specs)
        ),
        finite=jax.jit(all_finite),
        accrue=(
            (lambda before, now: now)
            if rule is not None and rule.push == POSITION
            else jax.jit(accrue, donate_argnums=(0,))
        ),
        split=split_fn,
        merge=merge_fn,
        local_optimizer=rule,
        local_init=None if rule is None else jax.jit(rule.optimizer.init),
        local_step=None if rule is None else jax.jit(local_step),
        approach=(None if rule is None or rule.attraction == 1 else jax.jit(approach)),
        version_dtype=recipe["version_dtype"],
        per_shard=recipe["per_shard"],
        seed=seed if rng else None,
        batch_spec=batch_spec,
        recipe=recipe,
        placement=placement,
        rules=recipe["rules"],
    )


def _put_part(leaf: Any, where: NamedSharding) -> jax.Array:
    """Place what all processes have: each puts its part on its own devices."""
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, where, lambda part: leaf[part])


def _is_function(params: Any) -> bool:
    """Whether it makes parameters; a pytree, such as a module, may be callable too."""
    if not (callable(params) and jax.tree.leaves(params) == [params]):
        return False
    try:
        inspect.signature(params).bind()
    except TypeError:
        raise ValueError(
            "params is a function that needs arguments: allowed are a pytree of float "
            "arrays, or a function without arguments that makes one"
        ) from None
    return True


def _check_fits(
    shapes: Params,
    placement: Placement | None,
    rules: Rules | None,
    optimizer: optax.GradientTransformation,
) -> None:
    """Raise where one copy of each, for one replica, is more than there is memory."""
    where = None if placement is None else placement.mesh(0)
    devices = jax.devices()[:1] if where is None else list(where.devices.flat)
    shapes = jax.eval_shape(lambda tree: tree, shapes)
    budget = device_memory(devices)
    check_memory(budget, shapes, where, rules, optimizer=optimizer)


def _own(params: Any, placement: Placement | None) -> Params:
    """The run's own first parameters, where they belong."""
    if _is_function(params):
        if placement is None:
            return jax.jit(params)()
        where = placement.layout.treedef.unflatten(placement.shardings[0])
        return launch(placement.mesh(0), jax.jit(params, out_shardings=where))
    # A copy: the run recycles buffers, and NumPy memory may change under us.
    # Of its own dtype, not a weak one, which the first update would change.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), params)
    return params if placement is None else placement.put(params)


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
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {optimizer!r}"
        )
    if local_optimizer is not None:
        as_local_rule(local_optimizer)
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
        # Without a copy: a leaf may be large.
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        value = zlib.crc32(flat, value)  # pyrefly: ignore[bad-argument-type]
    return value or 1


def copy(tree: Any) -> Any:
    """Fresh buffers with the same values."""
    return jax.tree.map(jnp.copy, tree)
