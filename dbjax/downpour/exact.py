"""The exact executor: walks a plan, calling what live replicas call.

So it reproduces a recorded run bit for bit. It can stop before any row, and its
`leaves` are all it needs to go on from there.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax.downpour.plan import Plan
from dbjax.downpour.problem import Problem, copy, digest
from dbjax.downpour.restarts import Restart
from dbjax.downpour.run import peak_copies
from dbjax.runtime.base import MOST_REJECTED, RejectedTooOften
from dbjax.server.messages import Push
from dbjax.server.shard import ShardState
from dbjax.typing import Params

AHEAD = 2
"""Gradients computed ahead, where they are small, which keeps all cores busy; as far as
no more copies are held than R + 4 for R replicas, or 2 R + 4 where gradients accrue."""
AHEAD_BYTES = 16 << 20


class _Row(NamedTuple):
    """A row of the plan in plain Python: indexing NumPy arrays one by one is slow."""

    compute: bool
    replica: int
    batch: int
    step: int
    life: int
    landed: bool
    into: int
    first: bool
    read: list[int]
    write: list[int]
    source: list[int]


class Arrival(NamedTuple):
    """A push that a shard is about to handle. Its arrays are copied to be kept.

    Attributes:
      row: the Trace's row of the push.
      shard: which shard.
      fresh: the parameters that the shard holds, as a fetch would give them.
      stale: those that the push's oldest gradient was computed on.
      gradients: the accrued gradients.
      optimizer_state: the shard's.
    """

    row: int
    shard: int
    fresh: Params
    stale: Params
    gradients: Params
    optimizer_state: Any


class _Gradient(NamedTuple):
    """A gradient under way, or what went wrong in place of it."""

    row: int
    gradients: Any = None
    finite: Any = None
    error: Exception | None = None


@contextlib.contextmanager
def _named(row: _Row) -> Iterator[None]:
    """Say whose gradient failed."""
    try:
        yield
    except Exception as error:
        error.add_note(f"It was raised for replica {row.replica} at step {row.step}.")
        raise


class Exact:
    """A machine that executes a plan row by row.

    Attributes:
      row: the next row.
      shards: the shards' states.
      digests: `(trace row, digest)` of versions made, where asked for.
      not_finite: the Trace's rows of pushes that were rejected as not finite.
      torn: whether a row is half executed, so that `leaves` would make no sense.
      ahead: how many gradients it may compute ahead.
      interrupted: set it to have KeyboardInterrupt raised when the row is whole.
      watch: called with each `Arrival`, if set.
    """

    def __init__(self, plan: Plan, problem: Problem, digest_every: int = 0) -> None:
        self.plan, self.problem, self.row = plan, problem, 0
        self.digest_every = digest_every
        self.digest_rows: set[int] | None = None
        parts = problem.split(problem.params)
        self.shards = [problem.shard.init(part) for part in map(copy, parts)]
        self.pool: list[list[Params]] = [[None] * plan.slots for _ in self.shards]
        for s, shard in enumerate(self.shards):
            self.pool[s][plan.start[s]] = problem.publish(shard.params)
        self._restarts = {restart.row: restart for restart in plan.restarts}
        # States by the row that made them, and how often a shard goes back to each.
        self._returns = collections.Counter((r.made, r.shard) for r in plan.restarts)
        self._kept: dict[tuple[int, int], ShardState] = {}
        for s in range(len(self.shards)):
            self._keep(-1, s)
        self.accrued: list[Any] = [None] * plan.gradient_slots
        self.finite: list[bool] = [True] * plan.gradient_slots
        self.unpushed: list[int] = [0] * plan.gradient_slots
        self.local: dict[int, tuple[Params, Any]] = {}
        self.lives: dict[int, int] = {}  # of those in `local`
        self.digests: list[tuple[int, int]] = []
        self.not_finite: list[int] = []
        self.in_a_row, self._rejected = 0, -1
        self.torn = self.interrupted = False
        self.watch: Callable[[Arrival], None] | None = None
        last = plan.version.max(axis=0, initial=0)
        self._last = [int(v) for v in last]
        columns = (getattr(plan, name).tolist() for name in _Row._fields)
        self._rows = list(map(_Row, *columns))
        small = sum(problem.layout.nbytes) <= AHEAD_BYTES
        alone = len(self.shards) == 1 and problem.local_optimizer is None
        alone &= problem.placement is None  # partitions keep all cores busy
        replicas = int(plan.trace.header["replicas"])
        room = (1 if plan.direct else 2) * replicas + 4 - peak_copies(plan)
        self.ahead = max(0, min(AHEAD, room)) if small and alone else 0
        self._under_way: collections.deque[_Gradient] = collections.deque()

    def params(self) -> Params:
        """The whole current parameters, in buffers of their own."""
        return self.problem.whole(tuple(shard.params for shard in self.shards))

    def run(self, stop: int) -> None:
        """Execute rows up to `stop`.

        Raises:
          RejectedTooOften: naming the last of too many pushes that were not finite.
        """
        plan = self.plan
        while self.row < stop:
            row = self._rows[self.row]
            self._look_ahead(stop)
            if self.row in self._restarts:
                self._restart(self._restarts[self.row])
            if row.compute:
                self._compute(row)
            self.torn = True
            for s, slot in enumerate(row.source):
                if slot >= 0:
                    self._push(s, slot, row.replica, row.step)
            self.row += 1
            self.torn = False
            if self.interrupted:
                self.interrupted = False
                raise KeyboardInterrupt
            if self._rejected >= 0 and self.in_a_row >= MOST_REJECTED:
                last, self._rejected = self._rejected, -1
                who, when = (c[last] for c in (plan.trace.replica, plan.trace.step))
                raise RejectedTooOften(self.in_a_row, int(who), int(when))

    def _look_ahead(self, stop: int) -> None:
        """Set out on the gradients of coming rows whose versions are there already.

        A gradient does not depend on when it is computed. While one is waited for, the
        next ones keep the other cores busy.
        """
        at = self._under_way[-1].row + 1 if self._under_way else self.row
        while self.ahead and len(self._under_way) <= self.ahead and at < stop:
            row = self._rows[at]
            if row.compute:
                between = self._rows[self.row : at]
                if any(before.write[0] == row.read[0] for before in between):
                    return
                params = self._held(row)
                try:
                    made = _Gradient(at, *self._gradient(row, params))
                except Exception as error:
                    # Raised in its turn: the rows before it are done by then.
                    made = _Gradient(at, error=error)
                self._under_way.append(made)
            at += 1

    def _held(self, row: _Row) -> Params:
        """The parameters that a gradient is computed on."""
        problem = self.problem
        pairs = zip(self.pool, row.read, strict=True)
        return problem.fetch(tuple(slots[slot] for slots, slot in pairs))

    def _gradient(self, row: _Row, params: Params) -> tuple[Any, Any]:
        """A gradient and whether it is finite, neither waited for."""
        with _named(row):
            minibatch = self.problem.batch(row.replica, row.batch)
            return self.problem.compute(params, minibatch, row.replica, row.batch)

    def _compute(self, row: _Row) -> None:
        problem, into = self.problem, row.into
        params: Params = None
        state: Any = None
        if self._under_way and self._under_way[0].row == self.row:
            _, gradients, finite, error = self._under_way.popleft()
            if error is not None:
                raise error
        else:
            if self.lives.get(row.replica) != row.life:
                self.local.pop(row.replica, None)
            if row.replica in self.local and not row.landed:
                params, state = self.local[row.replica]
            else:
                params = self._held(row)
                own, state = self.local.get(row.replica, (None, None))
                if problem.approach is not None and own is not None:
                    params = problem.call(0, problem.approach, own, params)
            gradients, finite = self._gradient(row, params)
        with _named(row):
            finite = bool(finite)
        self.torn = True
        if problem.local_step is not None and problem.local_init is not None:
            if state is None:
                state = problem.call(0, problem.local_init, params)
            if finite:
                step = problem.local_step
                params, state, pushed = problem.call(0, step, params, state, gradients)
                gradients = gradients if pushed is None else pushed
            self.local[row.replica], self.lives[row.replica] = (params, state), row.life
        if row.first:
            self.accrued[into], self.finite[into] = gradients, finite
        else:
            accrued = self.accrued[into]
            self.accrued[into] = problem.call(0, problem.accrue, accrued, gradients)
            self.finite[into] &= finite
        self.unpushed[into] = len(self.shards)

    def _keep(self, row: int, s: int) -> None:
        """Keep a state that the shard goes back to; its next push would consume it."""
        if (row, s) in self._returns:
            shard = self.shards[s]
            state = copy(shard.optimizer_state)
            self._kept[row, s] = shard._replace(optimizer_state=state)

    def _restart(self, restart: Restart) -> None:
        at = restart.made, restart.shard
        shard = self._kept.pop(at)._replace(incarnation=restart.incarnation)
        self.shards[restart.shard] = shard
        self._returns[at] -= 1
        if self._returns[at]:
            self._keep(*at)

    def _push(self, s: int, slot: int, replica: int, step: int) -> None:
        plan, problem, row = self.plan, self.problem, self.row
        if self.unpushed[slot] == len(self.shards):
            self.accrued[slot] = problem.split(self.accrued[slot])
            # In a row over all replicas; counted once a push.
            self.in_a_row = 0 if self.finite[slot] else self.in_a_row + 1
            self._rejected = -1 if self.finite[slot] else int(plan.row[row, s])
        shard, pool, write = self.shards[s], self.pool[s], plan.write[row, s]
        finite, taken = self.finite[slot], bool(plan.taken[row, s])
        if self.watch is not None:
            fresh = problem.publish(shard.params)
            old, sent = pool[plan.stale[row, s]], self.accrued[slot][s]
            at, state = int(plan.row[row, s]), shard.optimizer_state
            self.watch(Arrival(at, s, fresh, old, sent, state))
        stale = None
        if "stale_params" in problem.provide:
            stale = pool[plan.stale[row, s]]
            if problem.version_dtype is not None:
                stale = jax.tree.map(
                    lambda a, b: a.astype(b.dtype), stale, shard.params
                )
        message = Push(
            replica, 0, step, self.accrued[slot][s],
            shard.version - int(plan.staleness[row, s]), finite and taken, stale,
        )  # fmt: skip
        narrow = problem.version_dtype is not None
        # The written slot's version is dead: its memory becomes the new version's.
        spare = None if narrow or not message.taken else pool[write]
        self.shards[s], _ = problem.shard.handle(shard, message, spare=spare)
        if message.taken or narrow:
            pool[write] = problem.publish(self.shards[s].params)
        else:
            pool[write] = copy(shard.params)
            self.shards[s] = self.shards[s]._replace(params=pool[write])
        if not finite:
            self.not_finite.append(int(plan.row[row, s]))
        at = int(plan.row[row, s])
        if self._is_digested(at, s):
            self.digests.append((at, digest(self.shards[s].params)))
        self._keep(row, s)
        self.unpushed[slot] -= 1
        # A restored shard may handle a push that it has lost once more.
        if not self.unpushed[slot] and not self._returns:
            self.accrued[slot] = None

    def _is_digested(self, row: int, s: int) -> bool:
        """Whether the version just made is checksummed."""
        if self.digest_rows is not None:
            return row in self.digest_rows
        version, every = self.shards[s].version, self.digest_every
        return bool(every) and (version % every == 0 or version == self._last[s])

    def leaves(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What a checkpoint holds: arrays by name, and a JSON-able note.

        Raises:
          ValueError: the Trace holds restored shards, as no emulated run does.
        """
        if self.plan.restarts:
            raise ValueError("a replay of restored shards cannot be saved half done")
        arrays: dict[str, np.ndarray] = {}

        def pack(name: str, tree: Any) -> None:
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                arrays[f"{name}/{i}"] = np.asarray(leaf)

        held = []
        for s, (shard, slots) in enumerate(zip(self.shards, self.pool, strict=True)):
            pack(f"shard{s}/params", shard.params)
            pack(f"shard{s}/optimizer", shard.optimizer_state)
            kinds = [_kind(version, shard.params) for version in slots]
            held.append(kinds)
            for slot, kind in enumerate(kinds):
                if kind == "own":
                    pack(f"shard{s}/slot{slot}", slots[slot])
        for slot, tree in enumerate(self.accrued):
            pack(f"accrued{slot}", tree)
        for replica, local in self.local.items():
            pack(f"local{replica}", local)
        note = {
            "row": self.row,
            "versions": [shard.version for shard in self.shards],
            "held": held,
            "local": sorted(self.local),
            "lives": [self.lives[replica] for replica in sorted(self.local)],
            "accrued": [tree is not None for tree in self.accrued],
            "finite": self.finite,
            "unpushed": self.unpushed,
            "digests": self.digests,
            "not_finite": self.not_finite,
            "in_a_row": self.in_a_row,
        }
        return arrays, note

    def restore(self, arrays: dict[str, np.ndarray], note: dict[str, Any]) -> None:
        """Go back to where `leaves` was called."""

        def unpack(name: str, template: Any) -> Any:
            leaves, treedef = jax.tree.flatten(template)
            saved = [arrays[f"{name}/{i}"] for i in range(len(leaves))]
            return treedef.unflatten(map(self.problem.like, leaves, saved))

        whole = self.problem.params
        for s, old in enumerate(self.shards):
            shard = ShardState(
                unpack(f"shard{s}/params", old.params),
                unpack(f"shard{s}/optimizer", old.optimizer_state),
                int(note["versions"][s]),
            )
            self.shards[s] = shard
            for slot, kind in enumerate(note["held"][s]):
                own = kind == "own"
                self.pool[s][slot] = (
                    unpack(f"shard{s}/slot{slot}", shard.params) if own
                    else shard.params if kind == "current" else None
                )  # fmt: skip
        self.unpushed = [int(n) for n in note["unpushed"]]
        for slot, there in enumerate(note["accrued"]):
            split = self.unpushed[slot] < len(self.shards)
            template = self.problem.split(whole) if split else whole
            self.accrued[slot] = unpack(f"accrued{slot}", template) if there else None
        if self.problem.local_init is not None:
            template = (whole, self.problem.call(0, self.problem.local_init, whole))
            self.local = {r: unpack(f"local{r}", template) for r in note["local"]}
            self.lives = dict(zip(note["local"], note["lives"], strict=True))
        self.row = int(note["row"])
        self.finite = [bool(x) for x in note["finite"]]
        self.digests = [(int(a), int(b)) for a, b in note["digests"]]
        self.not_finite = [int(x) for x in note["not_finite"]]
        # Who goes on after a run that came apart has seen to it: it is counted anew.
        self.in_a_row = int(note["in_a_row"]) % MOST_REJECTED


def _kind(version: Params, current: Params) -> str:
    return "none" if version is None else "current" if version is current else "own"
