"""How long a batch takes on an emulated cluster, with and without backups."""

import dataclasses

import numpy as np
import pytest

import dbjax
from dbjax.cluster import Cluster, Constant, Exponential, Failures, Slow, Slowness
from dbjax.sandblaster.schedule import schedule
from dbjax.trace import COMPUTE, DROPPED, FAIL, FETCH, PUSH

CLUSTERS = {
    "equal": Cluster(),
    "slow": Cluster(slow=Slow(factor=8.0, replicas=(1,))),
    "far": Cluster(latency=Exponential(0.3), shard_service=0.05, bandwidth=100.0),
    "late": Cluster(join=(0.0, 2.0, 0.0, 7.0, 1.0)),
    "restless": Cluster(slowness=Slowness(factor=5.0, mean_slow=3, mean_normal=9)),
    "failing": Cluster(failures=Failures(Exponential(6.0), Exponential(3.0))),
    "failing and far": Cluster(
        latency=Exponential(0.3),
        shard_service=0.05,
        failures=Failures(Exponential(6.0), Exponential(3.0)),
    ),
}


def run(cluster, strategy="backups", **keywords):
    arguments = dict(replicas=5, portions=40, shards=3, evaluations=3, push_every=3)
    return schedule(
        cluster, strategy=strategy, parameter_bytes=30, **{**arguments, **keywords}
    )


def test_a_straggling_cluster_with_backups_is_near_the_ideal():
    """2,000 replicas, 2 % of them ten times slower: the figure of the design."""
    times = {
        strategy: schedule(
            Cluster.slow_tail(), replicas=2000, portions=40_000, strategy=strategy
        )
        for strategy in ("backups", "portions", "static")
    }
    ratio = {name: t.seconds[0] / t.ideal for name, t in times.items()}
    assert ratio["backups"] < 1.15
    assert 1.3 < ratio["portions"] < 2
    assert ratio["static"] > 8


def test_no_evaluation_pays_for_the_backups_of_the_one_before():
    """Who computes a copy that nobody needs is late for the next evaluation."""

    def ratios(cluster, strategy):
        times = schedule(
            cluster, replicas=100, portions=2000, evaluations=6, strategy=strategy
        )
        return times.seconds / times.ideal, times.info.backups

    slow, _ = ratios(Cluster.slow_tail(), "backups")
    assert slow.max() < 1.15
    equal, backups = ratios(Cluster(), "backups")
    without, _ = ratios(Cluster(), "portions")
    assert equal.mean() < without.mean() + 0.02
    assert backups < 0.3 * 6 * 100


def test_by_hand():
    """Two replicas, one three times slower, four portions, no chance."""
    cluster = Cluster(step_time=1.0, slow=Slow(factor=3.0, replicas=(1,)))

    def seconds(strategy):
        return schedule(cluster, replicas=2, portions=4, strategy=strategy).seconds[0]

    # Static: two portions of three seconds. Portions: 0 has computed 0, 1 and 3 when
    # 1 has computed 2. With backups 0 would begin 2 again at three, too late.
    assert [seconds(s) for s in ("static", "portions", "backups")] == [6.0, 3.0, 3.0]
    cluster = dataclasses.replace(cluster, slow=Slow(factor=9.0, replicas=(1,)))
    assert [seconds(s) for s in ("static", "portions", "backups")] == [18.0, 9.0, 4.0]
    result = schedule(cluster, replicas=2, portions=4)
    assert result.ideal == pytest.approx(4 / (1 + 1 / 9))
    computed = result.trace.take(result.trace.kind == COMPUTE)
    # 1's own copy of portion 2 is still under way when everything counts.
    assert computed.step.tolist() == [0, 1, 3, 2]
    assert computed.count.tolist() == [0, 0, 0, 1]


def test_latency_and_service_by_hand():
    cluster = Cluster(step_time=1.0, latency=0.1, shard_service=0.25)
    result = schedule(cluster, replicas=1, portions=2, shards=2, push_every=1)
    # Asked 0.1 after joining at 0, so the order lands at 0.2, the fetch at 0.4. Each
    # portion ends with a round trip to the coordinator; the last push takes 0.1 to the
    # shards, 0.25 there, 0.1 back and 0.1 to the coordinator.
    assert result.seconds[0] == pytest.approx(0.4 + 1 + 0.2 + 1 + 0.2 + 0.55)


def test_pushes_wait_for_one_another_at_a_shard():
    cluster = Cluster(step_time=1.0, shard_service=0.25)
    assert schedule(cluster, replicas=3, portions=3).seconds == pytest.approx([1.75])


def test_an_evaluation_sees_the_pushes_of_those_before_it():
    trace = schedule(Cluster(), replicas=2, portions=8, evaluations=3).trace
    fetches = trace.take(trace.kind == FETCH)
    pushes = trace.take(trace.kind == PUSH)
    before = [0] + [int((pushes.step < 8 * e).sum()) for e in (1, 2)]
    assert fetches.version.tolist() == np.repeat(before, 2).tolist()
    assert pushes.base.tolist() == [before[step // 8] for step in pushes.step]


@pytest.mark.parametrize("strategy", ["backups", "portions", "static"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_every_shard_adds_every_portion_once(name, strategy):
    for seed in range(2 if strategy == "static" else 4):
        result = run(CLUSTERS[name], strategy, seed=seed)
        trace, info = result.trace, result.info
        trace.validate()
        pushes = trace.take(trace.kind == PUSH)
        for shard in range(3):
            assert pushes.count[pushes.shard == shard].sum() == 3 * 40
        computed = trace.take(trace.kind == COMPUTE)
        kept = computed.take(computed.status != DROPPED)
        assert set(kept.step.tolist()) == set(range(3 * 40))
        failed = trace.take(trace.kind == FAIL)
        assert len(kept) == 3 * 40 + failed.count.sum(), "what failures took"
        assert (computed.count > 0).sum() <= info.backups
        if strategy != "backups":
            assert info.backups == info.dropped == 0
        if strategy == "static" and not len(failed):
            assert len(pushes) == 3 * 3 * 5
        assert len(result.seconds) == 3 and (result.seconds > 0).all()
        assert [e["seconds"] for e in trace.evaluations] == result.seconds.tolist()


def test_failures_do_happen_there():
    result = run(CLUSTERS["failing and far"], evaluations=10)
    assert result.info.returned > 5 and result.info.repaired > 0


def test_the_same_seed_gives_the_same_trace():
    a, b = (run(CLUSTERS["failing and far"], seed=3) for _ in range(2))
    assert a.trace.diff(b.trace) is None
    assert a.trace.diff(run(CLUSTERS["failing and far"], seed=4).trace) is not None


def test_parameters_are_fetched_once_an_evaluation():
    trace = run(Cluster(step_time=1.0)).trace
    assert np.count_nonzero(trace.kind == FETCH) == 5 * 3 * 3


def test_equal_machines_in_step_are_ideal_however_split():
    for strategy in ("backups", "portions", "static"):
        result = run(Cluster(step_time=Constant(2.0)), strategy, evaluations=1)
        np.testing.assert_allclose(result.seconds, result.ideal)


def test_the_trace_can_be_saved_and_drawn(tmp_path):
    trace = run(CLUSTERS["failing"]).trace
    trace.save(tmp_path / "trace.npz")
    assert dbjax.Trace.load(tmp_path / "trace.npz").diff(trace) is None
    trace.to_perfetto(tmp_path / "trace.json")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"strategy": "luck"}, "strategy must be one of"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"portions": 0}, "portions must be at least 1"),
        ({"copies": 0}, "copies must be at least 1"),
    ],
)
def test_bad_arguments_are_errors(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        schedule(Cluster(), **{"replicas": 2, "portions": 4, **arguments})


def test_a_cluster_must_be_one():
    with pytest.raises(TypeError, match="cluster must be a Cluster"):
        schedule("fast", replicas=2, portions=4)
