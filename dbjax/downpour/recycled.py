"""The compiled executor for large problems: one fused step a row, in recycled buffers.

A step reads the version that a replica holds and makes the next version in the memory
of one that nobody holds any more, so nothing is allocated and nothing is copied.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.downpour.lasting import is_sound, not_finite_lasts
from dbjax.downpour.plan import Plan
from dbjax.downpour.problem import Problem, copy
from dbjax.loss import all_finite
from dbjax.server.shard import apply_gradients
from dbjax.typing import Params

CHECK_EVERY = 64
"""Rows between looks at whether all gradients were finite."""


class Recycled:
    """Walks a direct plan; see `Exact` for the attributes."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        self.plan, self.problem = plan, problem
        self._lasts = not_finite_lasts(
            problem.optimizer, problem.params, problem.provide
        )
        self._is_sound = jax.jit(is_sound)
        # Iterators cannot be read once more.
        self._begin(guarded=hasattr(problem.data, "start"))

    def _begin(self, guarded: bool) -> None:
        plan, problem = self.plan, self.problem
        self.row, self.guarded = 0, guarded
        self.not_finite: list[int] = []
        self._finite: list[tuple[int, jax.Array]] = []
        parts = problem.split(problem.params)
        self.current = [copy(part) for part in parts]
        init = jax.jit(problem.optimizer.init)
        self.states = [init(part) for part in parts]
        self.pool: list[list[Params]] = [[None] * plan.slots for _ in parts]
        for s, part in enumerate(self.current):
            self.pool[s][plan.start[s]] = problem.publish(part)
        masked = guarded or not bool(plan.taken.all())
        # What was not finite is seen in each gradient, or later in what it left behind.
        self._late = self._lasts and not masked
        self._step = _make_step(problem, masked, looks=not self._late)

    def run(self, stop: int) -> None:
        """Execute rows up to `stop`."""
        plan, problem = self.plan, self.problem
        narrow, wants_stale = problem.version_dtype, "stale_params" in problem.provide
        while self.row < stop:
            row = self.row
            # Steps run behind; nobody must write over a batch until then.
            batch = jax.tree.map(
                _own, problem.batch(int(plan.replica[row]), int(plan.batch[row]))
            )
            read, write, stale = (
                a[row].tolist() for a in (plan.read, plan.write, plan.stale)
            )
            held = tuple(p[slot] for p, slot in zip(self.pool, read, strict=True))
            spare = tuple(
                p[slot] if p[slot] is not None else problem.publish(copy(c))
                for p, slot, c in zip(self.pool, write, self.current, strict=True)
            )
            old = tuple(p[slot] for p, slot in zip(self.pool, stale, strict=True))
            args = (
                held, batch, plan.replica[row], plan.batch[row], plan.staleness[row],
                old if wants_stale else (), plan.taken[row],
            )  # fmt: skip
            new, self.states, published, finite = self._step(
                spare, tuple(self.states), tuple(self.current), args
            )
            self.current = list(new)
            fresh = new if narrow is None else published
            for pool, slot, version in zip(self.pool, write, fresh, strict=True):
                pool[slot] = version
            if not self._late:
                self._finite.append((row, finite))
            self.row += 1
            if self.row % CHECK_EVERY == 0 or self.row == stop:
                self._look()

    def _look(self) -> None:
        bad = [row for row, finite in self._finite if not bool(finite)]
        self._finite = []
        spoilt = self._late and not bool(self._is_sound(self.current, self.states))
        if (bad or spoilt) and not self.guarded:
            stop = self.row
            self._begin(guarded=True)
            self.run(stop)
        else:
            self.not_finite.extend(self.plan.row[bad].ravel().tolist())

    @property
    def shards(self) -> list[tuple[Params, Any]]:
        """The shards' parameters and optimizer states."""
        return list(zip(self.current, self.states, strict=True))

    def params(self) -> Params:
        """The whole current parameters, in buffers of their own."""
        merged = self.problem.merge(tuple(self.current))
        return copy(merged) if self.problem.layout.shards == 1 else merged


Parts: TypeAlias = tuple[Params, ...]


def _make_step(problem: Problem, masked: bool, looks: bool) -> Any:
    layout, narrow = problem.layout, problem.version_dtype

    def step(spare: Parts, states: tuple[Any, ...], current: Parts, args: Any) -> Any:
        held, batch, replica, index, staleness, old, taken = args
        whole = layout.merge(held)
        if narrow is not None:
            whole = _like(whole, layout.merge(current))
        gradients = problem.gradient_fn(whole, batch, replica, index)
        finite = all_finite(gradients) if looks else jnp.bool_(True)
        parts = layout.split(gradients)
        new, news = [], []
        for s, part in enumerate(parts):
            extras: dict[str, Any] = {}
            if "staleness" in problem.provide:
                extras["staleness"] = staleness[s]
            if "stale_params" in problem.provide:
                extras["stale_params"] = _like(old[s], current[s])
            made = apply_gradients(
                problem.optimizer, current[s], states[s], part, extras
            )
            if masked:
                take = finite & taken[s]
                made = jax.tree.map(
                    lambda a, b, take=take: jnp.where(take, a, b),
                    made, (current[s], states[s]),
                )  # fmt: skip
            new.append(made[0])
            news.append(made[1])
        published = () if narrow is None else tuple(
            jax.tree.map(lambda x: x.astype(narrow), part) for part in new
        )  # fmt: skip
        return tuple(new), tuple(news), published, finite

    # With narrow versions nobody else sees the current parameters: written in place.
    donate = (0, 1) if narrow is None else (0, 1, 2)
    return jax.jit(step, donate_argnums=donate, keep_unused=True)


def _own(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _like(tree: Params, template: Params) -> Params:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, template)
