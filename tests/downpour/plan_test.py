"""The plan against a slow reading of the Trace: every gradient, version and slot."""

import dataclasses
import functools

import numpy as np
import pytest

import dbjax
from dbjax import trace as trace_lib
from dbjax.downpour.plan import make_plan
from dbjax.downpour.protocol import Protocol
from dbjax.downpour.run import peak_copies
from dbjax.trace import COMPUTE, DROPPED, FETCH, PUSH, Trace
from tests.restored import random_restored

PLAIN = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0))
LINKS = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    latency=dbjax.Exponential(0.4),
    shard_service=dbjax.Exponential(0.05),
)
FAILING = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    latency=dbjax.Exponential(0.2),
    failures=dbjax.Failures(
        uptime=dbjax.Exponential(9.0), downtime=dbjax.Constant(1.0)
    ),
)
PICKY = Protocol("picky", lambda clocks, r: True, lambda clocks, r, stale: stale <= 4)
CASES = {
    "plain": dict(cluster=PLAIN),
    "plain, shards": dict(cluster=PLAIN, shards=3),
    "accrual": dict(cluster=PLAIN, n_push=3, n_fetch=2),
    "rare fetches": dict(cluster=PLAIN, n_fetch=5),
    "rare pushes": dict(cluster=PLAIN, n_push=5, shards=2),
    "links": dict(cluster=LINKS),
    "links, shards": dict(cluster=LINKS, shards=3),
    "links, accrual": dict(cluster=LINKS, shards=2, n_push=3, n_fetch=4),
    "links, rare pushes": dict(cluster=LINKS, shards=2, n_push=4),
    "failing": dict(cluster=FAILING, shards=2, n_push=3),
    "overlap": dict(cluster=LINKS, shards=2, overlap=True),
    "overlap, accrual": dict(cluster=LINKS, shards=2, overlap=True, n_push=2),
    "warm start": dict(cluster=PLAIN, warmstart_steps=11, n_fetch=2),
    "barrier": dict(cluster=PLAIN, shards=2, protocol=dbjax.synchronous()),
    "picky": dict(cluster=LINKS, shards=2, protocol=PICKY),
}


@functools.cache
def simulated(name, seed):
    keywords = {"replicas": 6, "steps": 90} | CASES[name]
    return dbjax.simulate(seed=seed, **keywords)


def read_slowly(trace):
    """What each push is: {(shard, version): (gradients, base, taken, row)}.

    A gradient is (replica, batch, versions it is computed on).
    """
    shards = trace.header["shards"]
    held, computed, pushes = {}, {}, {}
    for row in range(len(trace)):
        kind, r, s = (
            int(trace.kind[row]),
            int(trace.replica[row]),
            int(trace.shard[row]),
        )
        if kind == FETCH:
            held.setdefault(r, [None] * shards)[s] = int(trace.version[row])
        elif kind == COMPUTE:
            one = (r, int(trace.batch[row]), tuple(held[r]))
            computed.setdefault(r, []).append((int(trace.step[row]), one))
        elif kind == PUSH:
            tickets = [step for step, _ in computed[r]]
            end = tickets.index(int(trace.step[row])) + 1
            sum_ = [one for _, one in computed[r][end - int(trace.count[row]) : end]]
            assert sum_[0][2][s] == trace.base[row]
            taken = trace.status[row] != DROPPED
            name = s, int(trace.version[row])
            assert name not in pushes
            pushes[name] = sum_, int(trace.base[row]), bool(taken), row
    return pushes


def walk_slowly(plan):
    """The same, by walking the plan with names in its slots instead of numbers."""
    shards = plan.shards
    pool = [[None] * plan.slots for _ in range(shards)]
    for s in range(shards):
        pool[s][plan.start[s]] = 0
    accrued, newest = [None] * plan.gradient_slots, [0] * shards
    pushes = {}
    for i in range(len(plan)):
        if plan.compute[i]:
            held = tuple(pool[s][plan.read[i, s]] for s in range(shards))
            one = (int(plan.replica[i]), int(plan.batch[i]), held)
            if plan.first[i]:
                accrued[plan.into[i]] = []
            accrued[plan.into[i]].append(one)
        for s in range(shards):
            if plan.source[i, s] < 0:
                assert plan.write[i, s] == plan.version[i, s] == plan.row[i, s] == -1
                continue
            newest[s] += 1
            assert plan.version[i, s] == newest[s]
            base = pool[s][plan.stale[i, s]]
            assert plan.staleness[i, s] == newest[s] - 1 - base
            # The newest parameters are the start of this very push.
            assert newest[s] - 1 in pool[s]
            pushes[s, newest[s]] = (
                list(accrued[plan.source[i, s]]),
                base,
                bool(plan.taken[i, s]),
                int(plan.row[i, s]),
            )
            pool[s][plan.write[i, s]] = newest[s]
    return pushes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_push_is_what_the_trace_says(name, seed):
    """No slot is used again too early, whoever still looks at it."""
    trace = simulated(name, seed)
    trace.validate()
    assert walk_slowly(make_plan(trace)) == read_slowly(trace)


@pytest.mark.parametrize("seed", range(10))
def test_every_delay(seed):
    rng = np.random.default_rng(seed)
    delays = [int(rng.integers(0, min(t, 9) + 1)) for t in range(60)]
    trace = Trace.from_delays(delays)
    plan = make_plan(trace)
    assert walk_slowly(plan) == read_slowly(trace)
    assert plan.direct and plan.staleness[:, 0].tolist() == delays
    # Each version that is still looked at, and the newest one.
    assert plan.slots <= max(delays) + 1


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_computed_in_their_replicas_order(name):
    """Iterators only go forwards, and local steps follow one another."""
    plan = make_plan(simulated(name, 0))
    for replica in range(6):
        mine = plan.compute & (plan.replica == replica)
        assert (np.diff(plan.batch[mine]) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_landed_says_where_a_local_step_is_overwritten(name):
    trace, plan = simulated(name, 0), make_plan(simulated(name, 0))
    fresh, want = {}, {}
    for row in range(len(trace)):
        r = int(trace.replica[row])
        if trace.kind[row] == FETCH:
            fresh[r] = True
        elif trace.kind[row] == COMPUTE:
            want[r, int(trace.batch[row])] = fresh.pop(r, False)
    for i in np.flatnonzero(plan.compute):
        assert plan.landed[i] == want[int(plan.replica[i]), int(plan.batch[i])]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("replicas", [1, 2, 6, 20])
def test_memory(name, replicas):
    """At most R + 4 copies with n_push = 1, and 2R + 4 with accrual.

    Where links differ from shard to shard, a gradient waits until the last shard has
    handled it; with overlap a replica has a second version on its way.
    """
    keywords = {"steps": 12 * replicas} | CASES[name] | {"replicas": replicas}
    mixed = keywords["cluster"] is not PLAIN and keywords.get("shards", 1) > 1
    copies = 1 + (keywords.get("n_push", 1) > 1) + mixed + ("overlap" in keywords)
    plan = make_plan(dbjax.simulate(**keywords))
    assert peak_copies(plan) <= copies * replicas + 4


@pytest.mark.parametrize("name", CASES)
def test_direct_plans_have_a_row_for_each_gradient(name):
    trace, plan = simulated(name, 0), make_plan(simulated(name, 0))
    pushes = np.flatnonzero(trace.kind == PUSH)
    shards = trace.header["shards"]
    orders = {
        tuple(zip(trace.replica[mine], trace.id[mine], strict=True))
        for mine in (pushes[trace.shard[pushes] == s] for s in range(shards))
    }
    single = bool((trace.count[pushes] == 1).all())
    assert plan.direct == (single and len(orders) == 1)
    if plan.direct:
        assert plan.compute.all() and plan.first.all() and (plan.row >= 0).all()
        assert plan.gradient_slots == 1 and len(plan) == len(pushes) // shards


def test_lost_gradients_are_not_computed():
    trace = simulated("failing", 0)
    assert trace.lost()["gradients"] > 0
    pushed = int(trace.count[(trace.kind == PUSH) & (trace.shard == 0)].sum())
    assert int(make_plan(trace).compute.sum()) == pushed
    assert pushed < int((trace.kind == COMPUTE).sum())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_states_that_are_lost_or_gone_back_to_stay_in_their_slots(seed, shards):
    """A state is named by the row of the push that made it, -1 at the start."""
    trace = random_restored(seed, shards, n_push=1 + seed % 3)
    lives, fetched, read = [[[-1]] for _ in range(shards)], {}, {}
    begun = {}  # the row that each push begins from
    for row in range(len(trace)):
        r, s = int(trace.replica[row]), int(trace.shard[row])
        version, life = int(trace.version[row]), int(trace.incarnation[row])
        match trace.kind[row]:
            case trace_lib.FETCH:
                fetched[r, s] = lives[s][life][version]
            case trace_lib.COMPUTE:
                read[r, int(trace.batch[row])] = [fetched[r, s] for s in range(shards)]
            case trace_lib.PUSH:
                begun[row] = lives[s][life][-1]
                lives[s][life].append(row)
            case trace_lib.RESTART if s >= 0:
                lives[s].append(lives[s][-1][: version + 1])
    plan = make_plan(trace)
    restarts = {restart.row: restart for restart in plan.restarts}
    pool = [[None] * plan.slots for _ in range(shards)]
    now = [-1] * shards
    for s in range(shards):
        pool[s][plan.start[s]] = -1
    for i in range(len(plan)):
        if i in restarts:
            s, made = restarts[i].shard, restarts[i].made
            now[s] = int(plan.row[made, s]) if made >= 0 else -1
        if plan.compute[i]:
            held = [pool[s][plan.read[i, s]] for s in range(shards)]
            assert held == read[int(plan.replica[i]), int(plan.batch[i])]
        for s in np.flatnonzero(plan.row[i] >= 0):
            row = int(plan.row[i, s])
            assert now[s] == begun[row]
            pool[s][plan.write[i, s]] = now[s] = row
            assert begun[row] in pool[s]  # no push writes over what it begins from
    assert now == [lives[s][-1][-1] for s in range(shards)]
    assert len(plan.restarts) == sum(len(life) - 1 for life in lives) > 0


def changed(trace, name, row, value):
    column = getattr(trace, name).copy()
    column[row] = value
    return dataclasses.replace(trace, **{name: column})


def test_traces_that_name_what_is_not_there():
    trace = Trace.from_delays([0, 1, 1, 0])
    fetch, push = (np.flatnonzero(trace.kind == kind) for kind in (FETCH, PUSH))
    with pytest.raises(ValueError, match="version is used"):
        make_plan(changed(trace, "version", fetch[0], 3))
    with pytest.raises(ValueError, match="version is used"):
        make_plan(changed(trace, "base", push[1], 9))
    with pytest.raises(ValueError, match="not versions 1, 2, 3"):
        make_plan(changed(trace, "version", push[1], 7))
    with pytest.raises(ValueError, match="a step that no COMPUTE row has"):
        make_plan(changed(trace, "step", push[3], 50))
    with pytest.raises(ValueError, match="replica 0 computes before it has fetched"):
        make_plan(trace.take(np.arange(len(trace)) != fetch[0]))
    with pytest.raises(ValueError, match="and 0 RESTART rows"):
        make_plan(changed(trace, "incarnation", push[3], 1))


def test_a_sandblaster_trace_is_not_replayed_as_if_it_were_downpours():
    cluster = dbjax.Cluster(step_time=1.0)
    trace = dbjax.sandblaster.schedule(cluster, replicas=2, portions=4).trace
    with pytest.raises(ValueError, match="sandblaster.minimize, where values decide"):
        make_plan(trace)
