"""Staleness in anybody's optax loop, without a server, a cluster or a Trace's replay.

`stale` hands out old parameters to take the gradient at; `delay_gradients` leaves the
loop alone and applies old gradients. Both keep what they need in the optimizer's state.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.trace import PUSH, TAKEN, Trace
from dbjax.typing import Array, Gradients, Params

Delays: TypeAlias = int | Sequence[int] | Array | Trace


class StaleState(NamedTuple):
    """What `stale` carries; `D` is the largest delay, at least 1.

    Attributes:
        count: int32, updates so far.
        delay: int32, how old the parameters of the coming gradient are.
        history: leaves `[D, ...]`, a ring of the last `D` parameters; those of step
            `t` lie in slot `t % D`.
        inner_state: the inner optimizer's.
    """

    count: jax.Array
    delay: jax.Array
    history: Params
    inner_state: Any


class DelayGradientsState(NamedTuple):
    """What `delay_gradients` carries; `D` is the delay.

    Attributes:
        count: int32, updates so far.
        line: leaves `[D, ...]`, a ring of the last `D` gradients; that of step `t`
            lies in slot `t % D`.
        inner_state: the inner optimizer's.
    """

    count: jax.Array
    line: Gradients
    inner_state: Any


def stale(
    inner: optax.GradientTransformation, delays: Delays
) -> optax.GradientTransformationExtraArgs:
    """Let gradients be taken at the parameters of `delay(t)` steps ago.

    With `w(t)` the parameters before step `t`, `w(t+1) = w(t) + update(gradient at
    w(t - delay(t)))`.

    The loop asks `stale_params(state, params)` where to take the gradient; the inner
    optimizer applies it to the newest parameters, and is handed `staleness=` (int32)
    and `stale_params=` if it takes extra arguments. The first steps are clipped to the
    parameters that exist: step `t` is at most `t` steps stale.

    Args:
        inner: any optax transformation.
        delays: steps, at least 0: one int for all; one per step, an int array
            `[steps]` whose last entry holds from there on; or a Trace, for the
            staleness of its pushes.

    Returns:
        An optax transformation with state `StaleState`; it keeps as many copies of the
        parameters as the largest delay.

    Raises:
        TypeError: `delays` is not made of integers, or is a tracer.
        ValueError: a delay is negative, there are none, or the Trace is not one delay
            per step.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from dbjax.optim import stale, stale_params
        >>> rule, params = stale(optax.sgd(0.25), delays=1), jnp.array(8.0)
        >>> state = rule.init(params)
        >>> for _ in range(3):
        ...     gradient = jax.grad(jnp.square)(stale_params(state, params))
        ...     updates, state = rule.update(gradient, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params)
        4.0
        0.0
        -2.0
    """
    schedule = _schedule(delays)
    slots = max(1, int(schedule.max()))
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> StaleState:
        return StaleState(
            count=jnp.zeros([], jnp.int32),
            delay=jnp.zeros([], jnp.int32),
            history=_ring(params, slots),
            inner_state=_unshared(inner.init(params)),
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, StaleState]:
        if params is None:
            raise ValueError("stale keeps old parameters: call update with params=")
        old = stale_params(state, params)
        extra_args |= {"staleness": state.delay, "stale_params": old}
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        entry = jnp.asarray(schedule)[jnp.minimum(count, len(schedule) - 1)]
        history = _put(state.history, params, state.count % slots)
        return updates, StaleState(
            count, jnp.minimum(entry, count), history, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def stale_params(state: Any, params: Params) -> Params:
    """Give the parameters at which the coming gradient is to be taken.

    Args:
        state: the state of an optimizer with one `stale` in it, at any depth.
        params: the newest parameters.

    Returns:
        The parameters of `delay(t)` steps ago, `params` themselves if that is 0.

    Raises:
        ValueError: `state` holds no `StaleState`, or several.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from dbjax.optim import stale, stale_params
        >>> state = stale(optax.sgd(0.25), delays=1).init(jnp.array(8.0))
        >>> print(stale_params(state, jnp.array(8.0)))  # nothing is older than step 0
        8.0
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, StaleState))
    found = [node for node in nodes if isinstance(node, StaleState)]
    if len(found) != 1:
        raise ValueError(
            f"state holds {len(found)} StaleState: allowed is the state of an "
            "optimizer made with one dbjax.stale"
        )
    count, delay, history, _ = found[0]

    def at(newest: jax.Array, ring: jax.Array) -> jax.Array:
        return jnp.where(delay == 0, newest, ring[(count - delay) % len(ring)])

    return jax.tree.map(at, params, history)


def delay_gradients(
    inner: optax.GradientTransformation, delay: int
) -> optax.GradientTransformationExtraArgs:
    """Apply at step `t` the gradient that was given at step `t - delay`.

    While the line fills, in the first `delay` steps, the inner optimizer rests: its
    state stays and the updates are zero. Parameters and extra arguments (such as
    `value=`) reach it undelayed.

    Args:
        inner: any optax transformation.
        delay: steps, at least 0.

    Returns:
        An optax transformation with state `DelayGradientsState`; it keeps `delay`
        copies of the gradient.

    Raises:
        TypeError: `delay` is not an integer.
        ValueError: `delay` is negative.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from dbjax.optim import delay_gradients
        >>> rule = delay_gradients(optax.sgd(0.5), delay=1)
        >>> state = rule.init(jnp.array(0.0))
        >>> for gradient in (2.0, 4.0, 6.0):
        ...     updates, state = rule.update(jnp.array(gradient), state)
        ...     print(updates)
        0.0
        -1.0
        -2.0
    """
    slots = operator.index(delay)
    if slots < 0:
        raise ValueError(f"delay={delay}: allowed are integers from 0")
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> DelayGradientsState:
        return DelayGradientsState(
            count=jnp.zeros([], jnp.int32),
            line=_ring(jax.tree.map(jnp.zeros_like, params), slots),
            inner_state=_unshared(inner.init(params)),
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, DelayGradientsState]:
        count, line, old_state = state
        due = updates
        if slots:  # an empty ring has no slot to read
            due = jax.tree.map(lambda ring: ring[count % slots], line)
            line = _put(line, updates, count % slots)
        updates, new_state = inner.update(due, old_state, params, **extra_args)
        full = count >= slots
        updates = jax.tree.map(lambda u: jnp.where(full, u, jnp.zeros_like(u)), updates)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(full, new, old), new_state, old_state
        )
        count = jnp.asarray(optax.safe_increment(count))
        return updates, DelayGradientsState(count, line, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _schedule(delays: Delays) -> np.ndarray:
    """Give the delays as int32 `[steps]`, one entry if they are constant."""
    if isinstance(delays, jax.core.Tracer):
        raise TypeError("delays is a tracer: the largest delay must be known")
    if isinstance(delays, Trace):
        delays = _trace_delays(delays)
    schedule = np.atleast_1d(np.asarray(delays))
    if not np.issubdtype(schedule.dtype, np.integer):
        raise TypeError(
            f"delays={delays!r}: allowed are an int, an int array [steps] or a Trace"
        )
    if schedule.ndim != 1 or not schedule.size:
        raise ValueError(
            f"delays has shape {schedule.shape}: allowed is one entry per step"
        )
    if schedule.min() < 0:
        step = int(schedule.argmin())
        raise ValueError(f"delays[{step}]={schedule[step]}: allowed are 0 and more")
    # Nothing is older than its own step, so a large entry early on costs no memory.
    before_last = np.minimum(schedule[:-1], np.arange(len(schedule) - 1))
    return np.append(before_last, schedule[-1:]).astype(np.int32)


def _trace_delays(trace: Trace) -> np.ndarray:
    """Give the staleness of each push, if one delay per step tells the whole run."""
    pushes = trace.kind == PUSH
    if (trace.count[pushes] != 1).any() or (trace.status[pushes] != TAKEN).any():
        raise ValueError(
            "the Trace has pushes that sum several gradients or were not taken, which "
            "no delay per step describes: use dbjax.replay"
        )
    staleness = trace.staleness()
    unknown = (staleness < 0).any(axis=1)
    if unknown.any():
        push = int(unknown.argmax())
        raise ValueError(
            f"push {push} of the Trace did not reach a shard, or its base is not known"
        )
    differs = (staleness != staleness[:, :1]).any(axis=1)
    if differs.any():
        step = int(differs.argmax())
        raise ValueError(
            f"push {step} of the Trace is {staleness[step].tolist()} versions stale on "
            "its shards, which no delay per step describes: use dbjax.replay"
        )
    return staleness[:, 0]


def _ring(tree: Params, slots: int) -> Params:
    """Give every leaf `slots` times, in memory of its own."""

    def repeat(leaf: jax.Array) -> jax.Array:
        return jnp.tile(leaf, (slots, *[1] * jnp.ndim(leaf)))

    return jax.tree.map(repeat, tree)


def _put(ring: Params, tree: Params, slot: jax.Array) -> Params:
    """Put every leaf into its ring at `slot`."""

    def put(slots: jax.Array, leaf: jax.Array) -> jax.Array:
        value = jnp.asarray(leaf, slots.dtype)
        return jax.lax.dynamic_update_index_in_dim(slots, value, slot, 0)

    return jax.tree.map(put, ring, tree)


def _unshared(state: Any) -> Any:
    """Copy the arrays: some optimizers share buffers, which cannot be donated."""

    def copy(leaf: Any) -> Any:
        return jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(copy, state)
