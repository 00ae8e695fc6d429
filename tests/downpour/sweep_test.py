"""`sweep`: each lane of a grid is a compiled replay of its own."""

import collections
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.downpour.protocol import Protocol
from tests import problems, textbook
from tests.problems import DATA, PARAMS, loss_fn

FAR = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    latency=dbjax.Exponential(0.4),
    shard_service=dbjax.Exponential(0.05),
)
PICKY = Protocol("picky", lambda clocks, r: True, lambda clocks, r, stale: stale <= 1)


def trace(cluster=FAR, **keywords):
    return dbjax.simulate(cluster, **{"replicas": 3, "steps": 40} | keywords)


# Of other lengths, replicas, and slots; with accrual, drops, and neither.
MIXED = [
    trace(dbjax.Cluster(), shards=2, steps=30),
    trace(shards=2, replicas=7),
    trace(shards=2, n_push=3, n_fetch=2, steps=25),
    trace(shards=2, protocol=PICKY),
]
PLAIN = trace(dbjax.Cluster())
RATES = np.array([0.02, 0.05, 0.1])


def sweep(traces=PLAIN, optimizer_fn=dbjax.adagrad, hyperparameters=RATES, **keywords):
    loss = keywords.pop("loss_fn", loss_fn)
    params = keywords.pop("params", PARAMS)
    data = keywords.pop("data", DATA)
    # Whether a rule can be split is checked elsewhere, and takes a while.
    keywords = {"per_shard": True} | keywords
    return dbjax.sweep(
        *(traces, loss, params, data, optimizer_fn, hyperparameters), **keywords
    )


@pytest.fixture(scope="module")
def plain():
    return sweep(PLAIN)


@pytest.fixture(scope="module")
def mixed():
    return sweep(MIXED)


def lane(grid, *index):
    return jax.tree.map(lambda leaf: leaf[index], grid.params)


def replay(trace, data=DATA, **keywords):
    return dbjax.replay(trace, loss_fn, PARAMS, data, per_shard=True, **keywords)


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    got, want = problems.flat(got), problems.flat(want)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def test_each_lane_is_what_the_textbook_does(mixed):
    """Whatever its neighbours are: shorter, longer, with accrual, with drops."""
    assert list(mixed.axes) == ["trace", "hyperparameter"]
    for i, each in enumerate(MIXED):
        for j, rate in enumerate(RATES):
            want = problems.play(each, lambda rate=rate: textbook.Adagrad(rate))
            assert_close(lane(mixed, i, j), want, rtol=3e-4, atol=3e-5)


def test_each_lane_is_one_compiled_replay(mixed):
    want = replay(MIXED[2], optimizer=dbjax.adagrad(RATES[1]), exact=False)
    assert want.info.executor == "loop"
    assert_close(lane(mixed, 2, 1), want.params)


def test_the_grid_is_labelled():
    """Traces, hyperparameters as they were named, seeds: in this order."""
    seeds = [7, 3]
    hyper = {"momentum": np.array([0.0, 0.9]), "learning_rate": [0.1, 0.2, 0.3]}
    grid = sweep(
        *([PLAIN, PLAIN], optax.sgd, hyper),
        **{"seeds": seeds, "params": lambda seed: PARAMS},
        metrics_fn=lambda params: {"norm": jnp.sum(params["w"] ** 2), "one": 1},
    )
    assert list(grid.axes) == ["trace", "momentum", "learning_rate", "seed"]
    for name, values in {"trace": [0, 1], "seed": seeds, **hyper}.items():
        np.testing.assert_array_equal(grid.axes[name], values)
    shape = (2, 2, 3, 2)
    assert {name: leaf.shape for name, leaf in grid.params.items()} == {
        "b": (*shape, problems.OUTPUTS),
        "w": (*shape, problems.INPUTS, problems.OUTPUTS),
    }
    assert grid.params["w"].dtype == np.float32
    assert set(grid.metrics) == {"norm", "one"}
    norm = (grid.params["w"].astype(np.float64) ** 2).sum((-1, -2))
    np.testing.assert_allclose(grid.metrics["norm"], norm, rtol=1e-5)
    assert grid.metrics["one"].tolist() == np.ones(shape).tolist()
    want = replay(PLAIN, optimizer=optax.sgd(0.3, momentum=0.9), exact=False)
    for trace, seed in itertools.product(range(2), range(2)):
        assert_close(lane(grid, trace, 1, 2, seed), want.params)
    assert grid.not_finite.shape == grid.diverged.shape == shape
    assert not grid.diverged.any()


def test_one_trace_and_no_seeds_have_no_axes(plain):
    assert [values.tolist() for values in plain.axes.values()] == [RATES.tolist()]
    assert list(plain.metrics) == ["loss"]
    want = [loss_fn(lane(plain, i), DATA.batch(0, 0)) for i in range(3)]
    np.testing.assert_allclose(plain.metrics["loss"], want, rtol=1e-5)


def test_hyperparameters_are_given_by_name(plain):
    """Any name that is not another axis's."""
    grid = sweep(PLAIN, lambda seed: dbjax.adagrad(seed), {"seed": list(RATES)})
    assert {name: list(axis) for name, axis in grid.axes.items()} == {"seed": [*RATES]}
    assert_close(grid.params, plain.params)


def noisy(params, batch, key):
    noise = jax.random.normal(key, (problems.OUTPUTS,))
    return loss_fn(params, batch) + jnp.sum(params["b"] * noise), {"aux": noise}


def test_a_seed_is_the_start_and_the_keys():
    """As in a replay with that seed from those parameters."""
    seeds = [4, 11]

    def start(seed):
        return jax.tree.map(lambda x: x + np.float32(seed / 10), PARAMS)

    keywords = {"loss_fn": noisy, "rng": True, "has_aux": True}
    grid = sweep(PLAIN, seeds=seeds, params=start, **keywords)
    assert grid.metrics["loss"].shape == (3, 2)
    want = dbjax.replay(
        *(PLAIN, noisy, start(11), DATA),
        **{"optimizer": dbjax.adagrad(RATES[1]), "exact": False, "seed": 11},
        **{"rng": True, "has_aux": True, "per_shard": True},
    )
    assert_close(lane(grid, 1, 1), want.params)


def by_staleness(rate):
    """A rule that uses all it can be given."""

    def update(g, state, params=None, *, staleness, stale_params, **extra):
        return jax.tree.map(
            lambda g, w, old: -rate * (g + g * g * (w - old)) / (1 + staleness),
            *(g, params, stale_params),
        ), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


def test_rules_are_provided_with_staleness():
    keywords = {"provide": ("staleness", "stale_params")}
    grid = sweep(MIXED[1], by_staleness, RATES, **keywords)
    want = replay(MIXED[1], optimizer=by_staleness(0.1), exact=False, **keywords)
    assert_close(lane(grid, 2), want.params)


# Lanes that come apart.


def test_diverged_lanes_are_kept_and_disturb_nobody(mixed):
    rates = np.array([0.02, np.nan, 0.05, np.inf, 0.1, 3e38])
    bad = ~np.isin(rates, RATES)
    grid = sweep(MIXED, hyperparameters=rates)
    assert grid.diverged.tolist() == [bad.tolist()] * len(MIXED)
    assert np.isfinite(grid.metrics["loss"]).tolist() == (~grid.diverged).tolist()
    assert not grid.not_finite[:, ~bad].any()
    for name, leaf in mixed.params.items():
        np.testing.assert_array_equal(grid.params[name][:, ~bad], leaf)


def spoilt(*where):
    def before(replica, step):
        if (replica, step) in where:
            batch = DATA.batch(replica, step)
            return batch | {"y": np.full_like(batch["y"], np.nan)}

    return problems.Wrapped(before)


BAD = spoilt((0, 2), (0, 3), (1, 1), (2, 0))


@pytest.mark.parametrize("trace", [PLAIN, MIXED[1]], ids=["plain", "mixed"])
def test_rejected_pushes_are_counted_and_mark_the_lane(trace):
    """As replay counts them, and the lane goes on."""
    grid = sweep(trace, data=BAD)
    want = replay(trace, BAD, optimizer=dbjax.adagrad(RATES[0]))
    assert want.info.not_finite > 0
    assert grid.diverged.all()
    assert_close(lane(grid, 0), want.params)
    assert (grid.not_finite == want.info.not_finite).all()


# How it runs.


@pytest.fixture
def compilations():
    """How often XLA has compiled what, in all threads."""
    names = collections.Counter()

    def hear(event, seconds, **more):
        if event.endswith("backend_compile_duration"):
            names[more["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield names
    jax.monitoring.unregister_event_duration_listener(hear)


def test_the_whole_grid_is_compiled_once(compilations):
    """However many traces, settings and seeds there are."""
    traced = []

    def counted(params, batch):
        traced.append(None)
        return loss_fn(params, batch)

    starts = {"params": lambda seed: PARAMS, "seeds": [0, 1]}
    sweep(MIXED, hyperparameters=np.linspace(0.01, 0.1, 5), loss_fn=counted, **starts)
    assert len(traced) == 3  # when it is checked, as a gradient, and as the metric
    assert compilations["jit(loop)"] == compilations["jit(begin)"] == 1


def test_on_an_accelerator_all_lanes_are_one_batched_program(monkeypatch):
    """Which any device can run."""
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(sys.modules["dbjax.downpour.sweep"], "spread", None)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [gpu])
        grid = sweep(MIXED[1:3], hyperparameters=np.array([0.02, np.nan, 0.05]))
    assert grid.diverged.tolist() == [[False, True, False]] * 2
    for i, each in enumerate(MIXED[1:3]):
        for j, rate in ((0, 0.02), (2, 0.05)):
            want = problems.play(each, lambda rate=rate: textbook.Adagrad(rate))
            assert_close(lane(grid, i, j), want, rtol=3e-4, atol=3e-5)


# Bad input.


def other_shapes(replica, step):
    if (replica, step) == (1, 3):
        return jax.tree.map(lambda a: a[:3], DATA.batch(replica, step))


SEEDED = {"params": lambda seed: PARAMS, "seeds": [0, 1]}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"traces": []}, ValueError, "traces must hold at least one Trace"),
        ({"traces": [PLAIN, {}]}, TypeError, r"must be a dbjax\.Trace, got a dict"),
        ({"traces": [PLAIN, MIXED[0]]}, ValueError, "same number of shards"),
        ({"traces": PLAIN.take(slice(0, 5))}, ValueError, "no PUSH row"),
        ({"traces": PLAIN.take(slice(20, None))}, ValueError, "the Trace breaks at"),
        ({"hyperparameters": 0.1}, ValueError, "must be a 1-d array"),
        ({"hyperparameters": []}, ValueError, "at least one value"),
        ({"hyperparameters": np.ones((2, 2))}, ValueError, r"got shape \(2, 2\)"),
        ({"hyperparameters": {"gamma": 0.1}}, ValueError, r"\['gamma'\] must be a 1-d"),
        ({"hyperparameters": {"gama": [0.1]}}, TypeError, "gama"),
        ({"seeds": [0, 1]}, ValueError, "seeds need params to be a function"),
        ({"params": lambda seed: PARAMS}, ValueError, "is a function"),
        (SEEDED | {"params": lambda seed: {}}, ValueError, "nothing to train"),
        ({"optimizer_fn": lambda rate: rate}, TypeError, "optimizer must be an optax"),
        ({"loss_fn": lambda p, b: jnp.int32(1)}, ValueError, "scalar float"),
        ({"data": None}, TypeError, r"data must give batch\(replica, step\)"),
        ({"data": problems.Wrapped(other_shapes)}, ValueError, "replica 1, step 3"),
        ({"provide": "staleness"}, ValueError, "provide must be a tuple"),
        (
            {"traces": MIXED[0], "optimizer_fn": optax.clip_by_global_norm}
            | {"per_shard": False},
            ValueError,
            "depends on the split",
        ),
    ],
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        sweep(**change)


def stream(replica, replicas):
    return (DATA.batch(replica, step) for step in range(1_000))


def streams():
    return dbjax.from_iterators(stream)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"traces": None}, "traces must be .*, got None"),
        ({"traces": 7}, "traces must be .*, got 7"),
        (SEEDED | {"seeds": []}, r"seeds must be .* got \[\]"),
        (SEEDED | {"seeds": 3}, "seeds must be .* got 3"),
        (SEEDED | {"seeds": [0, 1.5]}, r"seeds must be .* got \[0, 1.5\]"),
        ({"hyperparameters": ["a"]}, r"hyperparameters must hold numbers, got \['a'\]"),
        ({"hyperparameters": {"gamma": "b"}}, r"hyperparameters\['gamma'\] must be"),
        ({"hyperparameters": [None]}, "hyperparameters must hold numbers"),
        ({"optimizer_fn": None}, "optimizer_fn must be a function .* got None"),
        ({"optimizer_fn": optax.sgd(0.1)}, "optimizer_fn must be a function"),
        ({"metrics_fn": 0.5}, "metrics_fn must be None or a function, got 0.5"),
        # Both would be an axis of this name.
        (SEEDED | {"hyperparameters": {"seed": RATES}}, "seeds make an axis 'seed'"),
        (
            {"traces": [PLAIN], "hyperparameters": {"trace": RATES}},
            "traces make an axis 'trace'",
        ),
        # They cannot be read twice.
        (SEEDED | {"data": streams()}, "data from iterators .* 1 traces and 2 seeds"),
        ({"data": streams(), "traces": MIXED}, "data from iterators .* 4 traces"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(change, words):
    def never(*args):
        raise AssertionError

    callbacks = {"loss_fn": never}
    if callable(change.get("params")):
        callbacks["params"] = never
    with pytest.raises((TypeError, ValueError), match=rf"^{words}"):
        sweep(**change | callbacks)


def test_iterators_serve_one_trace(plain, mixed):
    """They cannot be read twice, but a chunk is stacked once for all settings."""
    grid = sweep(PLAIN, data=streams())
    assert_close(grid.params, plain.params)
    np.testing.assert_allclose(grid.metrics["loss"], plain.metrics["loss"], rtol=2e-5)
    grid = sweep([MIXED[2]], data=streams())
    assert_close(lane(grid, 0), lane(mixed, 2))


def test_any_hyperparameter_of_narrow_parameters(compilations):
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    hyper = {"learning_rate": [0.05], "momentum": [0.5, 0.9]}
    grid = sweep(PLAIN, optax.sgd, hyper, params=narrow)
    assert grid.params["w"].dtype == jnp.bfloat16
    assert compilations["jit(loop)"] == 1
