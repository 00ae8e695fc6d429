"""Staleness in anybody's optax loop, without a server, a cluster or a Trace's replay.

`stale` hands out old parameters to take the gradient at; `delay_gradients` leaves the
loop alone and applies old gradients. Both keep what they need in the optimizer's state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.optim.delays import Delays, LeafDelays, read_delays
from dbjax.typing import Gradients, Params


class StaleState(NamedTuple):
    """What `stale` carries; `D` is a leaf's largest delay.

    Attributes:
        count: int32, updates so far.
        delay: int32, how old the parameters of the coming gradient are; one for each
            leaf where leaves have delays of their own.
        history: leaves `[D, ...]`, a ring of the last `D` versions of the leaf; that of
            step `t` lies in slot `t % D`.
        inner_state: the inner optimizer's.
    """

    count: jax.Array
    delay: Any
    history: Params
    inner_state: Any


class DelayGradientsState(NamedTuple):
    """What `delay_gradients` carries; `D` is the largest delay.

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

    Leaves may have delays of their own, as the stages of a pipeline have. Then
    `staleness=` is a tree like the parameters.

    Args:
        inner: any optax transformation.
        delays: steps, at least 0: one int for all; one per step, an int array
            `[steps]` or a list of integers, whose last entry holds from there on; or a
            Trace, for the staleness of its pushes. For leaves with delays of their own,
            a prefix of the parameters' tree that holds any of these, or a function from
            a leaf's path, such as `layers/0/kernel`, to its delay: see
            `dbjax.schedules`.

    Returns:
        An optax transformation with state `StaleState`; it keeps as many copies of each
        leaf as its largest delay.

    Raises:
        TypeError: `delays` is not made of integers, or is a tracer.
        ValueError: a delay is negative, there are none, or the Trace is not one delay
            per step; from `init` if `delays` does not fit the parameters.

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

        A pipeline of two stages; the second one's is 0 late:

        >>> rule = stale(optax.sgd(0.25), {"first": 1, "second": 0})
        >>> state = rule.init({"first": jnp.ones(3), "second": jnp.ones(3)})
        >>> jax.tree.map(jnp.shape, state.history)
        {'first': (1, 3), 'second': (0, 3)}
    """
    given = read_delays(delays)
    inner = optax.with_extra_args_support(inner)

    def due(count: jax.Array, params: Params) -> Any:
        """How old the parameters of the coming gradient are."""

        def one(schedule: np.ndarray) -> jax.Array:
            return jnp.minimum(_entry(schedule, count), count)

        if given.shared is not None:
            return one(given.shared)
        return jax.tree.structure(params).unflatten(map(one, given.of(params)))

    def init(params: Params) -> StaleState:
        count = jnp.zeros([], jnp.int32)
        return StaleState(
            count=count,
            delay=_unshared(due(count, params)),
            history=_rings(params, given),
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
        history = _put(state.history, params, state.count)
        return updates, StaleState(count, due(count, params), history, inner_state)

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

    def at(newest: jax.Array, ring: jax.Array, delay: jax.Array) -> jax.Array:
        return _ago(ring, newest, count, delay)

    return jax.tree.map(at, params, history, jax.tree.broadcast(delay, params))


def delay_gradients(
    inner: optax.GradientTransformation, delay: Delays
) -> optax.GradientTransformationExtraArgs:
    """Apply at step `t` the gradient that was given at step `t - delay`.

    While the line fills, in the first `delay` steps, the inner optimizer rests: its
    state stays and the updates are zero. Parameters and extra arguments (such as
    `value=`) reach it undelayed.

    Leaves may have delays of their own. Those of one delay then have an inner optimizer
    of their own, as the stages of a pipeline have, and begin when their line is full.
    What couples leaves, such as clipping by the global norm, goes before this, in an
    `optax.chain`.

    Args:
        inner: any optax transformation.
        delay: what `dbjax.stale` takes. An array is taken at its word: step `t` applies
            the gradient of step `t - delay[t]`, which may be applied twice or never,
            and rests where there is none yet.

    Returns:
        An optax transformation with state `DelayGradientsState`, or a tuple of them by
        rising delay where leaves have delays of their own; it keeps as many copies of
        a leaf's gradient as its largest delay.

    Raises:
        TypeError: `delay` is not made of integers, or is a tracer.
        ValueError: a delay is negative, there are none, or they do not fit the
            parameters.

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
    given = read_delays(delay, "delay")
    inner = optax.with_extra_args_support(inner)
    if given.shared is not None:
        return _in_line(inner, given)
    return _by_delay(inner, given)


def _in_line(
    inner: optax.GradientTransformationExtraArgs, given: LeafDelays
) -> optax.GradientTransformationExtraArgs:
    """One line for gradients of one delay."""
    schedule = np.asarray(given.shared)

    def init(params: Params) -> DelayGradientsState:
        return DelayGradientsState(
            count=jnp.zeros([], jnp.int32),
            line=_rings(jax.tree.map(jnp.zeros_like, params), given),
            inner_state=_unshared(inner.init(params)),
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, DelayGradientsState]:
        count, line, old_state = state
        delay = _entry(schedule, count)
        due = jax.tree.map(lambda ring, g: _ago(ring, g, count, delay), line, updates)
        line = _put(line, updates, count)
        updates, new_state = inner.update(due, old_state, params, **extra_args)
        there = count >= delay
        updates = jax.tree.map(
            lambda u: jnp.where(there, u, jnp.zeros_like(u)), updates
        )
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(there, new, old), new_state, old_state
        )
        count = jnp.asarray(optax.safe_increment(count))
        return updates, DelayGradientsState(count, line, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_delay(
    inner: optax.GradientTransformationExtraArgs, given: LeafDelays
) -> optax.GradientTransformationExtraArgs:
    """A line, and an inner optimizer, for each set of leaves of the same delay."""

    def groups(tree: Params) -> tuple[list[Any], list[int]]:
        """The rules by rising delay, and which of them each leaf has."""
        keys = [tuple(schedule.tolist()) for schedule in given.of(tree)]
        order = sorted(set(keys), key=lambda key: (max(key), key))
        rules = [_in_line(inner, read_delays(np.array(key, np.int32))) for key in order]
        return rules, list(map(order.index, keys))

    def part(tree: Any, group: int, of: list[int], structure: Any) -> Any:
        """The leaves of a group; the others are None, which JAX does not see."""
        if jax.tree.structure(tree) != structure:
            return tree  # an extra argument such as a value
        leaves = zip(jax.tree.leaves(tree), of, strict=True)
        return structure.unflatten([x if g == group else None for x, g in leaves])

    def init(params: Params) -> tuple[DelayGradientsState, ...]:
        (rules, of), structure = groups(params), jax.tree.structure(params)
        return tuple(
            rule.init(part(params, group, of, structure))
            for group, rule in enumerate(rules)
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, tuple[DelayGradientsState, ...]]:
        (rules, of), structure = groups(updates), jax.tree.structure(updates)
        states, made = [], []
        for group, rule in enumerate(rules):
            mine = functools.partial(part, group=group, of=of, structure=structure)
            extra = {name: mine(value) for name, value in extra_args.items()}
            new, new_state = rule.update(
                mine(updates), state[group], mine(params), **extra
            )
            states.append(new_state)
            made.append(iter(jax.tree.leaves(new)))
        return structure.unflatten([next(made[group]) for group in of]), tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _entry(schedule: np.ndarray, count: jax.Array) -> Any:
    """The delay of step `count`; one that is constant is known beforehand."""
    if len(schedule) == 1:
        return schedule[0]
    return jnp.asarray(schedule)[jnp.minimum(count, len(schedule) - 1)]


def _ago(ring: jax.Array, newest: jax.Array, count: jax.Array, delay: Any) -> jax.Array:
    """What was put into the ring `delay` steps ago; the newest one is not in it yet."""
    if not len(ring):  # an empty ring has no slot to read
        return newest
    return jnp.where(delay == 0, newest, ring[(count - delay) % len(ring)])


def _rings(tree: Params, given: LeafDelays) -> Params:
    """Give every leaf as often as its own largest delay asks, in memory of its own."""

    def repeat(leaf: jax.Array, schedule: np.ndarray) -> jax.Array:
        # Nothing is older than its own step: a large entry early on costs no memory.
        early = np.minimum(schedule[:-1], np.arange(len(schedule) - 1))
        slots = max(early.max(initial=0), schedule[-1])
        return jnp.tile(leaf, (slots, *[1] * jnp.ndim(leaf)))

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(repeat, leaves, given.of(tree)))


def _put(ring: Params, tree: Params, count: jax.Array) -> Params:
    """Put every leaf into its ring, where it stays for as many steps as there are."""

    def put(slots: jax.Array, leaf: jax.Array) -> jax.Array:
        if not len(slots):
            return slots
        value, slot = jnp.asarray(leaf, slots.dtype), count % len(slots)
        return jax.lax.dynamic_update_index_in_dim(slots, value, slot, 0)

    return jax.tree.map(put, ring, tree)


def _unshared(state: Any) -> Any:
    """Copy the arrays: some optimizers share buffers, which cannot be donated."""

    def copy(leaf: Any) -> Any:
        return jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(copy, state)
