"""Protocols as questions over the clocks; a new one is a few lines."""

import collections
import copy

import numpy as np
import pytest

import dbjax
from dbjax.downpour.protocol import Clocks, Protocol
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
    assert protocol.may_begin(clocks, 0) and protocol.takes(clocks, 1, 100)


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


@pytest.mark.xfail(
    strict=True,
    reason="a fetch that is slow on its way meets pushes of its own round",
)
def test_synchronous_rounds_begin_on_the_same_parameters_whatever_the_latency():
    cluster = dbjax.Cluster(latency=dbjax.Exponential(0.5))
    assert rounds_of(cluster, seed=3) == dict.fromkeys(range(0, 80, 4), 4)


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
    """Pushes that are more than `most` versions stale are dropped."""
    return Protocol(
        f"fresh_only({most})",
        may_begin=lambda clocks, replica: True,
        takes=lambda clocks, replica, staleness: staleness <= most,
    )


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
    stale = (trace.version - 1 - trace.base)[pushes]
    np.testing.assert_array_equal(trace.status[pushes] == DROPPED, stale > 4)
    assert trace.lost()["dropped"] == (stale > 4).sum() > 0
    assert len(stale) == 100, "a dropped push counts a version"


def test_a_protocol_that_lets_everybody_wait_is_an_error():
    never = Protocol("never", lambda clocks, replica: False, lambda *push: True)
    with pytest.raises(RuntimeError, match="'never' lets replicas .* wait for ever"):
        dbjax.simulate(dbjax.Cluster(), replicas=2, steps=4, protocol=never)


def test_protocols_are_values():
    assert copy.deepcopy(dbjax.synchronous()).name == "synchronous"
