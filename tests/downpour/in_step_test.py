"""Shards in step are one machine to the compiled executors, and nobody can tell."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.downpour.in_step import InStep, is_in_step
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import make_problem
from dbjax.downpour.replay import make_machine
from tests import problems


def scheduled():
    return optax.chain(
        optax.trace(0.9), optax.scale_by_learning_rate(lambda count: 0.1 / (1 + count))
    )


def labelled():
    rules = {"slow": optax.sgd(0.01, momentum=0.9), "fast": dbjax.adagrad(0.1)}
    return optax.multi_transform(
        rules,
        lambda params: {name: "slow" if name == "b" else "fast" for name in params},
    )


RULES = {
    "sgd": lambda: optax.sgd(0.05),
    "adagrad": lambda: dbjax.adagrad(0.05),
    "adam": lambda: optax.adam(0.01),
    "scheduled": scheduled,
    "labelled": labelled,
}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@functools.cache
def made(rule, shards, **keywords):
    return make_problem(
        *(problems.loss_fn, problems.PARAMS, problems.DATA),
        optimizer=rule, shards=shards, replicas=4, **keywords,
    )  # fmt: skip


def simulated(shards, **keywords):
    return dbjax.simulate(
        dbjax.Cluster(), replicas=4, shards=shards, steps=60, **keywords
    )


@pytest.mark.parametrize(
    ("rule", "shards"), [*((rule, 3) for rule in RULES), ("adagrad", 7), ("adam", 2)]
)
def test_the_end_is_that_of_the_exact_replay(rule, shards):
    trace, rule = simulated(shards), RULES[rule]()
    args = problems.loss_fn, problems.PARAMS, problems.DATA
    want = dbjax.replay(trace, *args, optimizer=rule)
    got = dbjax.replay(trace, *args, optimizer=rule, exact=False)
    assert is_in_step(make_plan(trace), made(rule, shards))
    for name in ("params", "optimizer_state"):
        a, b = getattr(got, name), getattr(want, name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b
        )
    assert got.info._replace(executor="", peak_copies=0) == want.info._replace(
        executor="", peak_copies=0
    )


def test_rejected_pushes_are_named_on_every_shard():
    trace, bad = simulated(3), (1, 7)
    data = problems.Wrapped(
        lambda *at: (
            jax.tree.map(lambda x: x * np.nan, problems.DATA.batch(*at))
            if at == bad
            else None
        )
    )
    args = problems.loss_fn, problems.PARAMS, data
    runs = [
        dbjax.replay(trace, *args, optimizer=dbjax.adagrad(0.05), exact=exact)
        for exact in (True, False)
    ]
    status = [run.trace.status.tolist() for run in runs]
    assert status[0] == status[1]
    assert runs[1].info.not_finite == 1
    assert np.count_nonzero(np.array(status[1])) == 3


def test_who_is_not_in_step():
    """Another order on a shard, several gradients a push, or a rule of each shard's."""
    plan = make_plan(simulated(2))
    rule = dbjax.adagrad(0.05)
    assert is_in_step(plan, made(rule, 2))
    assert not is_in_step(make_plan(simulated(1)), made(rule, 1))
    assert not is_in_step(plan, made(rule, 2, per_shard=True))
    assert not is_in_step(make_plan(simulated(2, n_push=2)), made(rule, 2))
    queued = dbjax.simulate(
        dbjax.Cluster(shard_service=(0.3)), replicas=4, shards=2, steps=60
    )
    machine, _ = make_machine(make_plan(queued), made(rule, 2), exact=False)
    assert isinstance(machine, InStep) == is_in_step(make_plan(queued), made(rule, 2))
    read = plan.read.copy()
    read[30, 1] = (read[30, 1] + 1) % plan.slots
    assert not is_in_step(dataclasses.replace(plan, read=read), made(rule, 2))


def test_a_state_that_cannot_be_cut_up_stays_per_shard():
    """Its leaves have paths on a shard that they have not on the whole."""
    sizes = optax.GradientTransformation(
        lambda params: {str(x.size): jnp.zeros(()) for x in jax.tree.leaves(params)},
        lambda g, state, params=None: (jax.tree.map(lambda x: -0.05 * x, g), state),
    )
    assert not is_in_step(make_plan(simulated(2)), made(sizes, 2))


def test_states_are_cut_by_the_whole_path():
    """['z']['b'] ends in ['b'], which is another parameter of the same shape."""
    params = {
        "b": np.zeros((6, 2), np.float32),
        "z": {"b": np.ones((6, 2), np.float32)},
    }

    def loss_fn(params, batch):
        rows = np.arange(6)[:, None]  # each its own gradient
        each = (3 * params["b"] + params["z"]["b"] ** 2) * rows
        return jnp.sum(each) * jnp.mean(batch["x"])

    trace, args = simulated(3), (loss_fn, params, problems.DATA)
    problem = make_problem(*args, optimizer=dbjax.adagrad(0.1), shards=3, replicas=4)
    assert is_in_step(make_plan(trace), problem)
    runs = [
        dbjax.replay(trace, *args, optimizer=dbjax.adagrad(0.1), exact=exact)
        for exact in (True, False)
    ]
    for a, b in zip(
        *(jax.tree.leaves(run.optimizer_state) for run in runs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
