import numpy as np
import optax
import pytest

from dbjax import schedules
from dbjax.optim import delay_gradients, stale
from dbjax.trace import Trace
from tests.optim.stale_test import START, assert_equal, curvature, run_stale

MADE = {
    "constant": schedules.constant(97, 4),
    "cyclic": schedules.cyclic(97, 6),
    "bursts": schedules.bursts(97, 9, 7, 3),
    "straggler": schedules.straggler(97, 8),
    "growing": schedules.growing(97, 0.3, 11),
    "geometric": schedules.geometric(97, 3.0, seed=5),
    "worst_first": schedules.worst_first(schedules.geometric(97, 3.0, seed=5)),
}


@pytest.mark.parametrize("name", MADE)
def test_each_is_possible_and_is_taken_by_whoever_takes_delays(name):
    delays = MADE[name]
    assert delays.shape == (97,) and delays.dtype == np.int64 and delays.max() > 2
    trace = Trace.from_delays(delays)
    trace.validate()
    np.testing.assert_array_equal(trace.staleness()[:, 0], delays)
    stale(optax.sgd(0.1), delays).init(START)
    delay_gradients(optax.sgd(0.1), delays).init(START)


def test_one_step_is_enough_for_each():
    for made in (
        schedules.constant(1, 4),
        schedules.cyclic(1, 6),
        schedules.bursts(1, 9, 1),
        schedules.straggler(1, 0),
        schedules.growing(1, 1.0, 3),
        schedules.geometric(1, 0.0, seed=0),
        schedules.worst_first([0]),
        schedules.per_stage(1, 1)[0],
    ):
        assert made.tolist() == [0]


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_the_straggler_is_one_replica_and_the_others_are_fresh(delay):
    delays = schedules.straggler(60, delay)
    late = np.flatnonzero(delays)
    assert set(delays[late]) <= {delay}
    # It has computed each gradient since its last push.
    assert (np.diff(late) > delay).all() and len(late) == (60 // (delay + 1)) * (
        delay > 0
    )
    assert Trace.from_delays(delays).header["replicas"] == 1 + (delay > 0)


@pytest.mark.parametrize("period", [1, 2, 4])
def test_cyclic_delays_are_steps_on_summed_gradients(period):
    got = run_stale(stale(optax.sgd(0.01), schedules.cyclic(12, period)), 12)
    params = START
    for _ in range(12 // period):
        g = curvature(params)
        params = {name: params[name] - 0.01 * period * g[name] for name in params}
    for name in params:
        np.testing.assert_allclose(got[-1][name], params[name], rtol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0, 20.0])
def test_geometric_delays_have_their_mean_and_seed(mean):
    delays = schedules.geometric(50_000, mean, seed=1)
    error = 5 * np.sqrt(mean * (1 + mean) / 50_000)  # five standard errors
    assert abs(delays.mean() - mean) <= error
    np.testing.assert_array_equal(delays, schedules.geometric(50_000, mean, seed=1))
    other = schedules.geometric(50_000, mean, seed=2)
    assert (delays != other).any() == (mean > 0)


@pytest.mark.parametrize("seed", range(20))
def test_worst_first_is_the_same_delays_each_as_early_as_can_be(seed):
    rng = np.random.default_rng(seed)
    delays = rng.integers(0, np.minimum(np.arange(30), 1 + seed) + 1)
    given = delays.copy()
    worst = schedules.worst_first(delays)
    np.testing.assert_array_equal(delays, given)
    assert sorted(worst) == sorted(delays)
    for t in range(30):  # by trying all that are left
        assert worst[t] == max(d for d in worst[t:] if d <= t)


def test_the_stages_of_a_pipeline():
    delays = schedules.per_stage(9, 4)
    for rank in range(4):
        np.testing.assert_array_equal(
            delays[:, rank], schedules.constant(9, 4 - rank - 1)
        )
    delay = schedules.pipeline(4, len)
    assert [delay("a" * rank) for rank in range(4)] == [3, 2, 1, 0]
    assert_equal(
        run_stale(stale(optax.sgd(0.1), schedules.pipeline(1, lambda path: 0)), 5),
        run_stale(stale(optax.sgd(0.1), 0), 5),
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.constant(0, 1), "steps must be .*0"),
        (lambda: schedules.constant(3, -1), "delay must be .*-1"),
        (lambda: schedules.constant(3, 1.5), "delay must be .*1.5"),
        (lambda: schedules.cyclic(3, 0), "period must be .*0"),
        (lambda: schedules.bursts(3, 1, 0), "every must be .*0"),
        (lambda: schedules.bursts(3, 1, 2, 3), "length=3: .* from 0 to 2"),
        (lambda: schedules.straggler(3, -2), "delay must be .*-2"),
        (lambda: schedules.growing(3, 1.5, 2), "fraction=1.5: .* from 0 to 1"),
        (lambda: schedules.growing(3, 0.5, -1), "most must be .*-1"),
        (lambda: schedules.geometric(3, -1.0, 0), "mean=-1.0"),
        (lambda: schedules.geometric(3, np.nan, 0), "mean=nan"),
        (lambda: schedules.geometric(3, 1.0, -1), "seed must be .*-1"),
        (lambda: schedules.worst_first([0, 2]), r"delays\[1\] is 2: .* 0 to 1"),
        (lambda: schedules.worst_first([0.0]), "float64 of shape"),
        (lambda: schedules.per_stage(3, 0), "stages must be .*0"),
        (lambda: schedules.pipeline(0, len), "stages must be .*0"),
        (lambda: schedules.pipeline(2, len)("ab"), r"rank_of\('ab'\) is 2: .* 0 to 1"),
    ],
)
def test_what_is_not_allowed_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
