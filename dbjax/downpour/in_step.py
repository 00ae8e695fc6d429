"""Shards that march in step: the compiled executors then take them for one.

Where every shard handles the same pushes in the same order, and replicas read all of
them at one version, cutting gradients up and putting parameters together is needless
work. The optimizer's state is cut up at the end, by its leaves' paths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dbjax.downpour.plan import Plan
from dbjax.downpour.problem import Problem
from dbjax.server.layout import Layout
from dbjax.typing import Params

_PER_SHARD = ("read", "source", "taken", "write", "stale", "staleness", "start")


def is_in_step(plan: Plan, problem: Problem) -> bool:
    """Whether all shards of this replay are one, as far as values go."""
    if plan.shards == 1 or not plan.direct or problem.per_shard:
        return False
    columns = [np.atleast_2d(getattr(plan, name)) for name in _PER_SHARD]
    if not all((column == column[:, :1]).all() for column in columns):
        return False
    # The whole state must have a place for every leaf of the shards' states.
    whole = jax.eval_shape(problem.optimizer.init, problem.params)
    try:
        made = jax.eval_shape(lambda state: cut_state(problem, state), whole)
    except KeyError:
        return False
    parts = jax.eval_shape(problem.layout.split, problem.params)
    wanted = tuple(jax.eval_shape(problem.optimizer.init, part) for part in parts)
    return bool(jax.tree.structure(made) == jax.tree.structure(wanted)) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True)
    )


def cut_state(problem: Problem, state: Any) -> tuple[Any, ...]:
    """Cut the optimizer's state on the whole tree into the shards' states.

    A leaf whose path ends in a parameter's and that has its shape goes with it; any
    other one, such as a count, is every shard's.
    """
    leaves = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    names = [
        path for path, _ in jax.tree_util.tree_flatten_with_path(problem.params)[0]
    ]
    layout, states = problem.layout, []
    for s, part in enumerate(jax.eval_shape(layout.split, problem.params)):
        template = jax.eval_shape(problem.optimizer.init, part)
        paths, treedef = jax.tree_util.tree_flatten_with_path(template)
        boxes = {box.leaf: box for box in layout.boxes[s]}
        held = []
        for path, _ in paths:
            leaf = leaves[path]
            owners = [
                i for i, name in enumerate(names)
                if path[len(path) - len(name) :] == name
                and leaf.shape == layout.shapes[i]
            ]  # fmt: skip
            # The longest: ['z']['b'] ends in ['b'], too.
            owner = max(owners, key=lambda i: len(names[i]), default=None)
            held.append(leaf if owner is None else boxes[owner].of(leaf))
        states.append(treedef.unflatten(held))
    return tuple(states)


class InStep:
    """A compiled machine for the whole tree, seen as one for its shards."""

    def __init__(
        self, plan: Plan, problem: Problem, make: Callable[[Plan, Problem], Any]
    ) -> None:
        self.plan, self.problem = plan, problem
        one = {name: getattr(plan, name) for name in _PER_SHARD}
        one |= {"version": plan.version, "row": plan.row}
        # Views are cut along the last axis, the shards'.
        narrow = {name: column[..., :1] for name, column in one.items()}
        layout = Layout.of(problem.params, 1)
        self.machine = make(
            dataclasses.replace(plan, **narrow),
            dataclasses.replace(
                problem, layout=layout, split=layout.split, merge=layout.merge
            ),
        )

    @property
    def row(self) -> int:
        """The next row."""
        return self.machine.row

    def run(self, stop: int) -> None:
        """Execute rows up to `stop`."""
        self.machine.run(stop)

    def params(self) -> Params:
        """The whole current parameters, in buffers of their own."""
        return self.machine.params()

    @property
    def not_finite(self) -> list[int]:
        """The Trace's rows, on all shards, of pushes that were rejected."""
        rejected = np.isin(self.plan.row[:, 0], self.machine.not_finite)
        return self.plan.row[rejected].ravel().tolist()

    @property
    def shards(self) -> list[tuple[Params, Any]]:
        """The shards' parameters and optimizer states."""
        ((params, state),) = self.machine.shards
        states = jax.jit(lambda whole: cut_state(self.problem, whole))(state)
        return list(zip(self.problem.split(params), states, strict=True))
