"""Protocols as questions over the clocks; a new one is a few lines."""

import collections
import copy
import dataclasses

import numpy as np
import pytest

import dbjax
from dbjax.downpour.clocks import Clocks
from dbjax.downpour.protocol import Protocol
from dbjax.trace import COMPUTE, DROPPED, FETCH, PUSH


@pytest.mark.parametrize("seed", range(20))
def test_clocks_know_the_slowest(seed):
    """Against counting by hand, whoever enters, ticks and leaves."""
    rng = np.random.default_rng(seed)
    clocks, rounds, slowest = Clocks(), {}, 0
    for _ in range(200):
        replica = int(rng.integers(5))
        if replica not in rounds:
            rounds[replica] = slowest
            clocks.enter(replica)
        elif rng.random() < 0.2:
            del rounds[replica]
            clocks.leave(replica)
        else:
            rounds[replica] += 1
            clocks.tick(replica)
        slowest = min(rounds.values(), default=slowest)
        assert clocks.rounds == rounds and clocks.slowest == slowest


def test_asynchronous_never_says_no():
    protocol, clocks = dbjax.asynchronous(), Clocks()
    clocks.enter(0), clocks.enter(1)
    for _ in range(100):
        clocks.tick(0)
    assert protocol.free_running
    assert protocol.may_begin(clocks, 0) and protocol.takes is None


def test_synchronous_holds_back_whoever_is_ahead():
    protocol, clocks = dbjax.synchronous(), Clocks()
    for replica in range(3):
        clocks.enter(replica)
    for replica in range(3):
        assert protocol.may_begin(clocks, replica)
    clocks.tick(1)
    assert [protocol.may_begin(clocks, r) for r in range(3)] == [True, False, True]
    clocks.tick(0)
    clocks.leave(2)  # nobody waits for it any more
    assert [protocol.may_begin(clocks, r) for r in range(2)] == [True, True]


def rounds_of(cluster, **keywords):
    """How many fetches of shard 0 saw each version, behind the barrier."""
    trace = dbjax.simulate(
        cluster, replicas=4, steps=80, protocol=dbjax.synchronous(), **keywords
    )
    assert trace.staleness().max() == 3
    fetches = trace.version[(trace.kind == FETCH) & (trace.shard == 0)]
    return collections.Counter(fetches.tolist())


@pytest.mark.parametrize("latency", [0.0, 0.3])
@pytest.mark.parametrize("shards", [1, 2])
def test_synchronous_rounds_begin_on_the_same_parameters(latency, shards):
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0), latency=latency)
    seen = rounds_of(cluster, shards=shards, seed=3)
    assert seen == dict.fromkeys(range(0, 80, 4), 4)


def test_synchronous_goes_on_without_a_failed_replica():
    failures = dbjax.Failures(uptime=dbjax.Exponential(15.0), downtime=2.0)
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0), failures=failures)
    assert 1 < len(rounds_of(cluster, seed=3))


def test_synchronous_rounds_begin_on_the_same_parameters_whatever_the_latency():
    cluster = dbjax.Cluster(latency=dbjax.Exponential(0.5))
    assert rounds_of(cluster, seed=3) == dict.fromkeys(range(0, 80, 4), 4)


def assert_rounds(trace):
    """On every shard a round's pushes follow each other, all of what came before."""
    bases = []
    for shard in range(trace.header["shards"]):
        pushes = trace.take((trace.kind == PUSH) & (trace.shard == shard))
        pushes = pushes.take(np.argsort(pushes.version))
        before = np.concatenate([[0], pushes.base[:-1]])
        begins = pushes.base == pushes.version - 1
        np.testing.assert_array_equal(pushes.base[~begins], before[~begins])
        ids = zip(pushes.replica.tolist(), pushes.id.tolist(), strict=True)
        bases.append(dict(zip(ids, pushes.base.tolist(), strict=True)))
    assert all(one == bases[0] for one in bases), "rounds differ between shards"


LATENCIES = [0.0, 0.3, dbjax.Exponential(0.5), dbjax.Pareto(0.1, 1.2)]
OUTAGES = [
    {},
    {"join": dbjax.Exponential(3.0)},
    {"failures": dbjax.Failures(dbjax.Exponential(6.0), dbjax.Exponential(2.0))},
]


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("outages", OUTAGES)
@pytest.mark.parametrize("seed", range(5))
def test_a_round_is_a_round_on_every_shard(seed, latency, outages):
    """Also for those who join late or come back, and where tickets run out in it."""
    cluster = dbjax.Cluster(
        step_time=dbjax.Gamma(1.0, 2.0),
        latency=latency,
        shard_service=[0.0, 0.1, dbjax.Exponential(0.2)][seed % 3],
        **outages,
    )
    keywords = {"replicas": 5, "steps": 83, "warmstart_steps": 3 * (seed % 2)}
    keywords |= {"protocol": dbjax.synchronous(), "seed": seed}
    trace = dbjax.simulate(cluster, shards=3, **keywords)
    assert_rounds(trace)
    if not outages:
        first = trace.take((trace.kind == PUSH) & (trace.shard == 0))
        alone = keywords["warmstart_steps"]
        steps = np.arange(83)
        want = np.where(steps < alone, steps, (steps - alone) // 5 * 5 + alone)
        np.testing.assert_array_equal(np.sort(first.base), want)


@pytest.mark.parametrize("n_push", [1, 2, 3])
@pytest.mark.parametrize("n_fetch", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_pushes_that_wait_are_pushed_in_the_end(n_push, n_fetch, overlap, seed):
    """And asking only where something has changed is enough."""
    cluster = dbjax.Cluster(
        latency=dbjax.Exponential(0.5), join=dbjax.Exponential(2.0), **OUTAGES[2]
    ) if seed else dbjax.Cluster(latency=dbjax.Exponential(0.5))  # fmt: skip
    protocol = dbjax.synchronous()
    keywords = {"replicas": 4, "shards": 2, "steps": 70, "seed": seed}
    keywords |= {"n_push": n_push, "n_fetch": n_fetch, "overlap": overlap}
    trace = dbjax.simulate(cluster, protocol=protocol, **keywords)
    always = protocol._replace(by_slowest=False)
    assert trace.diff(dbjax.simulate(cluster, protocol=always, **keywords)) is None
    computed = trace.take(trace.kind == COMPUTE)
    pushed = trace.take((trace.kind == PUSH) & (trace.shard == 1)).count.sum()
    assert pushed + trace.lost()["gradients"] == len(computed)
    if n_fetch == n_push == 1 and not seed:  # with overlap, of the round before
        rounds = np.arange(70) // 4 - overlap
        bases = np.sort(trace.base[(trace.kind == PUSH) & (trace.shard == 0)])
        np.testing.assert_array_equal(bases, np.maximum(rounds, 0) * 4)


def test_whoever_pushes_waits_until_everybody_has_begun():
    protocol, clocks = dbjax.synchronous(), Clocks()
    for replica in range(3):
        clocks.enter(replica)
    clocks.begin(0), clocks.begin(1)
    assert not protocol.may_push(clocks, 0)
    clocks.begin(2)
    assert protocol.may_push(clocks, 0)
    clocks.push(0), clocks.tick(0)
    clocks.leave(2), clocks.enter(2)  # too late for this round, so not waited for
    assert clocks.rounds == {0: 1, 1: 0, 2: 1}
    assert protocol.may_push(clocks, 1) and not protocol.may_begin(clocks, 2)


def test_a_protocol_that_lets_nobody_push_is_an_error():
    never = dbjax.synchronous()._replace(may_push=lambda clocks, replica: False)
    with pytest.raises(RuntimeError, match=r"lets replicas \[0, 1\] wait for ever"):
        dbjax.simulate(dbjax.Cluster(), replicas=2, steps=4, protocol=never)


def ssp(bound):
    """Stale synchronous parallel: nobody is more than `bound` rounds ahead."""
    return Protocol(
        f"ssp({bound})",
        may_begin=lambda clocks, replica: (
            clocks.rounds[replica] <= clocks.slowest + bound
        ),
        takes=lambda clocks, replica, staleness: True,
    )


def fresh_only(most):
    """Pushes that have missed more than `most` others are dropped."""
    return Protocol(
        f"fresh_only({most})",
        may_begin=lambda clocks, replica: True,
        takes=lambda clocks, replica, missed: missed <= most,
    )


def updates_missed(trace, shard=0):
    """How many taken pushes lie between each push of a shard and what it saw."""
    pushes = trace.take((trace.kind == PUSH) & (trace.shard == shard))
    taken = np.concatenate([[0], np.cumsum(pushes.status != DROPPED)])
    np.testing.assert_array_equal(pushes.version, 1 + np.arange(len(pushes)))
    return taken[pushes.version - 1] - taken[pushes.base]


HEAVY = dbjax.Cluster(step_time=dbjax.Pareto(1.0, 1.5))


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_new_protocol_bounds_how_far_anyone_is_ahead(bound):
    trace = dbjax.simulate(HEAVY, replicas=5, steps=100, protocol=ssp(bound), seed=1)
    rounds, ahead = [0] * 5, 0
    for replica in trace.replica[trace.kind == COMPUTE].tolist():
        rounds[replica] += 1
        ahead = max(ahead, rounds[replica] - min(rounds))
    assert ahead == bound + 1
    if bound == 0:
        other = dbjax.simulate(
            HEAVY, replicas=5, steps=100, protocol=dbjax.synchronous(), seed=1
        )
        assert all(
            np.array_equal(a, b)
            for a, b in zip(
                trace.columns().values(), other.columns().values(), strict=True
            )
        )


def test_dropped_pushes_are_those_that_the_protocol_did_not_take():
    trace = dbjax.simulate(HEAVY, replicas=5, steps=100, protocol=fresh_only(4), seed=1)
    pushes = trace.kind == PUSH
    stale, dropped = updates_missed(trace), trace.status[pushes] == DROPPED
    np.testing.assert_array_equal(dropped, stale > 4)
    assert trace.lost()["dropped"] == (stale > 4).sum() > 0
    assert len(stale) == 100, "a dropped push counts a version"


def test_a_protocol_that_lets_everybody_wait_is_an_error():
    never = Protocol("never", lambda clocks, replica: False, lambda *push: True)
    with pytest.raises(RuntimeError, match="'never' lets replicas .* wait for ever"):
        dbjax.simulate(dbjax.Cluster(), replicas=2, steps=4, protocol=never)


def test_protocols_are_values():
    assert copy.deepcopy(dbjax.synchronous()).name == "synchronous"


UNEVEN = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0), latency=0.1, slow=dbjax.Slow(0.25, 6.0)
)


def order_of(protocol, seed, shards=2):
    trace = dbjax.simulate(
        UNEVEN, replicas=8, shards=shards, steps=300, protocol=protocol, seed=seed
    )
    columns = (trace.kind, trace.replica, trace.shard, trace.step, trace.version)
    return np.stack([*columns, trace.base])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("bound", "same"), [(0, dbjax.synchronous()), (np.inf, dbjax.asynchronous())]
)
def test_ssp_lies_between_a_barrier_and_none(bound, same, seed):
    got, want = order_of(dbjax.ssp(bound), seed), order_of(same, seed)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bound", [1, 3])
def test_ssp_lets_nobody_get_further_ahead_than_its_bound(bound, seed):
    kind, replica, _, _, _, _ = order_of(dbjax.ssp(bound), seed, shards=1)
    finished, most = np.zeros(8, int), 0
    for k, r in zip(kind, replica, strict=True):
        if k == PUSH:
            finished[r] += 1
        if k == COMPUTE:
            most = max(most, finished[r] - finished.min())
    assert most == bound  # never above it, and it is reached


def test_a_large_bound_is_never_felt():
    """Nobody waits: all are as busy as they are without a protocol.

    Where a push takes time, whoever asks first waits for the answer to it.
    """
    cluster, ends = dataclasses.replace(UNEVEN, latency=0.0), []
    for protocol in (dbjax.ssp(1), dbjax.ssp(1_000), dbjax.asynchronous()):
        trace = dbjax.simulate(
            cluster, replicas=8, steps=300, protocol=protocol, seed=0
        )
        ends.append(np.sort(trace.time[trace.kind == PUSH])[270])
    assert ends[0] > 1.5 * ends[1] and ends[1] == pytest.approx(ends[2], rel=0.02)


@pytest.mark.parametrize("bound", [-1, 0.5, float("nan")])
def test_a_bound_that_is_not_allowed_is_named(bound):
    with pytest.raises(ValueError, match=f"bound must be .*{bound}"):
        dbjax.ssp(bound)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [1, 3, 6])
def test_a_threshold_drops_what_has_missed_as_many_updates(threshold, seed):
    """And is not fed up by what it drops itself: those are no updates."""
    trace = dbjax.simulate(
        UNEVEN, replicas=8, shards=2, steps=300, seed=seed,
        protocol=dbjax.delay_threshold(threshold),
    )  # fmt: skip
    for shard in (0, 1):
        pushes = trace.take((trace.kind == PUSH) & (trace.shard == shard))
        late = updates_missed(trace, shard) >= threshold
        np.testing.assert_array_equal(pushes.status == DROPPED, late)
        assert 0 < np.count_nonzero(late) < 290
    assert len(trace.staleness()) == 300


@pytest.mark.parametrize("seed", range(4))
def test_a_threshold_that_nobody_reaches_is_asynchronous(seed):
    want = order_of(dbjax.asynchronous(), seed)
    for threshold in (300, np.inf):
        got = order_of(dbjax.delay_threshold(threshold), seed)
        assert sorted(got.T.tolist()) == sorted(want.T.tolist())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("outages", OUTAGES)
@pytest.mark.parametrize("backups", [1, 2, 7])
def test_rounds_with_backups_are_the_same_on_every_shard(
    backups, outages, latency, seed
):
    """A round's pushes have seen all before it, and nothing of it; so has its next."""
    cluster = dbjax.Cluster(
        step_time=dbjax.Gamma(1.0, 2.0), latency=latency, slow=dbjax.Slow(0.3, 5.0),
        shard_service=[0.0, 0.1, dbjax.Exponential(0.2)][seed], **outages,
    )  # fmt: skip
    protocol = dbjax.synchronous(backups=backups)
    keywords = {"replicas": 6, "shards": 2, "steps": 83, "warmstart_steps": 3 * seed}
    trace = dbjax.simulate(cluster, protocol=protocol, seed=seed, **keywords)
    who = []
    for shard in (0, 1):
        pushes = trace.take((trace.kind == PUSH) & (trace.shard == shard))
        pushes = pushes.take(np.argsort(pushes.version))
        taken = pushes.status != DROPPED
        missed = updates_missed(trace, shard)[taken]
        new = np.flatnonzero(missed == 0)
        rounds = np.diff([*new, len(missed)])
        np.testing.assert_array_equal(
            missed, np.arange(len(missed)) - new.repeat(rounds)
        )
        who.append(set(zip(pushes.replica[taken], pushes.id[taken], strict=True)))
        if not outages and not seed:
            needed = max(6 - backups, 1)
            assert set(rounds[:-8]) == {needed}
            assert backups < 7 or not set(rounds) - {1}
    assert who[0] == who[1], "what is late is so on every shard"
    always = protocol._replace(by_slowest=False)
    again = dbjax.simulate(cluster, protocol=always, seed=seed, **keywords)
    assert trace.diff(again) is None, "asking only where something has changed"


@pytest.mark.parametrize("seed", range(3))
def test_backups_spare_a_round_its_slowest(seed):
    speeds = (1.0,) * 6 + (0.05,) * 2
    cluster, ends = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0), speeds=speeds), []
    for backups in (0, 2):
        trace = dbjax.simulate(
            cluster, replicas=8, steps=400, seed=seed,
            protocol=dbjax.synchronous(backups=backups),
        )  # fmt: skip
        taken = (trace.kind == PUSH) & (trace.status != DROPPED)
        ends.append(np.sort(trace.time[taken])[300])
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("every", [2, 5])
def test_a_round_of_several_minibatches_waits_once(every, latency):
    """And each push has seen all pushes of the round before."""
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0), latency=latency)
    keywords = {"replicas": 4, "shards": 2, "steps": 40 * every, "seed": 1}
    keywords |= {"n_fetch": every, "n_push": every}
    ends = []
    for per_round in (every, 1):
        protocol = dbjax.synchronous(every=per_round)
        trace = dbjax.simulate(cluster, protocol=protocol, **keywords)
        bases = np.sort(trace.base[(trace.kind == PUSH) & (trace.shard == 0)])
        np.testing.assert_array_equal(bases, np.arange(40) // 4 * 4)
        ends.append(trace.time.max())
    assert ends[0] < ends[1], "a barrier a minibatch takes longer"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: dbjax.synchronous(every=0), "every must be .*0"),
        (lambda: dbjax.synchronous(backups=-1), "backups must be .*-1"),
        (lambda: dbjax.synchronous(every=2, backups=1), "every=2 and backups=1"),
        (lambda: dbjax.delay_threshold(0), "threshold must be .*0"),
        (lambda: dbjax.delay_threshold(1.5), "threshold must be .*1.5"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("given", [{"n_push": 2}, {"overlap": True}])
def test_backups_need_a_push_after_each_minibatch(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        dbjax.simulate(
            UNEVEN, replicas=4, steps=8, protocol=dbjax.synchronous(backups=1), **given
        )
