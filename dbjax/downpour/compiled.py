"""The compiled executor for small problems: a plan's rows in one XLA loop.

Versions lie in a ring, one array with a leading axis of slots per leaf; the plan says
which slot a gradient reads and which one a push writes. Letters: `K` rows in a chunk,
`S` shards, `G` gradient slots.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dbjax.data import stack
from dbjax.downpour.plan import Plan
from dbjax.downpour.problem import Problem, copy
from dbjax.loss import all_finite, shapes_of
from dbjax.server.shard import apply_gradients
from dbjax.typing import Params

CHUNK_BYTES = 32 << 20
"""Minibatches are stacked up to about this much at a time."""
MOST_ROWS = 512


class LoopState(NamedTuple):
    """What the loop carries; consumed by each chunk."""

    params: tuple[Params, ...]
    optimizer_state: tuple[Any, ...]
    ring: tuple[Params, ...]
    accrued: tuple[Params, ...]
    finite: jax.Array
    good: jax.Array


class Rows(NamedTuple):
    """A chunk of the plan, `[K]` or `[K, S]` each, and its minibatches `[K, ...]`."""

    compute: Any
    replica: Any
    index: Any
    into: Any
    first: Any
    read: Any
    source: Any
    taken: Any
    write: Any
    stale: Any
    staleness: Any
    batch: Any


class Kind(NamedTuple):
    """What is known of a plan at compile time.

    `guarded` rows check each gradient before it is applied. Unguarded ones only note in
    `good` whether all were finite, which is cheaper; a run that meets one that was not
    is run again, guarded.
    """

    direct: bool
    dropped: bool
    guarded: bool


def chunk_rows(plan: Plan, problem: Problem) -> int:
    """How many rows a chunk has."""
    example = problem.batch(0, 0)
    nbytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(example))
    return int(max(1, min(MOST_ROWS, CHUNK_BYTES // max(nbytes, 1), len(plan))))


def take_rows(plan: Plan, problem: Problem, begin: int, end: int, size: int) -> Rows:
    """Cut rows `begin:end` out of a plan, filled up to `size` with its last one."""
    rows = np.minimum(np.arange(begin, begin + size), end - 1)
    # Where a row computes nothing, the newest minibatch again: iterators only go on.
    newest = np.where(plan.compute[rows], rows, -1)
    newest[0] = begin - plan.compute[begin::-1].argmax()
    newest = np.maximum.accumulate(newest)
    batch = stack(problem.data, plan.replica[newest], plan.batch[newest])
    one = jax.tree.map(lambda x: x[0], batch)
    if shapes_of(one) != problem.batch_spec:
        raise ValueError(
            f"minibatches from row {begin} on have other shapes or dtypes than the "
            f"first one: {shapes_of(one)[1:]}, not {problem.batch_spec[1:]}"
        )
    names = (
        "compute", "replica", "batch", "into", "first", "read", "source", "taken",
        "write", "stale", "staleness",
    )  # fmt: skip
    columns = [getattr(plan, name)[rows] for name in names]
    narrow = [c.astype(np.int32) if c.dtype == np.int64 else c for c in columns]
    made = Rows(*narrow, batch=batch)
    # What no push makes goes to a slot that nobody reads.
    return made._replace(write=np.where(made.write < 0, plan.slots, made.write))


def start_state(
    plan: Plan, problem: Problem, initial: Params, states: Any
) -> LoopState:
    """The loop's state before the first row; `initial` is copied."""
    slots, depth = plan.slots + (not plan.direct), plan.gradient_slots
    parts, ring, accrued = _lay_out(
        problem.split(initial), slots, tuple(plan.start.tolist()),
        0 if plan.direct else depth,
    )  # fmt: skip
    finite = jnp.ones(1 if plan.direct else depth, bool)
    return LoopState(parts, states, ring, accrued, finite, jnp.bool_(True))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _lay_out(
    parts: tuple[Params, ...], slots: int, start: tuple[int, ...], depth: int
) -> tuple[Any, Any, Any]:
    """Copies of the shards' parameters, and the room for versions and gradients."""

    def room(size: int, tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), tree)

    rings = tuple(
        _write(room(slots, part), part, slot)
        for part, slot in zip(parts, start, strict=True)
    )
    # Without a copy what comes in would go out as it is, and be donated.
    copies = tuple(map(copy, parts))
    return copies, rings, tuple(room(depth, part) for part in parts)


def make_loop(
    problem: Problem, kind: Kind, optimizer_fn: Callable[[Any], Any]
) -> Callable[..., tuple[LoopState, jax.Array]]:
    """Make `loop(state, rows, n, hyper) -> state, refused [K, S]`, pure.

    Args:
      problem: gradient, layout, provided arguments.
      kind: which parts of the general loop this plan needs.
      optimizer_fn: the optimizer, from (possibly traced) hyperparameters.

    Returns:
      The loop over the first `n` rows of a chunk.
    """
    layout = problem.layout
    masked = kind.guarded or kind.dropped or not kind.direct

    def gradient(state: LoopState, x: Rows) -> tuple[tuple[Params, ...], jax.Array]:
        held = tuple(_slot(ring, x.read[s]) for s, ring in enumerate(state.ring))
        gradients = problem.gradient_fn(layout.merge(held), x.batch, x.replica, x.index)
        return layout.split(gradients), all_finite(gradients)

    def accrue(state: LoopState, x: Rows) -> tuple[LoopState, Any]:
        nothing = jax.tree.map(jnp.zeros_like, state.params), jnp.bool_(True)
        parts, finite = lax.cond(x.compute, lambda: gradient(state, x), lambda: nothing)

        def add(slots: jax.Array, more: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(slots, x.into, 0, keepdims=False)
            new = jnp.where(x.first, more, old + more)
            new = jnp.where(x.compute, new, old)
            return lax.dynamic_update_index_in_dim(slots, new, x.into, 0)

        accrued = jax.tree.map(add, state.accrued, parts)
        known = jnp.where(x.first, True, state.finite[x.into]) & finite
        known = jnp.where(x.compute, known, state.finite[x.into])
        state = state._replace(
            accrued=accrued, finite=state.finite.at[x.into].set(known)
        )
        source = [jnp.maximum(x.source[s], 0) for s in range(layout.shards)]
        parts = tuple(_slot(a, source[s]) for s, a in enumerate(state.accrued))
        return state, (parts, [state.finite[k] for k in source], finite)

    def body(x: Rows, state: LoopState, hyper: Any) -> tuple[LoopState, jax.Array]:
        optimizer = optimizer_fn(hyper)
        if kind.direct:
            parts, finite = gradient(state, x)
            goods = [finite] * layout.shards
        else:
            state, (parts, goods, finite) = accrue(state, x)
        params, states, rings, refused = [], [], [], []
        for s, ring in enumerate(state.ring):
            extras: dict[str, Any] = {}
            if "staleness" in problem.provide:
                extras["staleness"] = x.staleness[s]
            if "stale_params" in problem.provide:
                extras["stale_params"] = _slot(ring, x.stale[s])
            old = state.params[s], state.optimizer_state[s]
            new = apply_gradients(optimizer, *old[:1], old[1], parts[s], extras)
            if masked:
                take = x.taken[s] & goods[s] & (x.source[s] >= 0)
                new = jax.tree.map(functools.partial(jnp.where, take), new, old)
            refused.append((x.source[s] >= 0) & ~goods[s])
            params.append(new[0])
            states.append(new[1])
            rings.append(_write(ring, new[0], x.write[s]))
        state = state._replace(
            params=tuple(params),
            optimizer_state=tuple(states),
            ring=tuple(rings),
            good=state.good & finite,
        )
        return state, jnp.stack(refused)

    def loop(
        state: LoopState, rows: Rows, n: Any, hyper: Any
    ) -> tuple[LoopState, jax.Array]:
        def step(i: Any, carry: Any) -> Any:
            state, seen = carry
            x = jax.tree.map(
                lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), rows
            )
            state, refused = body(x, state, hyper)
            return state, lax.dynamic_update_index_in_dim(seen, refused, i, 0)

        return lax.fori_loop(0, n, step, (state, jnp.zeros(rows.source.shape, bool)))

    return loop


def _slot(ring: Params, slot: Any) -> Params:
    return jax.tree.map(
        lambda slots: lax.dynamic_index_in_dim(slots, slot, 0, keepdims=False), ring
    )


def _write(ring: Params, value: Params, slot: Any) -> Params:
    return jax.tree.map(
        lambda slots, new: lax.dynamic_update_index_in_dim(slots, new, slot, 0),
        ring, value,
    )  # fmt: skip


class Loop:
    """Walks a plan in chunks, like `Exact` row by row; see there for the attributes."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        self.plan, self.problem, self.row = plan, problem, 0
        self.dropped = not bool(plan.taken.all())
        self.size = chunk_rows(plan, problem)
        # Iterators cannot be read once more.
        self._begin(guarded=not plan.direct or hasattr(problem.data, "start"))

    def _begin(self, guarded: bool) -> None:
        problem, plan = self.problem, self.plan
        self.row, self.guarded = 0, guarded
        self.not_finite: list[int] = []
        kind = Kind(plan.direct, self.dropped, guarded)
        loop = make_loop(problem, kind, lambda _: problem.optimizer)
        self._loop = jax.jit(loop, donate_argnums=(0,))
        init = jax.jit(problem.optimizer.init)
        states = tuple(init(part) for part in problem.split(problem.params))
        self.state = start_state(plan, problem, problem.params, states)

    def run(self, stop: int) -> None:
        """Execute rows up to `stop`."""
        while self.row < stop:
            end = min(self.row + self.size, stop)
            rows = take_rows(self.plan, self.problem, self.row, end, self.size)
            self.state, refused = self._loop(self.state, rows, end - self.row, ())
            if self.guarded:
                made = self.plan.row[self.row : end]
                self.not_finite.extend(made[np.asarray(refused)[: len(made)]].tolist())
            self.row = end
        if not self.guarded and not bool(self.state.good):
            # A gradient was not finite, and has been applied: once more, with care.
            self._begin(guarded=True)
            self.run(stop)

    @property
    def shards(self) -> list[tuple[Params, Any]]:
        """The shards' parameters and optimizer states."""
        return list(zip(self.state.params, self.state.optimizer_state, strict=True))

    def params(self) -> Params:
        """The whole current parameters, in buffers of their own."""
        merged = self.problem.merge(self.state.params)
        return copy(merged) if self.problem.layout.shards == 1 else merged
