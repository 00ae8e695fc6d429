"""Probes: what the textbook's versions say, and a replay that does not notice them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import trace as trace_lib
from dbjax.optim import LocalRule, stability_limit
from dbjax.server.layout import Layout
from tests import problems, textbook
from tests.problems import ADAGRAD, DATA, PARAMS, SGD, loss_fn
from tests.restored import random_restored

FAR = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    latency=dbjax.Exponential(0.4),
    shard_service=dbjax.Exponential(0.05),
)
FAILING = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    failures=dbjax.Failures(
        uptime=dbjax.Exponential(6.0), downtime=dbjax.Constant(1.0)
    ),
)
CASES = {
    "one shard": dict(replicas=3),
    "shards": dict(replicas=2, shards=3),
    "accrual": dict(replicas=4, shards=2, n_push=3, n_fetch=2),
    "overlap": dict(replicas=3, shards=2, n_push=2, overlap=True),
    "failing": dict(replicas=4, shards=2, n_push=2, cluster=FAILING),
}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@functools.cache
def simulated(case, seed=0):
    return dbjax.simulate(**{"cluster": FAR, "steps": 40, "seed": seed} | CASES[case])


def probe(trace, data=DATA, **keywords):
    keywords = {"optimizer": ADAGRAD} | keywords
    return dbjax.probe(trace, loss_fn, PARAMS, data, **keywords)


def places(shards):
    """Where each shard's coordinates are in the flat vector."""
    whole = problems.flat(PARAMS)
    structure, at, leaves = jax.tree.structure(PARAMS), 0, []
    for leaf in jax.tree.leaves(PARAMS):
        leaves.append(np.arange(at, at + leaf.size).reshape(leaf.shape))
        at += leaf.size
    parts = Layout.of(PARAMS, shards).split(jax.tree.unflatten(structure, leaves))
    return whole, [problems.flat(part) for part in parts]


def by_hand(trace):
    """Distance and cosine of each push, from the textbook's versions."""
    start, cuts = places(trace.header["shards"])
    versions = textbook.downpour(
        trace, problems.gradient, start, cuts, lambda: textbook.Adagrad(0.05)
    )

    sent, pushes, accrued, held = {}, {}, {}, {}
    for row in range(len(trace)):
        r, s = int(trace.replica[row]), int(trace.shard[row])
        match int(trace.kind[row]):
            case trace_lib.FETCH:
                held.setdefault(r, start.copy())
                held[r] = held[r].copy()
                held[r][cuts[s]] = versions[s][trace.version[row]]
            case trace_lib.COMPUTE:
                accrued.setdefault(r, []).append((held[r], int(trace.batch[row])))
            case trace_lib.FAIL if s < 0:
                accrued[r] = []
            case trace_lib.PUSH:
                key = r, int(trace.id[row])
                if key not in sent:
                    count = int(trace.count[row])
                    sent[key], accrued[r] = accrued[r][:count], accrued[r][count:]
                now = pushes.setdefault(key, start.copy())
                now[cuts[s]] = versions[s][trace.version[row] - 1]
    rows = []
    for key, taken in sent.items():
        r, now = key[0], pushes[key]
        old = sum(problems.gradient(w, r, batch) for w, batch in taken)
        new = sum(problems.gradient(now, r, batch) for _, batch in taken)
        cosine = old @ new / np.linalg.norm(old) / np.linalg.norm(new)
        rows.append((np.linalg.norm(now - taken[0][0]), cosine, np.linalg.norm(now)))
    return np.array(rows).T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_probes_are_what_the_textbook_s_versions_say(case, seed):
    trace = simulated(case, seed)
    seen = probe(trace)
    np.testing.assert_array_equal(seen.axes["push"], np.arange(len(seen.staleness)))
    np.testing.assert_array_equal(seen.staleness, trace.staleness())
    distance, cosine, size = by_hand(trace)
    got = seen.values
    np.testing.assert_allclose(got["distance"], distance, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(
        got["relative_distance"], distance / size, rtol=2e-3, atol=2e-4
    )
    np.testing.assert_allclose(got["cosine"], cosine, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_who_is_not_stale_has_not_moved_and_all_is_seen(case):
    seen = probe(simulated(case))
    fresh = (seen.staleness == 0).all(axis=1)
    assert fresh.any() and not fresh.all()
    assert (seen.values["distance"][fresh] == 0).all()
    assert (seen.values["distance"][~fresh] > 0).all()
    assert (seen.values["cosine"] < 1).any()
    if "n_push" not in CASES[case]:
        assert (seen.values["cosine"][fresh] == 1).all()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("n_push", [1, 3])
def test_one_replica_is_never_stale(shards, n_push):
    """As many gradients as the push sums are of one version, and so are the new ones."""
    trace = dbjax.simulate(
        FAR, replicas=1, shards=shards, steps=17, n_push=n_push, n_fetch=n_push
    )
    seen = probe(trace)
    assert (seen.values["distance"] == 0).all()
    assert (seen.values["cosine"] == 1).all()


@pytest.mark.parametrize("runtime", ["Emulated", "Threads"])
def test_the_replay_does_not_notice(runtime):
    """Bit for bit, also of a run on threads, whose order is not known before."""
    run = problems.train(
        dbjax.Emulated(FAR) if runtime == "Emulated" else dbjax.Threads(),
        shards=2, n_push=2, optimizer=ADAGRAD,
    )  # fmt: skip
    keywords = dict(
        probes=("distance", "cosine", "stability"), learning_rate=0.05, every=2
    )
    seen = probe(run.trace, **keywords)
    problems.assert_same_bits(seen.run.params, run.params)
    problems.assert_same_bits(seen.run.optimizer_state, run.optimizer_state)
    assert seen.run.trace.diff(run.trace) is None
    sampled = len(run.trace.staleness()[::2])
    assert all(len(values) == sampled for values in seen.values.values())
    assert (seen.staleness == run.trace.staleness()[::2]).all()
    stale = (seen.staleness > 0).any(axis=1)
    assert ((seen.values["distance"] > 0) == stale).all()


@pytest.mark.parametrize("every", [2, 7, 1_000])
def test_samples_are_those_of_all(every):
    trace = simulated("shards")
    whole, some = probe(trace), probe(trace, every=every)
    for name in ("step", "time", "replica", "staleness"):
        np.testing.assert_array_equal(
            getattr(some, name), getattr(whole, name)[::every]
        )
    for name, values in some.values.items():
        np.testing.assert_array_equal(values, whole.values[name][::every])
    pushes = trace.take(trace.kind == trace_lib.PUSH)
    for step, time, replica in zip(some.step, some.time, some.replica, strict=True):
        mine = pushes.take((pushes.step == step) & (pushes.replica == replica))
        assert time == mine.time.max()


def test_versions_in_flight_of_another_dtype_are_what_is_compared():
    """Whoever missed nothing has not moved, however much narrow versions round."""
    seen = probe(simulated("shards"), version_dtype=jnp.bfloat16, optimizer=SGD)
    fresh = (seen.staleness == 0).all(axis=1)
    assert (seen.values["distance"][fresh] == 0).all()
    assert (seen.values["cosine"][fresh] == 1).all()


# Stability: on a quadratic the curvature is known, and so is what happens.

CURVATURES = np.array([0.3, 1.0, 2.0], np.float32)
ONE = dbjax.from_arrays({"x": np.zeros((1, 1), np.float32)}, batch_size=1)


def quadratic(params, batch):
    return 0.5 * jnp.sum(CURVATURES * params["w"] ** 2) + 0.0 * batch["x"].sum()


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("side", [0.9, 1.1])
def test_the_limit_is_where_a_quadratic_comes_apart(delay, side):
    rate = side * float(stability_limit(delay)) / 2.0
    steps = 400
    trace = dbjax.Trace.from_delays(np.minimum(np.arange(steps), delay))
    seen = dbjax.probe(
        trace, quadratic, {"w": jnp.ones(3)}, ONE, optimizer=optax.sgd(rate),
        probes=["stability"], learning_rate=rate, every=steps // 4,
    )  # fmt: skip
    np.testing.assert_allclose(seen.values["eta_lambda"], 2.0 * rate, rtol=1e-4)
    product = seen.values["eta_lambda"] * seen.staleness[:, 0]
    np.testing.assert_allclose(seen.values["stability"], product)
    unstable = seen.values["eta_lambda"] > seen.values["eta_lambda_limit"]
    assert unstable[-1] == (side > 1)
    end = float(jnp.abs(seen.run.params["w"]).max())
    assert end > 3 if side > 1 else end < 0.3


@pytest.mark.parametrize("shards", [1, 2])
def test_rates_of_coordinates_come_from_the_optimizer_s_state(shards):
    """Adagrad's are as large as its sums say, and a push of two has twice the rate."""
    trace = dbjax.simulate(FAR, replicas=2, shards=shards, steps=12, n_push=2)

    def rates(state):
        sums = optax.tree.get(state, "sum_of_squares")
        return jax.tree.map(lambda s: 0.05 / jnp.sqrt(s + 1e-3), sums)

    start = {"w": jnp.ones(3)}
    seen = dbjax.probe(
        trace, quadratic, start, ONE, optimizer=ADAGRAD, probes=["stability"],
        learning_rate=rates,
    )  # fmt: skip
    first = 0.05 / np.sqrt(1e-3) * 2.0 * 2
    assert seen.values["eta_lambda"][0] == pytest.approx(first, rel=1e-3)
    assert (np.diff(seen.values["eta_lambda"]) < 0).all()


# What would have been.


@pytest.mark.parametrize("shards", [1, 3])
def test_what_would_have_been_is_one_call(shards):
    trace = dbjax.simulate(FAR, replicas=4, shards=shards, steps=30)
    assert (probe(trace).values["distance"] > 0).any()
    alone = probe(trace.without_staleness())
    assert (alone.values["distance"] == 0).all() and len(alone.step) == 30
    assert (alone.values["cosine"] == 1).all()
    fewer = probe(trace.without_replicas(1, 2))
    assert set(fewer.replica.tolist()) == {0, 3}
    other = probe(trace, optimizer=SGD)
    assert (other.staleness == probe(trace).staleness).all()
    assert (other.values["distance"] != probe(trace).values["distance"]).any()


# Nothing is passed over in silence.


class Iterators:
    def __init__(self):
        self.starts = 0

    def start(self, replicas):
        self.starts += 1

    def batch(self, replica, step):
        return DATA.batch(replica, step)


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        (dict(probes=("speed",)), r"probes must be some of .*got \('speed',\)"),
        (dict(probes="cosine"), "probes must be some of"),
        (dict(probes=()), "probes must be some of"),
        (dict(every=0), "every=0: allowed are integers from 1"),
        (dict(probes=["stability"]), "needs learning_rate="),
        (dict(learning_rate=-0.1), "learning_rate=-0.1: allowed are positive"),
        (dict(data=Iterators()), "'cosine' reads minibatches again"),
        (
            dict(local_optimizer=LocalRule(SGD, "position")),
            "'cosine' compares gradients, and push='position'",
        ),
        (
            dict(data=Iterators(), probes=["stability"], learning_rate=0.1),
            "take the first minibatch away",
        ),
    ],
)
def test_arguments_out_of_range(keywords, complaint):
    with pytest.raises(ValueError, match=complaint):
        probe(simulated("one shard"), **keywords)


def test_restored_shards_are_refused_and_torn_pushes_left_out():
    with pytest.raises(ValueError, match="restored from a snapshot"):
        probe(random_restored(1, shards=2))
    trace = simulated("shards")
    cut = trace.take(slice(0, len(trace) - 8))
    staleness = cut.staleness()
    whole = (staleness >= 0).all(axis=1)
    assert not whole.all()
    seen = probe(cut)
    assert seen.skipped == np.count_nonzero(~whole)
    np.testing.assert_array_equal(seen.axes["push"], np.flatnonzero(whole))
    np.testing.assert_array_equal(seen.staleness, staleness[whole])


def test_a_push_that_is_not_finite_has_no_cosine():
    bad = {"x": np.full((8, 10), np.nan, np.float32), "y": np.zeros((8, 4), np.float32)}
    data = problems.Wrapped(lambda r, step: bad if (r, step) == (1, 2) else None)
    seen = probe(simulated("one shard"), data)
    assert np.isnan(seen.values["cosine"]).sum() == 1
    assert np.isfinite(seen.values["distance"]).all()
    assert seen.run.info.not_finite == 1
