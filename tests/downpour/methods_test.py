"""Methods of replicas that train by themselves, against their papers' algorithms."""

import functools

import numpy as np
import optax
import pytest

import dbjax
from dbjax import downpour
from dbjax.downpour import async_diloco, diloco, proportional_steps
from dbjax.optim import LocalRule
from dbjax.trace import COMPUTE, PUSH
from tests import problems, textbook
from tests.problems import PARAMS, SGD, train

START = problems.flat(PARAMS).astype(np.float64)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
UNEVEN = dbjax.Emulated(dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0)), seed=1)
FAR = dbjax.Emulated(dbjax.Cluster(latency=dbjax.Exponential(0.4)), seed=2)

# The same objects for the same arguments, so that all runs share what is compiled.
parameter_averaging, easgd, diloco_of_sgd = (
    functools.cache(functools.partial(method, SGD))
    for method in (downpour.parameter_averaging, downpour.easgd, diloco)
)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.mark.parametrize(
    ("runtime", "shards"), [(dbjax.Emulated(), 1), (UNEVEN, 3), (FAR, 3)]
)
@pytest.mark.parametrize(("replicas", "every"), [(1, 4), (3, 1), (3, 4), (2, 12)])
def test_parameter_averaging(replicas, every, shards, runtime):
    settings = parameter_averaging(replicas=replicas, every=every)
    steps = 24 * replicas
    run = train(runtime, shards=shards, steps=steps, **settings)
    want = textbook.averaged(
        problems.gradient, START, 0.05, replicas, every, 24 // every
    )
    np.testing.assert_allclose(problems.flat(run.params), want, **CLOSE)
    problems.assert_replays(run, **settings)


@pytest.mark.parametrize(
    ("runtime", "shards"), [(dbjax.Emulated(), 1), (UNEVEN, 3), (FAR, 3)]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_diloco(momentum, shards, runtime):
    settings = diloco_of_sgd(replicas=3, every=4, momentum=momentum)
    run = train(runtime, shards=shards, steps=3 * 4 * 5, **settings)
    want = textbook.diloco(
        problems.gradient, START, 0.05, 3, 4, 5, rate=0.7, momentum=momentum
    )
    np.testing.assert_allclose(problems.flat(run.params), want, **CLOSE)
    problems.assert_replays(run, **settings)


def test_diloco_without_an_outer_rule_is_parameter_averaging():
    keywords = {"replicas": 3, "every": 4}
    outer = diloco(SGD, learning_rate=1.0, momentum=0.0, **keywords)
    one, other = (
        train(steps=60, **settings)
        for settings in (outer, parameter_averaging(**keywords))
    )
    got, want = problems.flat(one.params), problems.flat(other.params)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_diloco_keeps_the_inner_rule_s_state():
    """AdamW's second round is not like its first."""
    inner = optax.adamw(1e-2)
    settings = diloco(inner, replicas=1, every=3, learning_rate=1.0, momentum=0.0)
    run = train(steps=12, **settings)
    loop = train(steps=12, replicas=1, optimizer=inner)
    want = problems.flat(loop.params)
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("runtime", "shards"), [(dbjax.Emulated(), 3), (UNEVEN, 1)])
@pytest.mark.parametrize(("replicas", "alpha"), [(1, 0.9), (3, 0.3), (4, None)])
@pytest.mark.parametrize("every", [1, 4])
def test_easgd(every, replicas, alpha, shards, runtime):
    """In its paper's own order where a push and the fetch after it are one turn."""
    settings = easgd(replicas=replicas, every=every, alpha=alpha)
    run = train(runtime, shards=shards, steps=12 * every, **settings)
    pushes = run.trace.take((run.trace.kind == PUSH) & (run.trace.shard == 0))
    whole = pushes.count == every
    turns = pushes.replica[: np.argmin(whole) if not whole.all() else None].tolist()
    assert len(turns) >= 8
    alpha = 0.9 / replicas if alpha is None else alpha
    want = textbook.easgd(problems.gradient, START, 0.05, alpha, turns, every)
    if whole.all():
        np.testing.assert_allclose(problems.flat(run.params), want, **CLOSE)
    problems.assert_replays(run, **settings)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("pushes", [1, 3])
def test_delayed_nesterov(pushes, momentum):
    seen = np.random.default_rng(pushes).standard_normal((9, 5)).astype(np.float32)
    rule = dbjax.optim.delayed_nesterov(0.7, momentum, pushes)
    state, want = rule.init(seen[0]), textbook.delayed_nesterov(
        seen, 0.7, momentum, pushes
    )  # fmt: skip
    plain = optax.sgd(0.7, momentum, nesterov=True)
    plain_state = plain.init(seen[0])
    for g, update in zip(seen, want, strict=True):
        got, state = rule.update(g, state)
        np.testing.assert_allclose(got, update, rtol=1e-5, atol=1e-6)
        if pushes == 1:
            same, plain_state = plain.update(g, plain_state)
            np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", [dbjax.Emulated(), dbjax.Threads()])
def test_each_replica_may_have_its_own_period(runtime):
    every = (4, 2, 1)
    settings = async_diloco(SGD, replicas=3, every=every)
    run = train(runtime, shards=2, steps=60, **settings)
    trace = run.trace
    trace.validate()
    assert trace.header["n_push"] == list(every)
    for replica, period in enumerate(every):
        mine = (trace.replica == replica) & (trace.shard == 1) & (trace.kind == PUSH)
        counts = trace.count[mine]
        assert set(counts[:-1]) <= {period} and counts[-1:].max(initial=0) <= period
        computed = (trace.kind == COMPUTE) & (trace.replica == replica)
        assert counts.sum() == computed.sum()
    problems.assert_replays(run, **settings)


@pytest.mark.parametrize("seed", range(3))
def test_equal_periods_are_one_period(seed):
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0))
    keywords = {"replicas": 4, "shards": 2, "steps": 90, "seed": seed}
    one = dbjax.simulate(cluster, n_fetch=3, n_push=2, **keywords)
    each = dbjax.simulate(cluster, n_fetch=(3,) * 4, n_push=[2] * 4, **keywords)
    assert one.diff(each) is None


def test_proportional_steps_let_all_push_equally_often():
    speeds = (1.0, 0.5, 0.25)
    cluster = dbjax.Cluster(step_time=1.0, speeds=speeds)
    every = proportional_steps(speeds, 8)
    assert every == (8, 4, 2)
    trace = dbjax.simulate(
        cluster, replicas=3, steps=14 * 20, n_fetch=every, n_push=every
    )
    pushes = np.bincount(trace.replica[trace.kind == PUSH])
    assert np.ptp(pushes) <= 1


def test_the_plain_rule_is_the_plain_run():
    """What `LocalRule` adds is nothing where it is asked for nothing."""
    keywords = {"n_fetch": 3, "n_push": 2, "shards": 2}
    one = train(local_optimizer=SGD, **keywords)
    other = train(local_optimizer=LocalRule(SGD), **keywords)
    problems.assert_same_bits(one.params, other.params)


@pytest.mark.parametrize("pushes", [1, 2, 4])
def test_softsync_applies_means(pushes):
    seen = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    rule, w = dbjax.optim.softsync(optax.sgd(0.1), pushes), np.zeros(3, np.float32)
    state = rule.init(w)
    for g in seen:
        updates, state = rule.update(g, state, w)
        w = w + np.asarray(updates)
    np.testing.assert_allclose(w, -0.1 * seen.sum(0) / pushes, rtol=1e-5)


def test_softsync_of_one_is_the_rule_itself():
    plain = train(optimizer=problems.MOMENTUM)
    soft = train(optimizer=dbjax.optim.softsync(problems.MOMENTUM, 1))
    problems.assert_same_bits(plain.params, soft.params)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: easgd(replicas=2, every=1, alpha=1.0), "alpha=1.0"),
        (lambda: dbjax.optim.softsync(SGD, 0), "pushes must be .*0"),
        (lambda: dbjax.optim.delayed_nesterov(0.1, 0.9, 1.5), "pushes must be .*1.5"),
        (lambda: proportional_steps((1.0, -1.0), 5), "speeds="),
        (lambda: proportional_steps((1.0,), 0), "most=0"),
        (lambda: parameter_averaging(replicas=2, every=0), "every must be .*0"),
        (lambda: train(local_optimizer=LocalRule(SGD, "weights")), "push must be"),
        (lambda: train(local_optimizer=LocalRule(SGD, attraction=0.0)), "attraction"),
        (lambda: train(n_push=(1, 2)), "n_push must be one number, or one for each"),
        (lambda: train(n_fetch=(1, 0, 1)), r"n_fetch\[1\]"),
    ],
)
def test_what_is_not_allowed_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
