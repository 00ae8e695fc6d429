"""From a Trace to a schedule: which gradient when, on which stored versions.

Replay, exact or compiled, is a walk over the plan's rows. Letters: `N` rows, `S`
shards. In a row at most one gradient is computed and at most one push is handled per
shard.

Two liberties leave every value as it was. A gradient depends on its batch and on the
versions its replica holds, not on when it is computed; with `n_push = 1` it is computed
just before its push, so that no gradient waits in memory. And versions live in
**slots**, allotted like registers: a slot is used again when nobody will look at its
version.
"""

import dataclasses
from typing import Any

import numpy as np

from dbjax.downpour.restarts import Restart, number_states
from dbjax.trace import COMPUTE, DROPPED, FETCH, PUSH, RESTART, Trace, history


@dataclasses.dataclass(frozen=True)
class Plan:
    """The schedule.

    Attributes:
      compute: `[N]` whether the row computes a gradient.
      replica, batch, step: `[N]` whose, on which of its minibatches, with which ticket.
      life: `[N]` how often its replica has begun again before: what it keeps for its
        local steps is gone then.
      landed: `[N]` whether a fetch landed at the replica since its gradient before.
      into, first: `[N]` the slot the gradient is added to, and whether it is the first.
      read: `[N, S]` the slots of the versions it is computed on.
      source: `[N, S]` the slot of the accrued gradients that are pushed, -1 if none.
      taken: `[N, S]` False where the protocol drops the push.
      write: `[N, S]` the slot of the version that the push makes, -1 if none.
      stale, staleness: `[N, S]` the slot of the version the push's oldest gradient was
        computed on, and how many versions ago that is.
      version, row: `[N, S]` the version made, and the Trace's row of the push (-1:
        none).
      due: `[N]` the Trace's row by which the row is to be executed: that of its first
        push, or of the minibatch if it only accrues.
      slots, gradient_slots: how many of each are ever needed.
      start: `[S]` the slots of version 0.
      direct: whether every row computes a gradient and pushes just that to all shards.
      steps: minibatches computed, pushed or not.
      trace: the Trace itself.
      restarts: restored shards, in order.
    """

    compute: np.ndarray
    replica: np.ndarray
    batch: np.ndarray
    step: np.ndarray
    life: np.ndarray
    landed: np.ndarray
    into: np.ndarray
    first: np.ndarray
    read: np.ndarray
    source: np.ndarray
    taken: np.ndarray
    write: np.ndarray
    stale: np.ndarray
    staleness: np.ndarray
    version: np.ndarray
    row: np.ndarray
    due: np.ndarray
    slots: int
    gradient_slots: int
    start: np.ndarray
    direct: bool
    steps: int
    trace: Trace
    restarts: tuple[Restart, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.compute)

    @property
    def shards(self) -> int:
        """How many shards."""
        return self.read.shape[1]


class _Gradients:
    """The Trace's gradients that are pushed, in the order of their COMPUTE rows."""

    def __init__(self, trace: Trace, shards: int) -> None:
        kind, replica, shard = trace.kind, trace.replica, trace.shard
        rows = np.flatnonzero(kind == COMPUTE)
        self.rows, self.replica = rows, replica[rows]
        self.batch, self.step = trace.batch[rows], trace.step[rows]
        pushes = np.flatnonzero(kind == PUSH)
        # A push holds its replica's `count` newest gradients up to the ticket in
        # `step`.
        by_replica = np.lexsort((rows, self.replica))
        rank = np.empty_like(by_replica)
        rank[by_replica] = np.arange(len(rows))
        by_step = np.argsort(self.step, kind="stable")
        found = np.searchsorted(self.step[by_step], trace.step[pushes])
        if np.any(found == len(rows)) or np.any(
            self.step[by_step[found]] != trace.step[pushes]
        ):
            raise ValueError("the Trace has a PUSH of a step that no COMPUTE row has")
        self.push_rows, self.newest = pushes, by_step[found]
        self.count = trace.count[pushes].astype(np.int64)
        self.by_replica, self.rank = by_replica, rank
        first_row = np.full(len(rows), np.iinfo(np.int64).max)
        for offset in range(int(self.count.max(initial=1))):
            member = offset < self.count
            index = by_replica[rank[self.newest[member]] - offset]
            np.minimum.at(first_row, index, pushes[member])
        self.first_push = first_row
        self.versions = np.zeros((len(rows), shards), np.int64)
        fetched = np.zeros(len(rows), bool)
        for s in range(shards):
            fetch = np.flatnonzero((kind == FETCH) & (shard == s))
            self.versions[:, s], before = _in_force(
                trace, fetch, rows, rank, by_replica
            )
            fetched |= before
        self.landed = fetched
        # How many RESTART rows of the replica stand before, by a search among its own.
        again = np.flatnonzero((kind == RESTART) & (shard < 0))
        width = len(trace) + 1
        begun = np.sort(replica[again].astype(np.int64) * width + again)
        first = self.replica.astype(np.int64) * width
        self.life = np.searchsorted(begun, first + rows) - np.searchsorted(begun, first)


def _in_force(
    trace: Trace,
    fetch: np.ndarray,
    rows: np.ndarray,
    rank: np.ndarray,
    order: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The newest fetched version before each COMPUTE row, and whether it is news."""
    both = np.concatenate([fetch, rows])
    is_fetch = np.arange(len(both)) < len(fetch)
    by = np.lexsort((both, trace.replica[both]))
    last = np.maximum.accumulate(np.where(is_fetch[by], np.arange(len(by)), -1))
    at = np.empty(len(by), np.int64)
    at[by] = last
    newest = at[len(fetch) :]
    source = both[by[np.maximum(newest, 0)]]
    known = (newest >= 0) & (trace.replica[source] == trace.replica[rows])
    if not known.all():
        row = int(rows[np.argmin(known)])
        raise ValueError(
            f"row {row}: replica {trace.replica[row]} computes before it has fetched"
        )
    news = np.ones(len(rows), bool)
    news[order[1:]] = newest[order[1:]] != newest[order[:-1]]
    return trace.version[source], news


def _allot(born: np.ndarray, dead: np.ndarray) -> tuple[np.ndarray, int]:
    """Give things that live from row `born` through row `dead` slots, few as can be."""
    slots, free, count, gone = [0] * len(born), [], 0, 0
    by_death = np.argsort(dead, kind="stable").tolist()
    deaths = dead[by_death].tolist()
    for index, row in enumerate(born.tolist()):
        while deaths[gone] < row:
            free.append(slots[by_death[gone]])
            gone += 1
        if free:
            slots[index] = free.pop()
        else:
            slots[index] = count
            count += 1
    return np.asarray(slots, np.int32), count


def make_plan(trace: Trace) -> Plan:
    """Schedule the replay of a Trace.

    Args:
      trace: a causal Trace (`trace.validate()` passes).

    Returns:
      The plan.

    Raises:
      ValueError: the Trace names states that it does not make, or is no Downpour run's.
    """
    if trace.header.get("algorithm") == "sandblaster":
        raise ValueError(
            "the Trace is of sandblaster.minimize, where values decide what comes "
            "next: it is for time and accounting; call minimize again instead"
        )
    shards = int(trace.header["shards"])
    restored = bool(np.any(trace.incarnation != 0))
    states = number_states(trace) if restored else trace
    gradients = _Gradients(states, shards)
    pushing = len(gradients.push_rows) > 0
    if pushing and not restored and _is_aligned(states, gradients, shards):
        columns, direct = _aligned(states, gradients, shards), True
    else:
        columns, direct = _general(states, gradients, shards), False
    plan = _with_slots(states, columns, shards, direct)
    return _with_names(plan, trace) if restored else plan


def _is_aligned(trace: Trace, gradients: _Gradients, shards: int) -> bool:
    """Whether every push holds one gradient and all shards handle them in one order."""
    n = len(gradients.push_rows)
    if n % shards or not np.all(gradients.count == 1):
        return False
    if shards == 1:
        return True
    order = np.argsort(trace.shard[gradients.push_rows], kind="stable")
    newest = gradients.newest[order].reshape(shards, -1)
    counts = np.bincount(trace.shard[gradients.push_rows], minlength=shards)
    return bool(np.all(counts == n // shards) and np.all(newest == newest[0]))


def _aligned(trace: Trace, g: _Gradients, shards: int) -> dict[str, Any]:
    order = np.argsort(trace.shard[g.push_rows], kind="stable")
    row = g.push_rows[order].reshape(shards, -1).T
    gradient = g.newest[order].reshape(shards, -1)[0]
    n = len(gradient)
    return {
        "gradient": gradient,
        "first": np.ones(n, bool),
        "into": np.zeros(n, np.int32),
        "source": np.zeros((n, shards), np.int32),
        "row": row,
        "due": row.min(axis=1),
        "versions": g.versions[gradient],
        "landed": g.landed[gradient],
        "all": g,
        "restarting": np.zeros(0, np.int64),
        "restarts": np.zeros(0, np.int64),
    }


def _general(trace: Trace, g: _Gradients, shards: int) -> dict[str, Any]:
    """Walk the gradients and pushes in the Trace's order, a row at a time."""
    eager = bool(np.any(g.count > 1))
    pushed = np.flatnonzero(g.first_push < np.iinfo(np.int64).max)
    when = g.rows[pushed] if eager else g.first_push[pushed]
    # A push is named by its newest gradient; its accrued gradients share one slot.
    name = np.full(len(g.rows), -1)
    for offset in range(int(g.count.max(initial=1))):
        member = offset < g.count
        name[g.by_replica[g.rank[g.newest[member]] - offset]] = g.newest[member]
    push_shard = trace.shard[g.push_rows]
    restarts = history.restorations(trace)
    at = np.concatenate([2 * when, 2 * g.push_rows + 1, 2 * restarts])
    what = np.concatenate(
        [pushed, np.arange(len(g.push_rows)), np.full(len(restarts), -1)]
    )
    is_push = (len(pushed) <= np.arange(len(at))) & (what >= 0)
    gradient: list[int] = []
    born: dict[int, int] = {}
    died: dict[int, int] = {}
    place = np.full(len(g.push_rows), -1)
    busy = [-1] * shards  # the last row in which this shard handled a push
    restarting: list[int] = []  # the rows that begin with a restored shard
    by = np.lexsort((what, at))
    for push, index in zip(is_push[by].tolist(), what[by].tolist(), strict=True):
        if index < 0:
            restarting.append(len(gradient))
            gradient.append(-1)
            continue
        if not push:
            gradient.append(index)
            born.setdefault(int(name[index]), len(gradient) - 1)
            continue
        s = push_shard[index]
        if busy[s] == len(gradient) - 1:
            gradient.append(-1)
        busy[s] = place[index] = len(gradient) - 1
        died[int(g.newest[index])] = len(gradient) - 1
    n = len(gradient)
    names = list(born)
    slots, _ = _allot(
        np.array([born[k] for k in names]), np.array([died.get(k, n) for k in names])
    )
    slot_of = dict(zip(names, slots.tolist(), strict=True))
    chosen = np.asarray(gradient)
    row = np.full((n, shards), -1)
    source = np.full((n, shards), -1, np.int32)
    row[place, push_shard] = g.push_rows
    source[place, push_shard] = [slot_of[int(k)] for k in g.newest]
    real = chosen >= 0
    into = np.array(
        [slot_of[int(name[k])] if k >= 0 else 0 for k in gradient], np.int32
    )
    first = np.array(
        [k >= 0 and born[int(name[k])] == i for i, k in enumerate(gradient)], bool
    )
    versions = np.where(real[:, None], g.versions[chosen], -1)
    pushes = np.where(row >= 0, row, np.iinfo(np.int64).max).min(axis=1)
    due = np.where((row >= 0).any(axis=1), pushes, g.rows[chosen])
    due[restarting] = restarts
    return {
        "gradient": chosen,
        "first": first,
        "into": into,
        "source": source,
        "row": row,
        "due": due,
        "versions": versions,
        "landed": g.landed[chosen] & real,
        "all": g,
        "restarting": np.array(restarting, np.int64),
        "restarts": restarts,
    }


def _with_slots(trace: Trace, c: dict[str, Any], shards: int, direct: bool) -> Plan:
    """Allot version slots, shard by shard, and put the plan together."""
    n, g = len(c["gradient"]), c["all"]
    real, row, versions = c["gradient"] >= 0, c["row"], c["versions"]
    happens = row >= 0
    read, stale = (np.zeros((n, shards), np.int32) for _ in range(2))
    write = np.full((n, shards), -1, np.int32)
    version = np.where(happens, trace.version[row], -1)
    base = np.where(happens, trace.base[row], -1)
    start, slots = np.zeros(shards, np.int32), 0
    restarts: list[Restart] = []
    for s in range(shards):
        at = np.flatnonzero(happens[:, s])
        if not np.array_equal(version[at, s], np.arange(1, len(at) + 1)):
            raise ValueError(f"shard {s}: its PUSH rows are not versions 1, 2, 3, ...")
        born = np.concatenate([[-1], at])
        # Each version is the next push's start; the last one stays.
        dead = np.concatenate([at, [n]])
        own = trace.shard[c["restarts"]] == s
        again, begins = c["restarting"][own], c["restarts"][own]
        back = trace.version[begins]
        for use, rows in (
            (versions[real, s], np.flatnonzero(real)),
            (base[at, s], at),
            (back, again),
        ):
            if np.any((use < 0) | (use >= len(born))):
                raise ValueError(f"shard {s}: a version is used that was never made")
            if np.any(born[use] >= rows):
                raise ValueError(f"shard {s}: a version is used before it was made")
            np.maximum.at(dead, use, rows)
        # What a shard goes back to is the start of the push after.
        np.maximum.at(dead, back, np.append(at, n)[np.searchsorted(at, again)])
        for i, life, made in zip(
            again, trace.incarnation[begins], born[back], strict=True
        ):
            restarts.append(Restart(int(i), s, int(life), int(made)))
        mine, count = _allot(born, dead)
        slots = max(slots, count)
        start[s], write[at, s] = mine[0], mine[1:]
        read[real, s] = mine[versions[real, s]]
        stale[at, s] = mine[base[at, s]]
    chosen = np.maximum(c["gradient"], 0)
    return Plan(
        compute=real,
        replica=g.replica[chosen] if len(g.rows) else np.zeros(n, np.int32),
        batch=g.batch[chosen] if len(g.rows) else np.zeros(n, np.int64),
        step=g.step[chosen] if len(g.rows) else np.zeros(n, np.int64),
        life=g.life[chosen] if len(g.rows) else np.zeros(n, np.int64),
        landed=c["landed"],
        into=c["into"],
        first=c["first"],
        read=read,
        source=c["source"],
        taken=np.where(happens, trace.status[row] != DROPPED, True),
        write=write,
        stale=stale,
        staleness=np.where(happens, version - 1 - base, 0),
        version=version,
        row=row,
        due=c["due"],
        slots=slots,
        gradient_slots=int(c["into"].max(initial=0)) + 1,
        start=start,
        direct=direct,
        steps=len(g.rows),
        trace=trace,
        restarts=tuple(sorted(restarts)),
    )


def _with_names(plan: Plan, trace: Trace) -> Plan:
    """Say the versions' names again, where states were numbered."""
    happens = plan.row >= 0
    staleness = np.zeros_like(plan.staleness)
    staleness[happens] = history.staleness(trace, plan.row[happens])
    version = np.where(happens, trace.version[plan.row], -1)
    return dataclasses.replace(plan, staleness=staleness, version=version, trace=trace)
