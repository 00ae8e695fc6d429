"""One shard of the parameter server: `handle(state, message) -> state, reply`, pure.

A version is never written to while someone can see it (copy-on-write). The memory of
one that nobody holds any more may be given to `handle` as `spare`: it becomes the next
version. Where that is the newest one itself, it is updated in place.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dbjax.server.messages import Fetch, Fetched, Push, Pushed
from dbjax.typing import Params

PROVIDES = ("staleness", "stale_params")


class ShardState(NamedTuple):
    """A shard's parameters, its own optimizer state, and the pushes it has handled.

    `optimizer_state` is consumed by the next `Push`; `params` is not, unless given back
    as `spare`.
    """

    params: Params
    optimizer_state: Any
    version: int = 0
    incarnation: int = 0


class Shard(NamedTuple):
    """A shard as two pure functions, made by `make_shard`."""

    init: Callable[[Params], ShardState]
    handle: Callable[..., tuple[ShardState, Fetched | Pushed]]


def apply_gradients(
    optimizer: optax.GradientTransformation,
    params: Params,
    optimizer_state: Any,
    gradients: Params,
    extras: dict[str, Any],
) -> tuple[Params, Any]:
    """One optimizer step on one shard: here a gradient becomes a step."""
    updates, optimizer_state = optimizer.update(
        gradients, optimizer_state, params, **extras
    )
    return optax.apply_updates(params, updates), optimizer_state


def make_shard(
    optimizer: optax.GradientTransformation, provide: tuple[str, ...] = ()
) -> Shard:
    """Make the shard's functions for an optimizer.

    Args:
      optimizer: any optax transformation; it runs on the shard's own part of the tree.
      provide: extra arguments its update asks for, among `"staleness"` (int32) and
        `"stale_params"` (the shard's parameters at the version that the push's oldest
        gradient was computed on).

    Returns:
      The shard's `init` and `handle`. `handle(state, Push, spare=None)` consumes
      `state.optimizer_state` and `spare`.

    Raises:
      ValueError: `provide` names something else.
    """
    check_provide(provide)
    step = functools.partial(apply_gradients, optimizer)
    apply = jax.jit(step, donate_argnums=(1,))

    def update_in_place(*args: Any) -> tuple[Params, Any]:
        return step(*args)

    def recycle_spare(spare: Params, *args: Any) -> tuple[Params, Any]:
        return step(*args)

    in_place = jax.jit(update_in_place, donate_argnums=(0, 1))
    recycle = jax.jit(recycle_spare, donate_argnums=(0, 2), keep_unused=True)

    def handle(
        state: ShardState, message: Fetch | Push, spare: Params = None
    ) -> tuple[ShardState, Fetched | Pushed]:
        if isinstance(message, Fetch):
            return state, Fetched(state.params, state.version)
        version = state.version + 1
        if not message.taken:
            return state._replace(version=version), Pushed(version)
        extras: dict[str, Any] = {}
        if "staleness" in provide:
            extras["staleness"] = np.int32(state.version - message.base)
        if "stale_params" in provide:
            extras["stale_params"] = message.stale_params
        args = state.params, state.optimizer_state, message.gradients, extras
        if spare is None:
            params, optimizer_state = apply(*args)
        elif spare is state.params:
            params, optimizer_state = in_place(*args)
        else:
            params, optimizer_state = recycle(spare, *args)
        return state._replace(
            params=params, optimizer_state=optimizer_state, version=version
        ), Pushed(version)

    def init(params: Params) -> ShardState:
        # Unused or not, the parameters say on which device the state is to be.
        return ShardState(params, jax.jit(optimizer.init, keep_unused=True)(params))

    return Shard(init, handle)


def check_provide(provide: tuple[str, ...]) -> None:
    """Raise if `provide` asks for what no shard can give."""
    known = isinstance(provide, tuple | list) and all(n in PROVIDES for n in provide)
    if not known:
        raise ValueError(f"provide must be a tuple among {PROVIDES}, got {provide!r}")
