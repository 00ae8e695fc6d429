"""Finds optimizers whose result depends on how the parameters are split over shards.

Global-norm clipping, LAMB or Muon see a whole tree or a whole matrix; on a shard they
would silently be another rule. So the rule is tried, whole against sharded, on random
gradients.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.server.layout import Layout
from dbjax.typing import Params

# Large leaves are tried cut down, and on fewer shards, so that it costs little.
_LARGEST_AXIS, _LARGEST_LEAF, _MOST_SHARDS = 256, 256**2, 8
# Clipping leaves small gradients alone: a large one is tried as well.
_SCALES = (1, 8192)
# Relative to a leaf's largest update. Rounding is far below, what a split does above.
_TOLERANCE = 1e-3


def check_split(
    optimizer: optax.GradientTransformation,
    params: Params,
    layout: Layout,
    split: str = "even",
    provide: tuple[str, ...] = (),
) -> None:
    """Raise if `optimizer` gives other results on shards than on the whole tree.

    Args:
      optimizer: the rule.
      params: the parameters (shapes and paths are used, not values).
      layout: their layout; with one shard there is nothing to check.
      split: the layout's kind.
      provide: the extra arguments the rule asks for.

    Raises:
      ValueError: the results differ; says what to do.

    >>> params = {"w": jnp.ones((4, 16)), "b": jnp.ones(4)}
    >>> check_split(optax.adam(0.1), params, Layout.of(params, 2))
    >>> clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> check_split(clipped, params, Layout.of(params, 2))
    Traceback (most recent call last):
    ...
    ValueError: the optimizer's result depends on the split over 2 shards (of update ...
    """
    if layout.shards == 1:
        return
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        shape = [min(n, _LARGEST_AXIS) for n in leaf.shape]
        while math.prod(shape) > _LARGEST_LEAF:
            longest = shape.index(max(shape))
            shape[longest] = -(-shape[longest] // 2)
        # Never narrower than float32, where rounding could pass for a difference.
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.asarray(random.standard_normal(shape), dtype)

    start = jax.tree.map(draw, params)
    gradients = [
        jax.tree.map(lambda leaf, scale=scale: scale * draw(leaf), params)
        for scale in _SCALES
    ]
    small = layout
    if layout.shapes != tuple(leaf.shape for leaf in jax.tree.leaves(start)):
        small = Layout.of(start, min(layout.shards, _MOST_SHARDS), split)

    def on_one(whole: Params, gradients: list[Params]) -> list[Params]:
        made = _updates(optimizer, provide, (whole,), [(one,) for one in gradients])
        return [update for (update,) in made]

    def on_shards(whole: Params, gradients: list[Params]) -> list[Params]:
        parts = [small.split(one) for one in gradients]
        made = _updates(optimizer, provide, small.split(whole), parts)
        return [small.merge(update) for update in made]

    try:
        expected = jax.jit(on_one)(start, gradients)
        sharded = jax.jit(on_shards)(start, gradients)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "the optimizer does not run on a shard's part of the tree (leaves that "
            f"another shard holds are None there): {error}. Masks and labels must be "
            "functions of the tree, not fixed trees; or use shards=1"
        ) from error
    for step, (one, other) in enumerate(zip(expected, sharded, strict=True)):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for name, (a, b) in zip(layout.names, pairs, strict=True):
            _check_equal(f"of update {step}, params{name}", a, b, layout.shards, split)


def _updates(
    optimizer: optax.GradientTransformation,
    provide: tuple[str, ...],
    pieces: tuple[Params, ...],
    gradients: list[tuple[Params, ...]],
) -> list[tuple[Params, ...]]:
    """Run the rule on each piece of the parameters by itself.

    Args:
      optimizer: the rule.
      provide: the extra arguments it asks for.
      pieces: the parameters, a tree per piece.
      gradients: for each step, the gradients of each piece.

    Returns:
      For each step, the updates of each piece.
    """
    states, made = [optimizer.init(piece) for piece in pieces], []
    for parts in gradients:
        stepped = []
        for piece, state, part in zip(pieces, states, parts, strict=True):
            extras = {"staleness": jnp.int32(1), "stale_params": piece}
            wanted = {name: extras[name] for name in provide}
            update, state = optimizer.update(part, state, piece, **wanted)
            stepped.append((optax.apply_updates(piece, update), state, update))
        pieces, states, updates = zip(*stepped, strict=True)
        made.append(updates)
    return made


def _check_equal(what: str, one: Any, other: Any, shards: int, split: str) -> None:
    """Raise if a leaf's update on shards is another than on the whole tree."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    largest = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    if np.allclose(a, b, rtol=0, atol=_TOLERANCE * largest, equal_nan=True):
        return
    hint = "" if split == "leaf" else 'split="leaf" (whole leaves on a shard), '
    raise ValueError(
        f"the optimizer's result depends on the split over {shards} shards ({what} "
        f"differs by up to {np.nanmax(np.abs(a - b)):.3g}; its largest entry is "
        f"{largest:.3g}). Use {hint}shards=1, or per_shard=True to accept a rule that "
        "sees each shard alone"
    )
