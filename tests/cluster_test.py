import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

import dbjax
from dbjax.cluster import (
    Cluster,
    Constant,
    Empirical,
    Exponential,
    Failures,
    Gamma,
    LogNormal,
    Pareto,
    Purpose,
    Slow,
    Slowness,
    uniform,
)
from dbjax.trace import COMPUTE, FETCH, PUSH, Trace

DRAWS = 1_000_000
LOGNORMAL_SIGMA = math.sqrt(math.log1p(0.3**2))
REFERENCES = {
    LogNormal(2.0, spread=0.3): scipy.stats.lognorm(
        LOGNORMAL_SIGMA, scale=2.0 * math.exp(-(LOGNORMAL_SIGMA**2) / 2)
    ),
    Gamma(2.0, shape=3.0): scipy.stats.gamma(3.0, scale=2.0 / 3.0),
    Gamma(2.0, shape=0.5): scipy.stats.gamma(0.5, scale=4.0),
    Exponential(2.0): scipy.stats.expon(scale=2.0),
    Pareto(2.0, shape=5.0): scipy.stats.pareto(5.0, scale=2.0 * 4.0 / 5.0),
}
BUSY = Cluster(
    step_time=Gamma(1.0, shape=4.0),
    speeds=LogNormal(1.0, spread=0.2),
    slow=Slow(fraction=0.3, factor=5.0),
    slowness=Slowness(3.0, mean_slow=5.0, mean_normal=20.0),
    latency=Exponential(0.1),
    shard_service=LogNormal(0.01, spread=0.5),
    failures=Failures(uptime=Exponential(100.0), downtime=Gamma(5.0, shape=2.0)),
    join=Exponential(3.0),
)


def wrong(value: Any) -> Any:
    """Hide from the type checker that a test passes a value of the wrong type."""
    return value


def assert_drawn_from(sample, distribution):
    """Bounds of five standard errors: of the mean, and of the share below quantiles."""
    sample = np.ravel(sample)
    error = 5 * distribution.std() / math.sqrt(sample.size)
    assert abs(sample.mean() - distribution.mean()) < error
    for level in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = np.mean(sample <= distribution.ppf(level))
        assert abs(share - level) < 5 * math.sqrt(level * (1 - level) / sample.size)


# Hashed uniforms.


def test_uniforms_fill_the_open_interval_evenly_and_do_not_repeat():
    draws = uniform(0, Purpose.COMPUTE, np.arange(1000)[:, None], np.arange(1000))
    assert draws.shape == (1000, 1000) and draws.dtype == np.float64
    assert 0 < draws.min() < 1e-5 and 1 - 1e-5 < draws.max() < 1
    assert np.unique(draws).size == draws.size
    assert scipy.stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("other", ["seed", "purpose", "replica", "step", "shard"])
def test_neighbouring_keys_are_independent(other):
    key: dict[str, Any] = {"seed": 3, "purpose": 1, "replica": np.arange(500)[:, None]}
    key |= {"step": np.arange(500), "shard": 0}
    draws = uniform(**key).ravel()
    neighbours = uniform(**key | {other: key[other] + 1}).ravel()
    if other == "replica":
        draws, neighbours = draws[500:], uniform(**key).ravel()[:-500]
    bound = 5 / math.sqrt(draws.size)
    assert abs(np.corrcoef(draws, neighbours)[0, 1]) < bound
    assert not np.any(draws == neighbours)


def test_keys_do_not_cancel_out():
    # A sum of multiples would give (seed 1, replica 0) and (seed 0, replica 1) one key.
    grid = np.arange(12)
    draws = [
        uniform(seed, purpose, grid[:, None, None], grid[:, None], grid)
        for seed in range(12)
        for purpose in range(12)
    ]
    assert np.unique(draws).size == 12**5


def test_uniforms_are_the_same_in_every_process_and_version():
    draws = uniform(7, Purpose.COMPUTE, [0, 1, 10_000], [0, 5, 1_000_000], [0, 1, 9])
    assert draws.tolist() == [
        0.6463653823485905,
        0.1045918068618229,
        0.2605763364746242,
    ]


def test_a_seed_may_be_of_any_size():
    assert uniform(2**63, 1, 0, 0) != uniform(2**63 - 1, 1, 0, 0)
    assert 0 < uniform(10**30, 1, 0, 0) < 1


# Distributions.


@pytest.mark.parametrize("distribution", REFERENCES, ids=repr)
def test_quantiles_and_means_are_those_of_scipy(distribution):
    reference = REFERENCES[distribution]
    u = np.array([1e-12, 1e-4, 0.1, 0.5, 0.9, 0.9999, 1 - 1e-12])
    np.testing.assert_allclose(distribution.quantile(u), reference.ppf(u), rtol=1e-9)
    assert distribution.mean == pytest.approx(reference.mean())


@pytest.mark.parametrize("distribution", REFERENCES, ids=repr)
def test_draws_have_the_mean_and_the_quantiles(distribution):
    cluster = Cluster(step_time=distribution)
    times = cluster.compute_times(0, np.arange(1000), 0, DRAWS // 1000)
    assert_drawn_from(times, REFERENCES[distribution])


@pytest.mark.parametrize("distribution", [*REFERENCES, Empirical([0.5, 2.0])], ids=repr)
def test_quantiles_leave_their_argument_alone_and_rise_within_finite_bounds(
    distribution,
):
    u = np.array([2.0**-53, 0.3, 0.6, 1 - 2.0**-53])
    kept = u.copy()
    values = distribution.quantile(u)
    np.testing.assert_array_equal(u, kept)
    assert np.all(np.isfinite(values)) and np.all(np.diff(values) >= 0)
    assert values[0] >= 0


def test_lognormal_spread_is_relative_to_the_mean():
    times = Cluster(step_time=LogNormal(4.0, 0.1)).compute_times(
        0, np.arange(100), 0, 10_000
    )
    assert times.std() == pytest.approx(0.4, rel=0.005)
    still = Cluster(step_time=LogNormal(4.0, 0.0)).compute_times(0, np.arange(2), 0, 2)
    np.testing.assert_allclose(still, 4.0, rtol=1e-15)


def test_empirical_draws_each_value_equally_often():
    values = [3.0, 1.0, 1.0, 7.0]
    distribution = Empirical(values)
    times = Cluster(step_time=distribution).compute_times(0, np.arange(100), 0, 10_000)
    drawn, counts = np.unique(times, return_counts=True)
    assert drawn.tolist() == [1.0, 3.0, 7.0]
    bound = 5 * math.sqrt(0.25 * 0.75 / times.size)
    np.testing.assert_allclose(counts / times.size, [0.5, 0.25, 0.25], atol=bound)
    assert distribution.mean == 3.0
    assert distribution == Empirical(np.array(values[::-1]))
    assert repr(distribution) == "Empirical(4 values of mean 3)"
    top = distribution.quantile(np.array([2.0**-53, 1 - 2.0**-53]))
    assert top.tolist() == [1.0, 7.0]


# Keyed draws.


def times(cluster, seed=0, replicas=range(6), first=0, count=40):
    return cluster.compute_times(seed, np.array(replicas), first, count)


@pytest.mark.parametrize("cluster", [Cluster(), BUSY], ids=["equal", "busy"])
def test_compute_times_do_not_depend_on_blocks_or_other_replicas(cluster):
    whole = times(cluster)
    assert whole.shape == (6, 40) and whole.flags.writeable
    np.testing.assert_array_equal(whole, times(cluster))
    for first, count in ((0, 1), (7, 1), (13, 20), (39, 1), (5, 0)):
        block = times(cluster, first=first, count=count)
        np.testing.assert_array_equal(block, whole[:, first : first + count])
    np.testing.assert_array_equal(times(cluster, replicas=[5, 0, 5]), whole[[5, 0, 5]])
    assert times(cluster, replicas=np.arange(0)).shape == (0, 40)
    assert not np.any(times(cluster, seed=1) == whole)


def test_draws_do_not_depend_on_the_size_of_the_block_that_is_hashed():
    cluster = Cluster()
    many = cluster.compute_times(0, np.arange(3), 0, 50_000)
    np.testing.assert_array_equal(
        many[:, 49_990:], cluster.compute_times(0, np.arange(3), 49_990, 10)
    )


def test_a_change_of_one_thing_leaves_the_other_draws_as_they_were():
    other = dataclasses.replace(BUSY, step_time=Exponential(9.0), slow=None)
    replicas = np.arange(20)
    np.testing.assert_array_equal(
        BUSY.latencies(0, replicas, 0, 9, 2, 0),
        other.latencies(0, replicas, 0, 9, 2, 0),
    )
    np.testing.assert_array_equal(
        BUSY.join_times(0, replicas), other.join_times(0, replicas)
    )
    np.testing.assert_array_equal(
        BUSY.service_times(0, replicas, 0, 9, 2),
        other.service_times(0, replicas, 0, 9, 2),
    )
    assert BUSY.outage(0, 3, 1) == other.outage(0, 3, 1)
    # A scaled time is the same draw, scaled: clusters compare pairwise.
    slower = Cluster(step_time=LogNormal(2.0, spread=0.1))
    np.testing.assert_allclose(times(slower), 2 * times(Cluster()), rtol=1e-14)


@pytest.mark.parametrize("what", ["to", "back", "service"])
def test_draws_per_shard_do_not_depend_on_blocks_replicas_or_shards(what):
    def draws(replicas, first, count, shards):
        if what == "service":
            return BUSY.service_times(0, replicas, first, count, shards)
        direction = int(what == "back")
        return BUSY.latencies(0, replicas, first, count, shards, direction)

    whole = draws(np.arange(50), 0, 60, 7)
    assert whole.shape == (50, 60, 7)
    assert np.unique(whole).size == whole.size
    part = draws(np.array([9, 4]), 11, 13, 3)
    np.testing.assert_array_equal(part, whole[[9, 4], 11:24, :3])
    mean = 0.01 if what == "service" else 0.1
    assert whole.mean() == pytest.approx(mean, rel=0.05)


def test_both_directions_are_drawn_apart():
    to, back = (BUSY.latencies(0, np.arange(50), 0, 50, 2, way) for way in (0, 1))
    assert abs(np.corrcoef(to.ravel(), back.ravel())[0, 1]) < 5 / math.sqrt(to.size)


def test_constants_cost_no_memory():
    cluster = Cluster(step_time=2, latency=0.25)
    replicas = np.arange(100_000)
    latencies = cluster.latencies(0, replicas, 0, 100_000, 10, 0)
    assert latencies.shape == (100_000, 100_000, 10)
    assert latencies[5, 7, 1] == 0.25
    assert cluster.service_times(0, replicas, 0, 100_000, 10)[0, 0, 0] == 0.0
    assert np.all(times(cluster) == 2.0) and times(cluster).flags.writeable


# Speeds, slow replicas, joins, links.


def test_speeds_divide_step_times():
    plain = times(Cluster())
    np.testing.assert_allclose(times(Cluster(speeds=4)), plain / 4, rtol=1e-15)
    speeds = (1.0, 2.0, 0.5, 1.0, 10.0, 3.0, 7.0)
    expected = plain / np.array(speeds[:6])[:, None]
    for given in (speeds, list(speeds), np.array(speeds)):
        np.testing.assert_allclose(times(Cluster(speeds=given)), expected, rtol=1e-15)
    drawn = Cluster(step_time=1.0, speeds=Gamma(2.0, shape=3.0)).compute_times(
        0, np.arange(100_000), 0, 2
    )
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    assert_drawn_from(1 / drawn[:, 0], REFERENCES[Gamma(2.0, shape=3.0)])


def test_a_share_of_replicas_or_named_ones_are_slow_throughout():
    cluster = Cluster(step_time=1.0, slow=Slow(fraction=0.02, factor=10.0))
    drawn = cluster.compute_times(0, np.arange(100_000), 0, 2)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    assert set(np.unique(drawn)) == {1.0, 10.0}
    bound = 5 * math.sqrt(0.02 * 0.98 / len(drawn))
    assert abs(np.mean(drawn[:, 0] == 10.0) - 0.02) < bound
    other = cluster.compute_times(1, np.arange(100_000), 0, 1)
    assert not np.array_equal(drawn[:, :1], other)
    named = Cluster(step_time=1.0, slow=Slow(factor=3.0, replicas=[5, 1]))
    assert times(named, count=1)[:, 0].tolist() == [1.0, 3.0, 1.0, 1.0, 1.0, 3.0]
    for fraction, expected in ((0.0, 1.0), (1.0, 10.0)):
        assert np.all(times(Cluster(step_time=1, slow=Slow(fraction))) == expected)


def test_join_times():
    replicas = np.array([2, 0])
    assert Cluster().join_times(0, replicas).tolist() == [0.0, 0.0]
    assert Cluster(join=3).join_times(0, replicas).tolist() == [3.0, 3.0]
    assert Cluster(join=[0, 5, 9]).join_times(0, replicas).tolist() == [9.0, 0.0]
    joins = Cluster(join=Exponential(2.0)).join_times(0, np.arange(200_000))
    assert_drawn_from(joins, REFERENCES[Exponential(2.0)])


def test_links_and_flags():
    assert Cluster().transfer_time(10**9) == 0.0
    assert Cluster(bandwidth=1e6).transfer_time(500_000) == 0.5
    assert not Cluster().queues and not Cluster(shard_service=0).queues
    assert Cluster(shard_service=0.1).queues
    assert Cluster(shard_service=Exponential(0.1)).queues
    assert not Cluster().fails and Cluster.failing().fails


def test_outages_are_keyed_by_replica_and_number():
    assert Cluster().outage(0, 0, 0) == (math.inf, 0.0)
    outages = np.array([BUSY.outage(0, r, k) for r in range(60) for k in range(60)])
    assert np.unique(outages).size == outages.size
    assert tuple(outages[60 * 7 + 2]) == BUSY.outage(0, 7, 2)
    up, down = outages.T
    assert_drawn_from(up, scipy.stats.expon(scale=100.0))
    assert_drawn_from(down, scipy.stats.gamma(2.0, scale=2.5))
    fixed = Cluster(failures=Failures(uptime=5, downtime=0))
    assert fixed.outage(0, 1, 2) == (5.0, 0.0)


# Slowness that comes and goes.


def states(slowness, replicas, first, count, seed=0):
    cluster = Cluster(step_time=1.0, slowness=slowness)
    drawn = cluster.compute_times(seed, np.asarray(replicas), first, count)
    assert set(np.unique(drawn)) <= {1.0, slowness.factor}
    return drawn == slowness.factor


def textbook_states(slowness, seed, replica, count):
    """The chain step by step, each state from the one before."""
    slow, chain = False, []
    for step in range(count):
        u = float(uniform(seed, Purpose.SLOWNESS, replica, step))
        if step == 0:
            slow = u < slowness.share
        elif slow:
            slow = u < 1 - 1 / slowness.mean_slow
        else:
            slow = u < 1 / slowness.mean_normal
        chain.append(slow)
    return chain


@pytest.mark.parametrize(
    "slowness",
    [Slowness(3.0, 2, 2), Slowness(3.0, 5, 50), Slowness(3.0, 200, 20)],
    ids=str,
)
def test_slowness_is_the_chain_and_does_not_depend_on_blocks(slowness):
    whole = states(slowness, range(8), 0, 400)
    for replica in range(8):
        assert whole[replica].tolist() == textbook_states(slowness, 0, replica, 400)
    for first, count in ((0, 1), (1, 1), (57, 1), (133, 200), (399, 1)):
        block = states(slowness, [6, 1], first, count)
        np.testing.assert_array_equal(block, whole[[6, 1], first : first + count])


def test_slowness_has_its_share_from_the_first_step_and_its_mean_lengths():
    slowness = Slowness(3.0, mean_slow=5.0, mean_normal=20.0)
    assert slowness.share == pytest.approx(0.2)
    slow = states(slowness, range(20_000), 0, 100)
    # One column is independent draws; the neighbours within a row are not.
    bound = 5 * math.sqrt(0.2 * 0.8 / 20_000)
    for step in (0, 1, 10, 99):
        assert abs(slow[:, step].mean() - 0.2) < bound
    was, now = slow[:, :-1], slow[:, 1:]
    for before, chance in ((True, 1 / 5), (False, 1 / 20)):
        left = (now != was)[was == before]
        bound = 5 * math.sqrt(chance * (1 - chance) / left.size)
        assert abs(left.mean() - chance) < bound


def test_slowness_looks_back_over_long_undecided_stretches():
    slowness = Slowness(2.0, mean_slow=1e5, mean_normal=1e5)
    whole = states(slowness, range(4), 0, 300_000)
    assert 0 < whole.mean() < 1
    for first in (20_000, 150_000, 299_999):
        np.testing.assert_array_equal(
            states(slowness, range(4), first, 1), whole[:, first : first + 1]
        )
    # Far more replicas than one look back holds at a time.
    many = states(slowness, range(70_000), 30, 1)
    np.testing.assert_array_equal(many, states(slowness, range(70_000), 0, 31)[:, 30:])


def test_slowness_multiplies_the_other_times():
    slowness = Slowness(3.0, 5, 20)
    slow = states(slowness, range(6), 0, 40)
    expected = np.where(slow, 3 * times(Cluster()), times(Cluster()))
    np.testing.assert_array_equal(times(Cluster(slowness=slowness)), expected)


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Constant(-1.0), ValueError, "Constant value .* at least 0; got -1"),
        (lambda: Constant(math.inf), ValueError, "finite number"),
        (lambda: Constant(True), TypeError, "must be a number; got True"),
        (lambda: LogNormal(0.0, 0.1), ValueError, "LogNormal mean .* above 0; got 0"),
        (lambda: LogNormal(1.0, -0.1), ValueError, "LogNormal spread .* got -0.1"),
        (lambda: LogNormal(wrong("1"), 0.1), TypeError, "LogNormal mean .* got '1'"),
        (lambda: LogNormal(math.nan, 0.1), ValueError, "got nan"),
        (lambda: Gamma(-1.0, 2.0), ValueError, "Gamma mean"),
        (lambda: Gamma(1.0, 0.0), ValueError, "Gamma shape .* above 0"),
        (lambda: Exponential(0.0), ValueError, "Exponential mean"),
        (lambda: Pareto(0.0, 2.0), ValueError, "Pareto mean"),
        (lambda: Pareto(1.0, 1.0), ValueError, "Pareto shape .* above 1; got 1"),
        (lambda: Empirical([]), ValueError, "Empirical values .* at least one"),
        (lambda: Empirical([1.0, -2.0]), ValueError, r"Empirical values\[1\]"),
        (lambda: Empirical(wrong(3.0)), TypeError, "sequence of numbers; got 3.0"),
        (lambda: Empirical(wrong("12")), TypeError, "sequence of numbers; got '12'"),
        (lambda: Empirical(np.ones((2, 2))), TypeError, "sequence of numbers"),
        (lambda: Slow(fraction=1.5), ValueError, "Slow fraction .* at most 1; got 1.5"),
        (lambda: Slow(factor=0.5), ValueError, "Slow factor .* at least 1; got 0.5"),
        (lambda: Slow(replicas=()), ValueError, "Slow replicas .* got \\(\\)"),
        (lambda: Slow(replicas=(-1,)), ValueError, "Slow replicas"),
        (lambda: Slow(replicas=wrong((1.5,))), ValueError, "Slow replicas"),
        (lambda: Slowness(0.5, 5, 5), ValueError, "Slowness factor"),
        (lambda: Slowness(2.0, 1.5, 5), ValueError, "mean_slow .* at least 2; got 1.5"),
        (lambda: Slowness(2.0, 5, 1), ValueError, "mean_normal .* at least 2; got 1"),
        (lambda: Slowness(2.0, 5, math.inf), ValueError, "mean_normal"),
        (lambda: Failures(0.0, 1.0), ValueError, "uptime's mean .* above 0; got 0"),
        (lambda: Failures(1.0, -1.0), ValueError, "Failures downtime .* got -1"),
        (
            lambda: Failures(wrong("never"), 1.0),
            TypeError,
            "Failures uptime .* 'never'",
        ),
        (lambda: Cluster(step_time=0.0), ValueError, "step_time's mean .* above 0"),
        (lambda: Cluster(step_time=-1.0), ValueError, "step_time .* got -1"),
        (lambda: Cluster(step_time=wrong(None)), TypeError, "step_time .* got None"),
        (
            lambda: Cluster(step_time=wrong(Exponential)),
            TypeError,
            "step_time .* got <class",
        ),
        (lambda: Cluster(speeds=0.0), ValueError, "speeds's mean .* above 0"),
        (lambda: Cluster(speeds=(1.0, 0.0)), ValueError, r"speeds\[1\] .* above 0"),
        (lambda: Cluster(speeds=()), ValueError, "speeds .* at least one"),
        (lambda: Cluster(speeds=Empirical([0, 1])), ValueError, "speeds's smallest"),
        (lambda: Cluster(speeds=wrong("fast")), TypeError, "speeds .* got 'fast'"),
        (
            lambda: Cluster(slow=wrong(0.02)),
            TypeError,
            "slow must be None or a Slow; got 0.02",
        ),
        (lambda: Cluster(slowness=wrong(Slow())), TypeError, "slowness .* a Slowness"),
        (
            lambda: Cluster(failures=wrong(3.0)),
            TypeError,
            "failures .* a Failures; got 3.0",
        ),
        (lambda: Cluster(latency=-0.1), ValueError, "latency .* at least 0; got -0.1"),
        (lambda: Cluster(latency=math.inf), ValueError, "latency .* finite"),
        (lambda: Cluster(bandwidth=0.0), ValueError, "bandwidth .* above 0; got 0"),
        (lambda: Cluster(bandwidth=math.nan), ValueError, "bandwidth"),
        (lambda: Cluster(shard_service=-1), ValueError, "shard_service"),
        (lambda: Cluster(join=-1.0), ValueError, "join .* at least 0; got -1"),
        (lambda: Cluster(join=[0.0, -1.0]), ValueError, r"join\[1\]"),
    ],
)
def test_bad_fields_are_refused_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: times(Cluster(), seed=-1), ValueError, "seed .* at least 0; got -1"),
        (lambda: times(Cluster(), seed=1.5), ValueError, "seed .* integer"),
        (lambda: times(Cluster(), first=-1), ValueError, "first .* got -1"),
        (lambda: times(Cluster(), count=2.0), ValueError, "count .* got 2.0"),
        (lambda: times(Cluster(), count=True), ValueError, "count .* got True"),
        (lambda: times(Cluster(), replicas=[-1]), ValueError, "replicas .* got -1"),
        (lambda: times(Cluster(), replicas=[0.5]), TypeError, "replicas .* integer"),
        (lambda: times(Cluster(), replicas=3), TypeError, "one-dimensional"),
        (
            lambda: times(Cluster(speeds=[1.0, 2.0])),
            ValueError,
            "speeds .* holds 2, and replica 5 was asked for",
        ),
        (
            lambda: Cluster(join=[0.0]).join_times(0, np.arange(2)),
            ValueError,
            "join .* holds 1, and replica 1",
        ),
        (
            lambda: Cluster().latencies(0, np.arange(2), 0, 1, 0, 0),
            ValueError,
            "shards must be at least 1; got 0",
        ),
        (
            lambda: Cluster().latencies(0, np.arange(2), 0, 1, 1, 2),
            ValueError,
            "direction must be 0 .* got 2",
        ),
        (lambda: BUSY.outage(0, 0, -1), ValueError, "k must be .* got -1"),
        (lambda: BUSY.outage(0, -1, 0), ValueError, "replica must be .* got -1"),
    ],
)
def test_bad_arguments_are_refused(ask, error, words):
    with pytest.raises(error, match=words):
        ask()


# Fields, presets, calibration.


def test_clusters_compare_by_value_and_keep_what_they_were_given():
    assert Cluster(latency=0.5, speeds=[1, 2]) == Cluster(
        latency=Constant(0.5), speeds=np.array([1.0, 2.0])
    )
    assert Cluster(latency=0.5) != Cluster(latency=0.6)
    assert len({Cluster(), Cluster.equal(), BUSY, Cluster.fit(record(BUSY))}) == 3
    assert dataclasses.replace(BUSY, join=0.0).join == Constant(0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        wrong(BUSY).latency = 1.0


@pytest.mark.parametrize("name", ["equal", "heavy_tailed", "slow_tail", "failing"])
def test_presets_have_a_mean_step_of_one_second(name):
    cluster = getattr(Cluster, name)()
    assert cluster.step_time.mean == 1.0
    assert np.all(times(cluster) > 0)


def record(cluster, replicas=6, steps=400, shards=2, seed=0):
    """A Trace of replicas that fetch, compute and push without waiting."""
    who = np.arange(replicas)
    rows = {"kind": [], "start": [], "seconds": [], "replica": [], "shard": []}

    def add(kind, seconds):
        seconds = np.atleast_3d(seconds)
        owner, step, shard = np.indices(seconds.shape)
        rows["kind"].append(np.full(seconds.size, kind))
        # Nothing overlaps: a fetch that a push lies within has waited for it.
        rows["start"].append(3.0 * step.ravel() + len(rows["kind"]))
        rows["seconds"].append(seconds.ravel())
        rows["replica"].append(owner.ravel())
        rows["shard"].append(shard.ravel())

    way = [cluster.latencies(seed, who, 0, steps, shards, way) for way in (0, 1)]
    add(FETCH, way[0] + way[1])
    add(COMPUTE, cluster.compute_times(seed, who, 0, steps))
    add(PUSH, cluster.service_times(seed, who, 0, steps, shards))
    columns: dict[str, Any] = {
        name: np.concatenate(parts) for name, parts in rows.items()
    }
    columns["time"] = columns["start"] + columns.pop("seconds")
    return Trace.from_columns({"replicas": replicas, "shards": shards}, **columns)


def test_fit_recovers_a_known_cluster():
    speeds = (1.0, 1.0, 0.1, 1.0, 4.0, 1.0)
    known = Cluster(
        step_time=Gamma(2.0, shape=3.0),
        speeds=speeds,
        latency=Exponential(0.1),
        shard_service=LogNormal(0.02, spread=0.3),
    )
    fitted: Any = Cluster.fit(record(known, steps=20_000))
    # The relative error of a mean of n gamma times of shape 3 is 1 / sqrt(3 n).
    bound = 5 * 2 / math.sqrt(3 * 20_000)
    np.testing.assert_allclose(fitted.speeds, speeds, rtol=bound)
    u = np.array([0.01, 0.1, 0.5, 0.9, 0.99])
    for name, tolerance in (("step_time", 0.03), ("shard_service", 0.01)):
        fit, truth = getattr(fitted, name), getattr(known, name)
        assert fit.mean == pytest.approx(truth.mean, rel=0.01)
        np.testing.assert_allclose(fit.quantile(u), truth.quantile(u), rtol=tolerance)
    assert fitted.latency.mean == pytest.approx(0.1, rel=0.01)
    assert fitted.bandwidth == math.inf and not fitted.fails
    assert len(fitted.step_time.values) == 10_000


def test_fit_keeps_each_replicas_mean_step_time():
    trace = record(BUSY)
    seconds = (trace.time - trace.start)[trace.kind == COMPUTE].reshape(6, 400)
    fitted: Any = Cluster.fit(trace)
    np.testing.assert_allclose(
        fitted.step_time.mean / np.array(fitted.speeds), seconds.mean(1), rtol=1e-12
    )
    again = fitted.compute_times(1, np.arange(6), 0, 20_000)
    np.testing.assert_allclose(again.mean(1), seconds.mean(1), rtol=0.05)


@pytest.mark.parametrize("steps", [100, 3_000])  # 18,000 steps are thinned
def test_fit_of_constants_gives_constants_for_all_rounding(steps):
    known = Cluster(step_time=0.7, latency=0.05, shard_service=0.01)
    fitted: Any = Cluster.fit(record(known, steps=steps))
    for name in ("step_time", "latency", "shard_service"):
        assert isinstance(getattr(fitted, name), Constant)
        assert getattr(fitted, name).mean == pytest.approx(getattr(known, name).mean)
    np.testing.assert_allclose(fitted.speeds, 1.0)
    still = Cluster.fit(record(Cluster(), steps=steps))
    assert still.latency == Constant(0.0) and not still.queues


def test_fit_does_not_count_a_push_as_the_way_of_the_fetch_behind_it():
    known = Cluster(step_time=0.7, latency=0.05, shard_service=0.2)
    trace = dbjax.simulate(known, replicas=1, steps=300, shards=2)
    fitted: Any = Cluster.fit(trace)
    for name in ("step_time", "latency", "shard_service"):
        assert getattr(fitted, name).mean == pytest.approx(getattr(known, name).mean)
    again = dbjax.simulate(fitted, replicas=1, steps=300, shards=2)
    assert again.time[-1] == pytest.approx(trace.time[-1])


def test_thinning_keeps_the_mean():
    trace = record(Cluster(step_time=Pareto(1.0, 2.5)), replicas=1, steps=15_001)
    seconds = (trace.time - trace.start)[trace.kind == COMPUTE]
    fitted: Any = Cluster.fit(trace)
    assert len(fitted.step_time.values) == 10_000
    assert fitted.step_time.mean == pytest.approx(seconds.mean(), rel=1e-12)


def test_replicas_that_computed_nothing_have_the_typical_speed():
    trace = record(Cluster(speeds=(1.0, 2.0, 4.0)), replicas=3)
    fitted: Any = Cluster.fit(trace.take(trace.replica != 0))
    assert len(fitted.speeds) == 3
    assert fitted.speeds[0] == 1.0


@pytest.mark.parametrize("latency", [0.0, 0.05])
def test_fit_counts_what_a_replica_does_between_two_steps(latency):
    """A record in which a step's last fifth is no row's time: it is fitted whole."""
    known = Cluster(step_time=1.0, speeds=(1.0, 0.5), latency=latency)
    whole = dbjax.simulate(known, replicas=2, steps=200, shards=2)
    computed = whole.kind == COMPUTE
    seconds = np.where(computed, whole.time - whole.start, 0.0)
    cut = dataclasses.replace(whole, time=whole.time - 0.2 * seconds)
    fitted: Any = Cluster.fit(cut)
    np.testing.assert_allclose(
        fitted.step_time.mean / np.array(fitted.speeds), [1.0, 2.0], rtol=1e-6
    )
    assert fitted.latency.mean == pytest.approx(latency, rel=1e-6, abs=1e-12)
    header = whole.header | {"protocol": "ssp(1)"}  # which may have made it wait
    waits: Any = Cluster.fit(dataclasses.replace(cut, header=header))
    assert waits.step_time.mean / waits.speeds[1] == pytest.approx(1.6)


def test_fit_refuses_traces_that_say_nothing():
    trace = record(BUSY)
    with pytest.raises(
        ValueError, match="must hold COMPUTE rows that took time; got 0"
    ):
        Cluster.fit(trace.take(trace.kind != COMPUTE))
    with pytest.raises(ValueError, match="got 0 such rows"):
        Cluster.fit(trace.take(slice(0, 0)))
    backwards = dataclasses.replace(trace, time=trace.time - 2.0)
    with pytest.raises(ValueError, match="end after they start; row"):
        Cluster.fit(backwards)
