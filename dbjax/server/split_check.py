"""Finds optimizers whose result depends on how the parameters are split over shards.

Global-norm clipping, LAMB or Muon see a whole tree or a whole matrix; on a shard they
would silently be another rule. So the rule is tried, whole against sharded, on random
gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.server.layout import Layout
from dbjax.typing import Params

_LARGEST, _MOST_SHARDS = 256, 8
"""Large leaves are tried at up to this length an axis, on so many shards: it costs little.
"""  # noqa: E501
_SCALES = (1, 8192)
"""Of the gradients: a large one as well, as clipping leaves small ones alone."""
_TOLERANCE = 1e-3
"""Relative to a leaf's largest update: rounding is far below, what a split does above."""  # noqa: E501


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
    """
    if layout.shards == 1:
        return
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        shape = tuple(min(n, _LARGEST) for n in leaf.shape)
        # Never narrower than float32, where rounding could pass for a difference.
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.asarray(random.standard_normal(shape), dtype)

    start = jax.tree.map(draw, params)
    gradients = [
        jax.tree.map(lambda leaf, scale=scale: scale * draw(leaf), params)
        for scale in _SCALES
    ]
    small, leaves = layout, jax.tree.leaves(start)
    if layout.shapes != tuple(leaf.shape for leaf in leaves):
        small = Layout.of(start, min(layout.shards, _MOST_SHARDS), split)

    def updates(pieces: tuple[Params, ...], parts: list[tuple[Params, ...]]) -> Any:
        """Each step's updates, a tree per piece."""
        states, made = [optimizer.init(piece) for piece in pieces], []
        for gradient in parts:
            stepped = []
            for piece, state, part in zip(pieces, states, gradient, strict=True):
                extras = {"staleness": jnp.int32(1), "stale_params": piece}
                wanted = {name: extras[name] for name in provide}
                update, state = optimizer.update(part, state, piece, **wanted)
                stepped.append((optax.apply_updates(piece, update), state, update))
            pieces, states, update = zip(*stepped, strict=True)
            made.append(update)
        return made

    def on_one(p: Params, g: list[Params]) -> list[Params]:
        return [update for (update,) in updates((p,), [(one,) for one in g])]

    def on_shards(p: Params, g: list[Params]) -> list[Params]:
        parts = [small.split(one) for one in g]
        return [small.merge(update) for update in updates(small.split(p), parts)]

    try:
        whole = jax.jit(on_one)(start, gradients)
        sharded = jax.jit(on_shards)(start, gradients)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "the optimizer does not run on a shard's part of the tree (leaves that another "  # noqa: E501
            f"shard holds are None there): {error}. Masks and labels must be functions of "  # noqa: E501
            "the tree, not fixed trees; or use shards=1"
        ) from error
    for step, (one, other) in enumerate(zip(whole, sharded, strict=True)):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for name, (a, b) in zip(layout.names, pairs, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            largest = np.abs(a[np.isfinite(a)]).max(initial=0.0)
            if np.allclose(a, b, rtol=0, atol=_TOLERANCE * largest, equal_nan=True):
                continue
            hint = "" if split == "leaf" else 'split="leaf" (whole leaves on a shard), '
            raise ValueError(
                f"the optimizer's result depends on the split over {layout.shards} shards "  # noqa: E501
                f"(of update {step}, params{name} differs by up to "
                f"{np.nanmax(np.abs(a - b)):.3g}; its largest entry is {largest:.3g}). "
                f"Use {hint}shards=1, or per_shard=True to accept a rule that sees each "  # noqa: E501
                "shard alone"
            )
