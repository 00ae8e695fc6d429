import random

import numpy as np
import pytest

from dbjax.cluster import (
    Cluster,
    Constant,
    Empirical,
    Exponential,
    Failures,
    LogNormal,
    Pareto,
    Slow,
    Slowness,
)
from dbjax.downpour import free_running
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.program import make_program
from dbjax.downpour.protocol import Protocol, asynchronous, synchronous
from dbjax.downpour.simulate import simulate
from dbjax.runtime import emulated
from dbjax.trace import COMPUTE, DROPPED, FAIL, FETCH, JOIN, LEAVE, PUSH, RESTART, Trace

INF = float("inf")


def bounded(most: int) -> Protocol:
    """Nobody is more than `most` rounds ahead; a staleness above 3 is dropped."""
    return Protocol(
        "bounded",
        may_begin=lambda clocks, replica: (
            clocks.rounds[replica] <= clocks.slowest + most
        ),
        takes=lambda clocks, replica, staleness: staleness <= 3,
        by_slowest=True,
    )


def by_events(cluster: Cluster, trace: Trace, **kwargs) -> Trace:
    """The same run from the event loop, whatever `simulate` has chosen."""
    shards = kwargs.get("shards", 1)
    size = kwargs.get("parameter_bytes", 0)
    arguments = Arguments(
        kwargs["replicas"],
        shards,
        kwargs["steps"],
        kwargs.get("n_fetch", 1),
        kwargs.get("n_push", 1),
        kwargs.get("overlap", False),
        kwargs.get("warmstart_steps", 0),
        kwargs.get("protocol", asynchronous()),
    )
    program = make_program(arguments)
    columns = emulated.order(program, cluster, kwargs.get("seed", 0), (size,) * shards)
    return Trace.from_columns(trace.header, **columns)


def seconds(rng: random.Random, zero: bool = True):
    """A distribution, with ties more often than not."""
    some = [
        0.5,
        1.0,
        Exponential(0.5),
        LogNormal(1.0, 0.5),
        Empirical([0.0, 0.0, 1.0, 2.0]),
        Empirical([0.25, 0.5, 1.0]),
    ]
    return rng.choice([0.0, 0.0, *some] if zero else some)


def random_run(rng: random.Random) -> tuple[dict, dict]:
    replicas = rng.randint(1, 7)
    cluster = {
        "step_time": seconds(rng, zero=False),
        "latency": seconds(rng),
        "bandwidth": rng.choice([INF, 10.0, 7.0]),
        "speeds": rng.choice(
            [1.0, tuple(rng.choice([1.0, 2.0, 0.3]) for _ in range(replicas))]
        ),
        "join": rng.choice(
            [
                0.0,
                Exponential(3.0),
                tuple(float(rng.randint(0, 6)) for _ in range(replicas)),
            ]
        ),
    }
    kwargs = {
        "replicas": replicas,
        "shards": rng.choice([1, 1, 2, 3]),
        "steps": rng.randint(1, 60),
        "n_fetch": rng.randint(1, 4),
        "n_push": rng.randint(1, 4),
        "seed": rng.randint(0, 10**6),
        "warmstart_steps": rng.choice([0, 0, 1, 3, 10, 70]),
    }
    return cluster, kwargs


@pytest.mark.parametrize("seed", range(6))
def test_columns_at_once_and_event_by_event_agree_bitwise(seed):
    rng = random.Random(seed)
    for _ in range(25):
        machines, kwargs = random_run(rng)
        cluster, size = Cluster(**machines), rng.choice([0, 5, 40])
        sizes = (size,) * kwargs["shards"]
        trace = simulate(cluster, parameter_bytes=sizes, **kwargs)
        trace.validate()
        other = by_events(cluster, trace, parameter_bytes=size, **kwargs)
        assert trace.diff(other) is None, (cluster, kwargs)


@pytest.mark.parametrize(
    "cluster",
    [
        Cluster(),
        Cluster(step_time=1.0),
        Cluster(latency=0.3),
        Cluster(latency=Exponential(0.3), bandwidth=100.0),
        Cluster(Pareto(1.0, 1.5), slow=Slow(0.3), slowness=Slowness(9.0, 3.0, 5.0)),
        Cluster(speeds=(1.0, 500.0, *[1.0] * 18), join=Exponential(5.0)),
    ],
)
def test_the_vectorised_path_is_taken_and_agrees_over_many_steps(cluster):
    kwargs = {"replicas": 20, "shards": 2, "steps": 3000, "parameter_bytes": 10}
    run = free_running.Run(cluster, 0, 20, 3000, 1, 1, 0, (10, 10))
    assert free_running.order(run) is not None
    trace = simulate(cluster, **kwargs | {"parameter_bytes": (10, 10)})
    assert trace.diff(by_events(cluster, trace, **kwargs)) is None


def test_a_push_that_would_be_overtaken_is_left_to_the_events():
    run = free_running.Run(Cluster(latency=Exponential(3.0)), 0, 3, 200, 4, 1, 0, (0,))
    assert free_running.order(run) is None
    trace = simulate(run.cluster, replicas=3, steps=200, n_fetch=4)
    trace.validate()


def check(trace: Trace) -> None:
    """What must hold of every run."""
    trace.validate()
    replicas, steps = trace.header["replicas"], trace.header["steps"]
    rows = {kind: trace.take(trace.kind == kind) for kind in range(7)}
    assert np.all(trace.start <= trace.time)
    assert np.all(np.diff(trace.time) >= 0)
    tickets = [*rows[COMPUTE].step, *rows[FAIL].step]
    assert sorted(tickets) == list(range(steps))
    for kind in (JOIN, LEAVE):
        assert sorted(rows[kind].replica) == list(range(replicas))
    assert len(rows[FAIL]) == len(rows[RESTART])
    first = rows[PUSH].take(rows[PUSH].shard == 0)
    assert first.count.sum() + rows[FAIL].count.sum() == len(rows[COMPUTE])
    check_bases(trace)


def check_bases(trace: Trace) -> None:
    """A push's base is what its replica held when its oldest gradient was computed."""
    shards = trace.header["shards"]
    held, computed = {}, {}
    pushed = {}
    for i in range(len(trace)):
        kind, replica, shard = trace.kind[i], trace.replica[i], trace.shard[i]
        if kind == FETCH:
            held.setdefault(replica, [0] * shards)[shard] = trace.version[i]
        elif kind == COMPUTE:
            computed.setdefault(replica, []).append(list(held[replica]))
        elif kind == FAIL:  # what was accrued is gone
            mine = computed.setdefault(replica, [])
            del mine[len(mine) - trace.count[i] :]
        elif kind == PUSH:
            at = pushed.get((replica, shard), 0)
            assert trace.base[i] == computed[replica][at][shard]
            pushed[replica, shard] = at + trace.count[i]


@pytest.mark.parametrize("seed", range(6))
def test_every_combination_gives_a_valid_trace(seed):
    rng = random.Random(100 + seed)
    for _ in range(25):
        machines, kwargs = random_run(rng)
        failures = [None, Failures(Exponential(5.0), Exponential(2.0))]
        cluster = Cluster(
            **machines,
            shard_service=seconds(rng),
            failures=rng.choice([*failures, Failures(3.0, 1.0)]),
        )
        trace = simulate(
            cluster,
            protocol=rng.choice([asynchronous(), synchronous(), bounded(2)]),
            overlap=rng.choice([True, False]),
            parameter_bytes=rng.choice([0, 5, 40]),
            **kwargs,
        )
        check(trace)


def test_the_same_arguments_give_the_same_trace():
    cluster = Cluster(shard_service=Exponential(0.1), latency=Exponential(0.1))
    traces = [simulate(cluster, replicas=5, steps=200, seed=seed) for seed in (3, 3, 4)]
    assert traces[0].diff(traces[1]) is None
    assert traces[0].diff(traces[2]) is not None


# What theory says.


@pytest.mark.parametrize("replicas", [1, 2, 5, 16])
@pytest.mark.parametrize("events", [False, True])
def test_equal_constant_machines_are_always_one_round_behind(replicas, events):
    cluster = Cluster(step_time=1.0)
    kwargs = {"replicas": replicas, "steps": 10 * replicas}
    trace = simulate(cluster, **kwargs)
    if events:
        trace = by_events(cluster, trace, **kwargs)
    expected = np.minimum(np.arange(10 * replicas), replicas - 1)
    np.testing.assert_array_equal(trace.staleness()[:, 0], expected)
    pushes = trace.take(trace.kind == PUSH)
    assert pushes.replica.tolist() == list(range(replicas)) * 10
    assert pushes.step.tolist() == list(range(10 * replicas))


@pytest.mark.parametrize("replicas", [2, 8])
@pytest.mark.parametrize("shards", [1, 2])
def test_memoryless_machines_have_geometric_staleness(replicas, shards):
    cluster = Cluster(step_time=Exponential(1.0))
    trace = simulate(cluster, replicas=replicas, shards=shards, steps=40_000, seed=1)
    staleness = trace.staleness()[1_000:]
    assert np.all(staleness == staleness[:, :1])
    count = np.bincount(staleness[:, 0], minlength=30)
    k = np.arange(len(count))
    share = 1 / replicas * (1 - 1 / replicas) ** k
    expected = len(staleness) * share
    often = expected > 50
    deviation = (count - expected)[often] / np.sqrt(expected * (1 - share))[often]
    assert np.abs(deviation).max() < 4
    assert staleness.mean() == pytest.approx(replicas - 1, rel=0.03)


def test_a_saturated_shard_sets_the_pace():
    service = 0.05
    cluster = Cluster(shard_service=service)
    trace = simulate(cluster, replicas=60, steps=3000)
    assert trace.throughput() == pytest.approx(1 / service, rel=0.03)
    pushes = trace.take(trace.kind == PUSH)
    np.testing.assert_allclose(pushes.time - pushes.start, service, rtol=1e-9)
    assert np.all(pushes.start[1:] >= pushes.time[:-1])  # one at a time
    # Far from saturation the shard is not noticed.
    free = simulate(cluster, replicas=2, steps=300).throughput()
    assert free == pytest.approx(2 / (1 + service), rel=0.05)


def test_pushes_alone_do_not_hold_up_their_replica_unless_it_fetches():
    cluster = Cluster(step_time=1.0, shard_service=0.75)
    trace = simulate(cluster, replicas=1, steps=6, n_fetch=3)
    computed = trace.take(trace.kind == COMPUTE)
    # The fetch of turn 3 waits for the three pushes before it, the last one sent then.
    assert computed.time.tolist() == [1, 2, 3, 4.75, 5.75, 6.75]
    fetched = trace.take(trace.kind == FETCH)
    assert (fetched.time.tolist(), fetched.version.tolist()) == ([0, 3.75], [0, 3])


def test_messages_take_their_time():
    cluster = Cluster(step_time=1.0, latency=0.25, bandwidth=8.0)
    trace = simulate(cluster, replicas=1, shards=2, steps=2, parameter_bytes=(2, 4))
    # A fetch brings 4 bytes in 0.25 + 0.75 s, a push takes them along as well.
    fetched = trace.take(trace.kind == FETCH)
    assert fetched.start.tolist() == [0, 0, 2, 2]
    assert fetched.time.tolist() == [1, 1, 3.5, 3.5]
    assert fetched.bytes.tolist() == [2, 4, 2, 4]
    pushes = trace.take(trace.kind == PUSH)
    assert pushes.time.tolist() == [2.5, 2.75, 5.0, 5.25]
    assert pushes.shard.tolist() == [0, 1, 0, 1]
    assert trace.time[trace.kind == LEAVE].tolist() == [5.25]


def test_versions_go_by_arrival():
    cluster = Cluster(step_time=1.0, latency=Exponential(2.0))
    trace = simulate(cluster, replicas=6, shards=3, steps=300)
    staleness = trace.staleness()
    assert np.any(staleness[:, 0] != staleness[:, 1])
    pushes = trace.take((trace.kind == PUSH) & (trace.shard == 1))
    assert pushes.version.tolist() == list(range(1, 301))
    assert np.all(np.diff(pushes.time) >= 0)


@pytest.mark.parametrize("protocol", [asynchronous(), synchronous()])
def test_draws_do_not_depend_on_protocol_or_replicas(protocol):
    cluster = Cluster(
        Pareto(1.0, 2.5), shard_service=Exponential(0.1), latency=Exponential(0.1)
    )
    drawn = cluster.compute_times(5, np.arange(9), 0, 200)
    for replicas in (4, 9):
        trace = simulate(
            cluster, replicas=replicas, steps=150, seed=5, protocol=protocol
        )
        rows = trace.take(trace.kind == COMPUTE)
        np.testing.assert_allclose(
            rows.time - rows.start, drawn[rows.replica, rows.batch], rtol=1e-9
        )


# Semantics.


def test_the_rows_of_one_replica():
    trace = simulate(Cluster(step_time=1.0), replicas=1, steps=3, n_fetch=2, n_push=2)
    assert trace.kind.tolist() == [
        *(JOIN, FETCH, COMPUTE, COMPUTE, PUSH, FETCH, COMPUTE, PUSH, LEAVE)
    ]
    assert trace.step.tolist() == [-1, 0, 0, 1, 1, 2, 2, 2, -1]
    assert trace.batch.tolist() == [-1, -1, 0, 1, -1, -1, 2, -1, -1]
    assert trace.version.tolist() == [-1, 0, -1, -1, 1, 1, -1, 2, -1]
    assert trace.base.tolist() == [-1, -1, -1, -1, 0, -1, -1, 1, -1]
    assert trace.count.tolist() == [0, 0, 0, 0, 2, 0, 0, 1, 0]
    assert trace.id.tolist() == [-1, -1, -1, -1, 0, -1, -1, 1, -1]
    assert trace.time.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]


def test_header():
    cluster = Cluster(step_time=1.0)
    header = simulate(cluster, replicas=2, steps=3, seed=7, n_push=4).header
    assert header["cluster"] == repr(cluster)
    assert (header["runtime"], header["protocol"]) == ("Emulated", "asynchronous")
    assert (header["seed"], header["n_push"], header["steps"]) == (7, 4, 3)


@pytest.mark.parametrize("latency", [0.0, 0.5])
def test_a_barrier_gives_rounds(latency):
    cluster = Cluster(LogNormal(1.0, 0.5), latency=latency)
    trace = simulate(cluster, replicas=4, steps=40, protocol=synchronous())
    pushes = trace.take(trace.kind == PUSH)
    np.testing.assert_array_equal(trace.staleness()[:, 0], np.arange(40) % 4)
    np.testing.assert_array_equal(pushes.base, np.arange(40) // 4 * 4)
    fetches = trace.take(trace.kind == FETCH)
    assert fetches.replica.tolist() == [0, 1, 2, 3] * 10
    assert fetches.step.tolist() == list(range(40))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_bound_holds_the_fast_back_and_drops_what_is_late(shards):
    cluster = Cluster(step_time=1.0, speeds=(1.0, 10.0, 1.1))
    trace = simulate(cluster, replicas=3, shards=shards, steps=60, protocol=bounded(2))
    computed = trace.take(trace.kind == COMPUTE)
    assert np.ptp(np.bincount(computed.replica[:30])) <= 3
    pushes = trace.take(trace.kind == PUSH)
    late = pushes.version - 1 - pushes.base > 3
    assert np.array_equal(pushes.status == DROPPED, late)
    assert late.any()
    assert trace.lost()["dropped"] == late.sum() / shards


def test_a_protocol_that_holds_everyone_is_an_error():
    protocol = Protocol("closed", lambda c, r: c.rounds[r] < 3, lambda c, r, s: True)
    with pytest.raises(RuntimeError, match=r"'closed' lets replicas \[0, 1\] wait"):
        simulate(Cluster(), replicas=2, steps=20, protocol=protocol)


@pytest.mark.parametrize("protocol", [asynchronous(), synchronous(), bounded(1)])
@pytest.mark.parametrize("steps", [30, 5])
def test_a_warm_start_is_one_replica_alone(protocol, steps):
    cluster = Cluster(join=(0.0, 1.0, 0.0, 50.0))
    trace = simulate(
        cluster, replicas=4, steps=steps, warmstart_steps=7, protocol=protocol
    )
    check(trace)
    computed = trace.take(trace.kind == COMPUTE)
    assert set(computed.replica[:7]) == {0}
    assert computed.step[:7].tolist() == list(range(min(steps, 7)))
    if steps > 7:
        assert len(set(computed.replica[7:13])) == 3


def test_failures_cost_what_was_accrued():
    cluster = Cluster(step_time=1.0, failures=Failures(3.5, 2.0))
    trace = simulate(cluster, replicas=1, steps=8, n_push=2)
    # Up at 0, down at 3.5 with one gradient accrued and step 3 in hand, up at 5.5.
    rows = trace.take(np.isin(trace.kind, (FAIL, RESTART)))
    assert rows.kind.tolist() == [FAIL, RESTART, FAIL, RESTART]
    assert rows.time.tolist() == [3.5, 5.5, 9.0, 11.0]
    assert rows.step.tolist() == [3, -1, 7, -1]
    assert rows.count.tolist() == [1, 0, 1, 0]
    computed = trace.take(trace.kind == COMPUTE)
    assert computed.batch.tolist() == [0, 1, 2, 4, 5, 6]  # the lost one's is not reused
    assert computed.step.tolist() == [0, 1, 2, 4, 5, 6]
    assert computed.start.tolist() == [0, 1, 2, 5.5, 6.5, 7.5]
    assert trace.lost()["gradients"] == 2
    check(trace)


def test_nobody_waits_for_a_failed_replica():
    cluster = Cluster(step_time=1.0, failures=Failures(Exponential(20.0), 1e6))
    trace = simulate(cluster, replicas=3, steps=40, protocol=synchronous())
    check(trace)
    assert np.sum(trace.kind == FAIL) >= 1


def test_overlap_hides_the_exchange_behind_the_minibatch():
    cluster = Cluster(step_time=1.0, latency=0.25)
    trace = simulate(cluster, replicas=1, steps=5, overlap=True)
    check(trace)
    computed = trace.take(trace.kind == COMPUTE)
    assert computed.time.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]
    fetched = trace.take(trace.kind == FETCH)
    # Each stands where it is installed, with the ticket it was asked for.
    assert fetched.start.tolist() == [0, 1.5, 2.5, 3.5, 4.5]
    assert fetched.time.tolist() == [0.5, 2.5, 3.5, 4.5, 5.5]
    assert fetched.step.tolist() == [0, 1, 2, 3, 4]
    assert fetched.version.tolist() == [0, 1, 2, 3, 4]
    assert trace.staleness()[:, 0].tolist() == [0, 1, 1, 1, 1]
    waiting = simulate(cluster, replicas=1, steps=5)
    assert waiting.duration() == 5 * 1.5 + 0.25


def test_overlap_has_one_exchange_in_flight():
    cluster = Cluster(step_time=1.0, latency=2.0)
    trace = simulate(cluster, replicas=1, steps=4, overlap=True)
    check(trace)
    computed = trace.take(trace.kind == COMPUTE)
    assert computed.start.tolist() == [4, 5, 9, 13]
    pushes = trace.take(trace.kind == PUSH)
    assert pushes.time.tolist() == [7, 11, 15, 19]


# Arguments.


@pytest.mark.parametrize("name", ["replicas", "shards", "steps", "n_fetch", "n_push"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "3", None])
def test_counts_are_positive_integers(name, value):
    words = f"{name} must be (an integer of )?at least 1; got"
    with pytest.raises(ValueError, match=words):
        simulate(Cluster(), **{"replicas": 2, "steps": 3, name: value})


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"warmstart_steps": -1}, "warmstart_steps must be at least 0; got -1"),
        ({"warmstart_steps": True}, "warmstart_steps must be"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"seed": 0.5}, "seed must be"),
        ({"overlap": 1}, "overlap must be True or False; got 1"),
        ({"parameter_bytes": -4}, "parameter_bytes must be"),
        ({"parameter_bytes": (1, 2, 3)}, "each of the 2 shards.* got 3 sizes"),
        ({"parameter_bytes": (1, -2)}, r"parameter_bytes\[1\] must be"),
    ],
)
def test_other_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        simulate(Cluster(), replicas=2, shards=2, steps=3, **kwargs)


def test_types_and_the_clusters_own_complaints():
    with pytest.raises(TypeError, match="cluster must be a Cluster; got 1.0"):
        simulate(1.0, replicas=2, steps=3)
    with pytest.raises(TypeError, match="protocol must be a Protocol"):
        simulate(Cluster(), replicas=2, steps=3, protocol=asynchronous)
    with pytest.raises(ValueError, match="speeds must hold a number for each replica"):
        simulate(Cluster(speeds=(1.0, 2.0)), replicas=3, steps=3)


def test_numpy_integers_and_even_cuts():
    trace = simulate(
        Cluster(Constant(1.0)),
        replicas=np.int64(1),
        shards=np.int32(3),
        steps=np.int64(1),
        parameter_bytes=10,
    )
    assert trace.bytes[trace.kind == PUSH].tolist() == [4, 3, 3]
