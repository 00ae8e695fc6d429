"""Replay: what the textbook says, alike in all executors, and never silently wrong."""

import collections
import dataclasses
import functools
import logging
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import schedules
from dbjax import trace as trace_lib
from dbjax.downpour.exact import Exact
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import copy, digest
from dbjax.downpour.protocol import Protocol
from dbjax.downpour.run import peak_copies
from dbjax.runtime.base import RejectedTooOften
from dbjax.server.layout import Layout
from dbjax.server.messages import Push
from dbjax.trace import (
    COMPUTE,
    DROPPED,
    FAIL,
    NOT_FINITE,
    PUSH,
    RESTART,
    TAKEN,
    Trace,
    history,
)
from tests import problems, textbook
from tests.problems import ADAGRAD, DATA, MOMENTUM, PARAMS, SGD, loss_fn
from tests.restored import random_restored

NEAR = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0))
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
PICKY = Protocol("picky", lambda clocks, r: True, lambda clocks, r, stale: stale <= 4)
# What keeps a Trace from being one gradient a row, and so from large problems.
DIRECT = {
    "one shard": dict(cluster=NEAR),
    "three shards": dict(cluster=NEAR, shards=3, n_fetch=2),
    "one shard, far and picky": dict(cluster=FAR, protocol=PICKY),
}
MIXED = {
    "far shards": dict(cluster=FAR, shards=3),
    "far shards, picky": dict(cluster=FAR, shards=2, protocol=PICKY),
    "accrual": dict(cluster=NEAR, n_push=3, n_fetch=2),
    "far shards, accrual": dict(cluster=FAR, shards=2, n_push=3, n_fetch=4),
    "failing, accrual": dict(cluster=FAILING, shards=2, n_push=3),
    "overlap": dict(cluster=FAR, shards=2, overlap=True, n_push=2),
}
CASES = DIRECT | MIXED
RULES = {
    "sgd": (SGD, lambda: textbook.sgd(0.05)),
    "adagrad": (ADAGRAD, lambda: textbook.Adagrad(0.05)),
}
REPLAY = sys.modules["dbjax.downpour.replay"]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture
def large(monkeypatch):
    """Let this problem count as one that is too large for one loop."""
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", 0)


@functools.cache
def simulated(case, seed=0, **more):
    return dbjax.simulate(
        **{"replicas": 5, "steps": 60, "seed": seed} | CASES[case] | more
    )


def replay(trace, data=DATA, **keywords):
    keywords = {"optimizer": ADAGRAD} | keywords
    return dbjax.replay(trace, loss_fn, PARAMS, data, **keywords)


def compiled(trace, executor, **keywords):
    run = replay(trace, exact=False, **keywords)
    assert run.info.executor == executor
    return run


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol
        )


def assert_runs_agree(got, want, **tolerance):
    assert_close(got.params, want.params, **tolerance)
    assert_close(got.optimizer_state, want.optimizer_state, **tolerance)
    assert got.trace.diff(dataclasses.replace(want.trace, evaluations=())) is None
    assert got.info._replace(executor="", peak_copies=0) == want.info._replace(
        executor="", peak_copies=0
    )


# Against the textbook.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_does_what_the_textbook_does(case, rule, seed):
    optimizer, twin = RULES[rule]
    trace = simulated(case, seed)
    run = replay(trace, optimizer=optimizer)
    want = problems.play(trace, twin)
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    assert run.info.executor == "exact"
    assert run.info.steps == (trace.kind == COMPUTE).sum()
    assert run.info.dropped == trace.lost()["dropped"]
    assert run.info.lost_gradients == trace.lost()["gradients"]


@pytest.mark.parametrize("seed", range(3))
def test_local_steps(seed):
    trace = simulated("far shards, accrual", seed)
    run = replay(trace, local_optimizer=SGD)
    want = problems.play(trace, lambda: textbook.Adagrad(0.05), textbook.sgd(0.05))
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_delays(seed, exact):
    """One line says what `from_delays` means."""
    rng = np.random.default_rng(seed)
    delays = [int(rng.integers(0, min(t, 6) + 1)) for t in range(50)]
    trace = Trace.from_delays(delays)
    size = problems.BATCH  # one minibatch is all there is
    whole = dbjax.from_arrays({"x": problems.X[:size], "y": problems.Y[:size]}, size)
    run = replay(trace, whole, exact=exact)
    want = textbook.delayed(
        lambda w: problems.gradient(w, 0, 0, whole),
        problems.flat(PARAMS),
        delays,
        textbook.Adagrad(0.05),
    )
    np.testing.assert_allclose(
        problems.flat(run.params), want[-1], rtol=3e-4, atol=3e-5
    )
    np.testing.assert_array_equal(run.trace.staleness()[:, 0], delays)


DEEP = {
    "first": 0.3 * np.random.default_rng(1).standard_normal((10, 6), np.float32),
    "second": 0.3 * np.random.default_rng(2).standard_normal((6, 4), np.float32),
    "last": np.zeros(4, np.float32),
}


def deep_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]) @ params["second"]
    return jnp.mean((hidden + params["last"] - batch["y"]) ** 2)


def by_leaf(delays):
    """The columns, one for each leaf of `DEEP`, as the shards that hold them."""
    layout = Layout.of(DEEP, len(DEEP), split="leaf")
    assert all(len(boxes) == 1 for boxes in layout.boxes)
    return np.stack([delays[boxes[0].leaf] for boxes in layout.boxes], axis=1)


STEPS = 24
OF_LEAVES = {
    "pipeline": [schedules.constant(STEPS, delay) for delay in (2, 0, 1)],
    "equal": [schedules.constant(STEPS, 2)] * 3,
    "none": [schedules.constant(STEPS, 0)] * 3,
    "mixed": [
        schedules.geometric(STEPS, 3.0, seed=0),
        schedules.straggler(STEPS, 5),
        schedules.cyclic(STEPS, 4),
    ],
}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("none", SGD), ("equal", SGD), ("pipeline", ADAGRAD), ("mixed", ADAGRAD)],
)
def test_shards_that_are_leaves_have_the_delays_that_stale_gives_to_leaves(
    name, optimizer
):
    """To the bit: what a stage of a pipeline sees, a shard with a delay sees."""
    delays = OF_LEAVES[name]
    batch = DATA.batch(0, 0)
    same = problems.Wrapped(lambda replica, step: batch)  # in one order, to the bit
    trace = Trace.from_delays(by_leaf(delays))
    keywords = {"optimizer": optimizer, "split": "leaf"}
    run = dbjax.replay(trace, deep_loss, DEEP, same, **keywords)
    # The leaves of `DEEP` in the order of JAX: first, last, second.
    of_leaves = jax.tree.structure(DEEP).unflatten(delays)
    rule = dbjax.stale(optimizer, of_leaves)

    @jax.jit
    def step(params, state, batch):
        g = jax.grad(deep_loss)(dbjax.stale_params(state, params), batch)
        updates, state = rule.update(g, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.asarray, DEEP), rule.init(DEEP)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    problems.assert_same_bits(run.params, params)
    again = dbjax.replay(trace, deep_loss, DEEP, same, **keywords, exact=False)
    assert_close(again.params, run.params)
    np.testing.assert_array_equal(run.trace.staleness(), by_leaf(delays))


# Shards that were restored, and pushes that were torn.


def _compensate(eta):
    def update(g, state, params, *, stale_params, staleness, **extra):
        def step(g, w, old):
            return -eta * (g + 0.1 * (w - old)) / (1 + staleness)

        return jax.tree.map(step, g, params, stale_params), state

    rule = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    return optax.chain(rule, optax.trace(0.9))


AWARE = _compensate(0.05), lambda: textbook.Compensated(0.05)


@pytest.mark.parametrize("rule", ["adagrad", "aware"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_restored_shards_go_on_as_the_textbook_does(rule, shards, seed):
    optimizer, twin = AWARE if rule == "aware" else RULES[rule]
    provide = ("staleness", "stale_params") if rule == "aware" else ()
    trace = random_restored(seed, shards, n_push=1 + seed % 3)
    run = replay(trace, optimizer=optimizer, provide=provide)
    want = problems.play(trace, twin, aware=rule == "aware")
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    assert run.info.lost_updates == trace.lost()["updates"] > 0
    assert run.info.lost_gradients == trace.lost()["gradients"]


def walk_by_name(trace, problem):
    """What live shards and replicas do, every state kept under its name; and digests."""
    shards = trace.header["shards"]
    parts = problem.split(problem.params)
    states = [{(0, 0): problem.shard.init(copy(part))} for part in parts]
    now, origins = [(0, 0)] * shards, [[] for _ in range(shards)]
    held, accrued, sent = {}, {}, {}
    digests = np.zeros(len(trace), np.uint64)
    columns = {name: values.tolist() for name, values in trace.columns().items()}
    for row in range(len(trace)):
        one = {name: values[row] for name, values in columns.items()}
        r, s = one["replica"], one["shard"]
        name = one["incarnation"], one["version"]
        match one["kind"]:
            case trace_lib.FETCH:
                held.setdefault(r, {})[s] = name
            case trace_lib.COMPUTE:
                names = [held[r][s] for s in range(shards)]
                seen = [
                    problem.publish(states[s][n].params) for s, n in enumerate(names)
                ]
                batch = problem.batch(r, one["batch"])
                params = problem.fetch(tuple(seen))
                g, _ = problem.compute(params, batch, r, one["batch"])
                if accrued.get(r):
                    first, names, seen = accrued[r]
                    g = problem.accrue(first, g)
                accrued[r] = g, names, seen
            case trace_lib.PUSH:
                if (r, one["id"]) not in sent:
                    g, names, seen = accrued.pop(r)
                    sent[r, one["id"]] = problem.split(g), names, seen
                g, names, seen = sent[r, one["id"]]
                life, base = names[s]
                state = states[s][now[s]]
                shard = state._replace(optimizer_state=copy(state.optimizer_state))
                missed = history.missed(shard.version, base, life, origins[s])
                message = Push(
                    *(r, one["id"], one["step"], g[s], shard.version - missed),
                    taken=one["status"] == TAKEN,
                    stale_params=jax.tree.map(
                        lambda old, w: old.astype(w.dtype), seen[s], shard.params
                    ),
                )
                states[s][name], _ = problem.shard.handle(shard, message)
                digests[row] = digest(states[s][name].params)
                now[s] = name
            case trace_lib.FAIL if s < 0:
                accrued.pop(r, None)
            case trace_lib.RESTART if s >= 0:
                # The newest incarnation that made it, or what that one began from.
                old = name[0] - 1, name[1]
                while old not in states[s]:
                    old = old[0] - 1, old[1]
                states[s][name] = states[s][old]
                origins[s].append(name[1])
                now[s] = name
    return [states[s][now[s]] for s in range(shards)], digests


@pytest.mark.parametrize(
    ("seed", "narrow"), [(0, False), (1, False), (1, True), (3, False)]
)
def test_restored_shards_go_on_bit_for_bit(seed, narrow):
    """As live ones do that keep a copy of each state; also a run that ends so."""
    shards = 1 + seed % 2
    keywords = {"provide": ("staleness", "stale_params")}
    keywords["optimizer"] = AWARE[0]
    keywords["version_dtype"] = jnp.bfloat16 if narrow else None
    whole = random_restored(100 + seed, shards, n_push=1 + seed % 3, turns=250)
    restarts = np.flatnonzero((whole.kind == RESTART) & (whole.shard >= 0))
    for end in (len(whole), restarts[-1] + 1):
        trace = whole.take(slice(0, end))
        problem = REPLAY.make_problem(
            *(loss_fn, PARAMS, DATA), shards=shards, replicas=4, **keywords
        )
        states, digests = walk_by_name(trace, problem)
        trace = dataclasses.replace(trace, digest=digests)
        run = replay(trace, verify=True, **keywords)
        want = problem.whole(tuple(state.params for state in states))
        problems.assert_same_bits(run.params, want)
        kept = tuple(state.optimizer_state for state in states)
        problems.assert_same_bits(run.optimizer_state, kept)
    pushes = np.flatnonzero(trace.kind == PUSH)
    digests = digests.copy()
    digests[pushes[-1]] += 1
    with pytest.raises(ValueError, match=f"row {pushes[-1]}, "):
        replay(dataclasses.replace(trace, digest=digests), verify=True, **keywords)


def test_only_exact_replay_knows_restored_shards():
    trace = random_restored(1, shards=2)
    with pytest.warns(UserWarning, match="exactly, not compiled: it holds a shard"):
        run = replay(trace, exact=False)
    problems.assert_same_bits(run.params, replay(trace).params)
    with pytest.raises(
        ValueError, match=r"traces\[1\] holds a shard that was restored"
    ):
        dbjax.sweep(
            [Trace.from_delays([0, 1])] + [random_restored(0)],
            *(loss_fn, PARAMS, DATA, optax.sgd, {"learning_rate": np.array([0.1])}),
        )
    problem = REPLAY.make_problem(
        loss_fn, PARAMS, DATA, optimizer=ADAGRAD, shards=2, replicas=4
    )
    with pytest.raises(ValueError, match="cannot be saved half done"):
        Exact(make_plan(trace), problem).leaves()


def test_evaluations_see_what_a_shard_was_restored_to():
    """Between the RESTART row and the next push the lost version is gone."""
    trace = random_restored(3, turns=300)
    seen = []
    replay(
        trace, eval_every=1, eval_fn=lambda p, *_: seen.append(problems.flat(p)) or {}
    )
    computes = np.flatnonzero(trace.kind == COMPUTE)
    ends = [*computes[1:].tolist(), len(trace)]
    restarts = (trace.kind == RESTART) & (trace.shard >= 0)
    last = [row - 1 for row in ends if restarts[:row][-1]]
    assert last
    for row in last:
        want = problems.play(trace.take(slice(0, row + 1)), RULES["adagrad"][1])
        got = seen[ends.index(row + 1)]
        np.testing.assert_allclose(got, want, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize(("seed", "exact"), [(0, True), (1, True), (1, False)])
def test_torn_pushes(seed, exact):
    """A push that some shards have taken, the others count as dropped."""
    trace = random_restored(seed, shards=3, n_push=1 + seed, turns=600, deaths=0)
    after = np.flatnonzero(trace.kind == FAIL) + 1
    after = after[after < len(trace)]
    assert (trace.status[after[trace.kind[after] == PUSH]] == DROPPED).any()
    run = replay(trace, exact=exact)
    want = problems.play(trace, RULES["adagrad"][1])
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    assert run.info.dropped == trace.lost()["dropped"] > 0


# Compiled against exact.


@pytest.mark.parametrize("case", CASES)
def test_one_loop_equals_exact_to_rounding(case):
    trace = simulated(case)
    assert_runs_agree(compiled(trace, "loop"), replay(trace))


@pytest.mark.parametrize("case", DIRECT)
def test_recycled_equals_exact_to_rounding(case, large):
    trace = simulated(case)
    got = compiled(trace, "recycled", optimizer=MOMENTUM)
    assert_runs_agree(got, replay(trace, optimizer=MOMENTUM))


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_do_not_show(chunk, monkeypatch):
    trace = simulated("accrual")
    whole = compiled(trace, "loop")
    monkeypatch.setattr(sys.modules["dbjax.downpour.compiled"], "MOST_ROWS", chunk)
    assert_close(compiled(trace, "loop").params, whole.params, rtol=1e-6, atol=1e-7)


def compensated(g, state, params=None, *, staleness, stale_params, **extra):
    """Both extra arguments, so that neither can be another push's."""
    return jax.tree.map(
        lambda g, w, old: -0.05 * (g + g * g * (w - old)) / (1 + staleness),
        *(g, params, stale_params),
    ), state


COMPENSATE = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), compensated
)


def compensated_twin(trace):
    """The same in numpy, for one shard and one gradient a push."""
    versions, held, sent = [problems.flat(PARAMS)], {}, {}
    for row in range(len(trace)):
        r = int(trace.replica[row])
        if trace.version[row] >= 0 and trace.kind[row] != PUSH:
            held[r] = versions[trace.version[row]]
        elif trace.kind[row] == COMPUTE:
            sent[r] = problems.gradient(held[r], r, int(trace.batch[row]))
        elif trace.kind[row] == PUSH:
            w, old, g = versions[-1], versions[trace.base[row]], sent[r]
            missed = len(versions) - 1 - trace.base[row]
            step = 0.05 * (g + g * g * (w - old)) / (1 + missed)
            versions.append(w - step if trace.status[row] == TAKEN else w)
    return versions[-1]


@pytest.mark.parametrize("case", ["one shard", "one shard, far and picky"])
def test_the_rule_gets_the_staleness_and_the_old_parameters(case):
    trace = simulated(case)
    run = replay(trace, optimizer=COMPENSATE, provide=("staleness", "stale_params"))
    np.testing.assert_allclose(
        problems.flat(run.params), compensated_twin(trace), rtol=3e-4, atol=3e-5
    )


@pytest.mark.parametrize("case", ["three shards", "far shards", "far shards, accrual"])
def test_compiled_rules_get_them_too(case):
    keywords = {"optimizer": COMPENSATE, "provide": ("staleness", "stale_params")}
    trace = simulated(case)
    assert_runs_agree(compiled(trace, "loop", **keywords), replay(trace, **keywords))


def test_recycled_rules_get_them_too(large):
    keywords = {"optimizer": COMPENSATE, "provide": ("staleness", "stale_params")}
    trace = simulated("three shards")
    assert_runs_agree(
        compiled(trace, "recycled", **keywords), replay(trace, **keywords)
    )


def same_evaluations(got, want):
    assert [e["step"] for e in got] == [e["step"] for e in want]
    assert [e["time"] for e in got] == [e["time"] for e in want]
    np.testing.assert_allclose(
        [e["loss"] for e in got], [e["loss"] for e in want], rtol=1e-4
    )


def evaluate(params, step, time):
    full = {"x": problems.X, "y": problems.Y}
    return {"loss": float(loss_fn(params, full))}


@pytest.mark.parametrize("case", ["three shards", "far shards, accrual"])
def test_evaluations_are_those_of_the_exact_replay(case):
    trace, keywords = simulated(case), {"eval_fn": evaluate, "eval_every": 13}
    want = replay(trace, **keywords).trace.evaluations
    assert [each["step"] for each in want] == [13, 26, 39, 52, 60]
    assert want[-1]["loss"] < 0.7 * evaluate(PARAMS, 0, 0)["loss"]
    got = replay(trace, exact=False, **keywords).trace.evaluations
    same_evaluations(got, want)


# What cannot be compiled.


@pytest.mark.parametrize(
    ("case", "keywords", "words"),
    [
        ("one shard", {"local_optimizer": SGD}, "step locally between fetches"),
        (
            "accrual",
            {"version_dtype": jnp.bfloat16},
            "version_dtype needs one gradient",
        ),
    ],
)
def test_falls_back_to_exact_and_says_so(case, keywords, words):
    trace = simulated(case)
    with pytest.warns(UserWarning, match=f"replayed exactly, not compiled.*{words}"):
        run = compiled(trace, "exact", **keywords)
    problems.assert_same_bits(run.params, replay(trace, **keywords).params)


def test_falls_back_where_mixed_orders_are_too_large(large):
    with pytest.warns(UserWarning, match="too large for one loop") as caught:
        compiled(simulated("far shards"), "exact")
    assert caught[0].filename == REPLAY.__file__ or caught[0].filename == __file__


# Gradients that are not finite.


def spoilt(*where):
    """Data with NaN in the minibatches `(replica, step)`."""

    def before(replica, step):
        if (replica, step) in where:
            batch = DATA.batch(replica, step)
            return batch | {"y": np.full_like(batch["y"], np.nan)}

    return problems.Wrapped(before)


BAD = spoilt((0, 2), (0, 3), (1, 1), (2, 0), (3, 7))


@pytest.mark.parametrize("case", CASES)
def test_rejected_pushes_are_those_of_the_textbook(case):
    trace = simulated(case)
    run = replay(trace, BAD)
    rejected = (run.trace.status == NOT_FINITE).reshape(-1)
    assert rejected.any() and (run.trace.status[trace.status == DROPPED] != TAKEN).all()
    with np.errstate(all="ignore"):
        want = problems.play(run.trace, lambda: textbook.Adagrad(0.05), data=BAD)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    # By hand: every push that holds a spoilt minibatch, on every shard.
    spoilt_steps = {
        int(trace.step[row])
        for row in np.flatnonzero(trace.kind == COMPUTE)
        if np.isnan(
            BAD.batch(int(trace.replica[row]), int(trace.batch[row]))["y"]
        ).any()
    }
    names = {(int(r), int(i)) for r, i in zip(
        run.trace.replica[rejected], run.trace.id[rejected], strict=True)}  # fmt: skip
    by_name = collections.defaultdict(set)
    for row in np.flatnonzero(trace.kind == PUSH):
        mine = np.flatnonzero(
            (trace.kind == COMPUTE) & (trace.replica == trace.replica[row])
        )
        end = int(np.flatnonzero(trace.step[mine] == trace.step[row])[0]) + 1
        held = trace.step[mine[end - trace.count[row] : end]].tolist()
        by_name[int(trace.replica[row]), int(trace.id[row])] |= set(held)
    assert names == {name for name, held in by_name.items() if held & spoilt_steps}


@pytest.mark.parametrize("case", ["three shards", "far shards", "far shards, accrual"])
def test_one_loop_rejects_the_same(case):
    trace = simulated(case)
    got = compiled(trace, "loop", data=BAD)
    assert got.info.not_finite >= 4
    assert_runs_agree(got, replay(trace, BAD))


@pytest.mark.parametrize("case", ["three shards", "one shard, far and picky"])
def test_recycled_rejects_the_same(case, large):
    trace = simulated(case)
    got = compiled(trace, "recycled", data=BAD)
    assert got.info.not_finite >= 4
    assert_runs_agree(got, replay(trace, BAD))


@pytest.mark.parametrize("nbytes", [1 << 20, 0])
def test_evaluations_are_right_where_a_gradient_was_not_finite(nbytes, monkeypatch):
    """Whatever an executor finds out late, it evaluates what exact replay has."""
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", nbytes)
    keywords = {"eval_fn": evaluate, "eval_every": 7}
    trace = simulated("three shards")
    want = replay(trace, BAD, **keywords)
    got = replay(trace, BAD, exact=False, **keywords)
    same_evaluations(got.trace.evaluations, want.trace.evaluations)


def iterators():
    """BAD as iterators, which only go forwards."""

    def stream(replica, replicas):
        step = 0
        while True:
            yield BAD.batch(replica, step)
            step += 1

    return dbjax.from_iterators(stream)


@pytest.mark.parametrize("nbytes", [1 << 20, 0])
def test_iterators_whose_gradients_are_not_finite(nbytes, monkeypatch):
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", nbytes)
    trace = simulated("three shards")
    got = replay(trace, iterators(), exact=False)
    assert_runs_agree(got, replay(trace, BAD))


@pytest.mark.parametrize("nbytes", [1 << 20, 0])
@pytest.mark.parametrize("exact", [True, False])
def test_too_many_in_a_row_end_a_replay(exact, nbytes, monkeypatch):
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", nbytes)
    trace = Trace.from_delays(np.minimum(np.arange(130), 1))
    bad = spoilt(*((replica, step) for replica in range(3) for step in range(5, 130)))
    with pytest.raises(RejectedTooOften, match="100 pushes in a row were not finite"):
        replay(trace, bad, exact=exact)


# Narrow versions in flight.


def test_bfloat16_versions_are_near_and_their_executors_agree():
    trace = simulated("three shards")
    wide, narrow = replay(trace), replay(trace, version_dtype=jnp.bfloat16)
    assert_runs_agree(
        compiled(trace, "recycled", version_dtype=jnp.bfloat16), narrow, rtol=1e-4
    )
    assert narrow.params["w"].dtype == jnp.float32
    difference = np.abs(problems.flat(narrow.params) - problems.flat(wide.params)).max()
    assert 0 < difference < 0.02


def test_bfloat16_versions_are_what_gradients_see():
    """And only they: the shard steps from its own, wide parameters."""
    trace = simulated("one shard")
    run = replay(trace, version_dtype=jnp.bfloat16, optimizer=SGD)

    def gradient(w, replica, batch):
        narrow = np.asarray(jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32))
        return problems.gradient(narrow, replica, batch)

    want = textbook.downpour(
        *(trace, gradient, problems.flat(PARAMS)),
        *([slice(None)], lambda: textbook.sgd(0.05)),
    )
    np.testing.assert_allclose(
        problems.flat(run.params), textbook.join(want), rtol=3e-4, atol=3e-5
    )


@pytest.mark.parametrize("exact", [True, False])
def test_versions_of_the_dtype_that_the_parameters_have(exact):
    """Nothing to narrow: another memory must hold the version all the same."""
    trace = simulated("three shards")
    params = dict(PARAMS, b=jnp.zeros(problems.OUTPUTS, jnp.bfloat16))
    made = [
        dbjax.replay(trace, loss_fn, params, DATA, optimizer=SGD, exact=exact, **more)
        for more in ({}, {"version_dtype": jnp.float32})
    ]
    assert_close(made[0].params, made[1].params, rtol=1e-2, atol=1e-2)
    assert made[1].params["b"].dtype == jnp.bfloat16


# Verification.


@pytest.fixture
def recorded():
    return problems.train(dbjax.Emulated(FAR), shards=2, replicas=4, steps=220)


def tampered(trace, row):
    digest = trace.digest.copy()
    digest[row] ^= np.uint64(1)
    return dataclasses.replace(trace, digest=digest)


def test_verify_names_the_first_digest_that_differs(recorded):
    trace = recorded.trace
    replay(trace, verify=True)
    rows = np.flatnonzero(trace.digest)
    assert len(rows) >= 4
    for place in (0, 2):
        row = rows[place]
        words = f"version {trace.version[row]} of shard {trace.shard[row]} (row {row},"
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            replay(tampered(tampered(trace, row), rows[-1]), verify=True)
        before = rows[place - 1] if place else None
        agreed = (
            f"version {trace.version[before]} of shard {trace.shard[before]}"
            if place
            else "the start"
        )
        assert str(error.value).endswith(f"last agreed at {agreed}")


def test_verify_notices_other_data(recorded):
    """The first digest after the minibatch that is another one."""
    trace = recorded.trace
    replica, batch = 2, 31

    def before(r, step):
        if (r, step) == (replica, batch):
            other = DATA.batch(r, step)
            return other | {"x": other["x"] + np.float32(1e-3)}

    row = np.flatnonzero(
        (trace.kind == COMPUTE) & (trace.replica == replica) & (trace.batch == batch)
    )[0]
    mine = (trace.kind == PUSH) & (trace.replica == replica)
    pushed = [
        np.flatnonzero(mine & (trace.step == trace.step[row]) & (trace.shard == s))[0]
        for s in range(2)
    ]
    checked = np.flatnonzero(trace.digest)
    first = min(r for r in checked if r >= pushed[trace.shard[r]])
    with pytest.raises(ValueError, match=f"row {first}, "):
        replay(trace, problems.Wrapped(before), verify=True)


@pytest.mark.parametrize("change", ["optimizer", "params"])
def test_verify_notices_another_rule_or_start(recorded, change):
    keywords = {"optimizer": ADAGRAD, "params": PARAMS}
    keywords |= {
        "optimizer": {"optimizer": SGD},
        "params": {"params": PARAMS | {"b": PARAMS["b"] + 1}},
    }[change]
    params = keywords.pop("params")
    with pytest.raises(ValueError, match="last agreed at the start"):
        dbjax.replay(recorded.trace, loss_fn, params, DATA, verify=True, **keywords)


def test_verify_needs_digests_and_exact_replay(recorded):
    with pytest.raises(ValueError, match="holds no digests"):
        replay(simulated("one shard"), verify=True)
    with pytest.raises(ValueError, match="needs exact=True"):
        replay(recorded.trace, verify=True, exact=False)


# Bad input.


def test_traces_that_cannot_be_replayed():
    trace = simulated("one shard")
    with pytest.raises(TypeError, match=r"must be a dbjax\.Trace, got a dict"):
        replay(trace.columns())
    with pytest.raises(ValueError, match="no PUSH row"):
        replay(trace.take(slice(0, 5)))
    with pytest.raises(ValueError, match="the Trace breaks at row"):
        replay(trace.take(slice(40, None)))
    with pytest.raises(ValueError, match=r"number of parameters \(44\), got 45"):
        replay(dbjax.simulate(NEAR, replicas=1, shards=45, steps=2))


def corrupted(trace, what):
    """A Trace with something changed that leaves it looking like one."""
    header, columns = dict(trace.header), trace.columns()
    match what:
        case "fewer shards" | "more shards":
            header["shards"] += 1 if what == "more shards" else -1
        case "fewer replicas":
            header["replicas"] -= 1
        case "a row is missing":
            row = np.flatnonzero(trace.kind == PUSH)[3]
            return trace.take(np.arange(len(trace)) != row)
        case "backwards":
            return trace.take(slice(None, None, -1))
        case "an unknown step":
            columns["step"] = np.where(trace.kind == PUSH, 99, trace.step)
        case "a restored shard":
            columns["incarnation"] = np.ones(len(trace))
    return Trace.from_columns(header, **columns)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fewer shards", "breaks at row .* shard is 2; it must be from 0 to 1"),
        ("more shards", "computes before it has fetched"),
        ("fewer replicas", "breaks at row .* replica is 4; it must be from 0 to 3"),
        ("a row is missing", "breaks at row .* pushes of a shard make versions"),
        ("backwards", "breaks at row"),
        ("an unknown step", "PUSH of a step that no COMPUTE row has"),
        ("a restored shard", "incarnation is 1; by its RESTART rows .* incarnation 0"),
    ],
)
def test_a_trace_that_does_not_fit_is_never_replayed(what, words, exact):
    with pytest.raises(ValueError, match=words):
        replay(corrupted(simulated("far shards"), what), exact=exact)


@pytest.mark.parametrize("trace", [None, "run.npz", b"", [], (1, 2), optax.sgd(0.1)])
def test_what_is_not_a_trace_is_named(trace):
    with pytest.raises(TypeError, match=r"^trace must be a dbjax\.Trace, got a "):
        replay(trace)


def test_a_trace_that_was_cut_off_is_the_run_so_far(recorded):
    """Whichever row it ends with: all digests up to there are met, or it is named."""
    trace = recorded.trace
    met = set()
    for end in range(1, len(trace), 97):
        part = trace.take(slice(0, end))
        digests = np.count_nonzero(part.digest)
        if not digests:
            with pytest.raises(ValueError, match="no PUSH row|holds no digests"):
                replay(part, verify=True)
            continue
        run = replay(part, verify=True)
        assert run.info.steps == np.count_nonzero(part.kind == COMPUTE)
        met.add(digests)
    assert len(met) >= 2


@pytest.mark.parametrize("damage", ["cut off", "a bit", "a pickle", "text"])
def test_a_damaged_file_is_not_replayed(damage, tmp_path, recorded):
    path = tmp_path / "trace.npz"
    recorded.trace.save(path)
    contents = bytearray(path.read_bytes())
    match damage:
        case "cut off":
            del contents[len(contents) // 2 :]
        case "a bit":
            contents[len(contents) // 2] ^= 1
        case "a pickle":
            contents = pickle.dumps(recorded.trace.columns())
        case "text":
            contents = b"{}"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        replay(Trace.load(path))


def shorter(replica, step):
    if (replica, step) == (1, 3):
        return jax.tree.map(lambda a: a[:3], DATA.batch(replica, step))


@pytest.mark.parametrize("nbytes", [1 << 20, 0])
@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_of_other_shapes_is_named(exact, nbytes, monkeypatch):
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", nbytes)
    trace, data = simulated("three shards"), problems.Wrapped(shorter)
    with pytest.raises(ValueError, match="replica 1|of replica 1, step 3"):
        replay(trace, data, exact=exact)


def test_the_trace_is_left_as_it_was():
    trace = simulated("three shards")
    before = {name: column.copy() for name, column in trace.columns().items()}
    run = replay(trace, BAD, eval_fn=evaluate, eval_every=20)
    assert run.info.not_finite and run.trace.evaluations
    for name, column in trace.columns().items():
        np.testing.assert_array_equal(column, before[name])
    assert trace.evaluations == ()


# Compilation.

COMPILING = re.compile(r"Compiling (.*) with global shapes and types (.*?)\. Arg", re.S)


def compilations(caplog, run):
    """How often each function was compiled for each shape, in a run."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        run()
    found = (COMPILING.match(record.getMessage()) for record in caplog.records)
    return collections.Counter(match.groups() for match in found if match)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("executor", ["exact", "loop", "recycled"])
def test_each_function_compiles_once(executor, shards, caplog, monkeypatch):
    """Once per run and shape, and no more of them in a longer run."""
    monkeypatch.undo()  # really compile
    monkeypatch.setattr(REPLAY, "LOOP_BYTES", 0 if executor == "recycled" else 1 << 20)
    numbers, traced = [], []
    for steps in (20, 90):
        count = [0]

        def counting(params, batch, count=count):
            count[0] += 1
            return loss_fn(params, batch)

        trace = dbjax.simulate(NEAR, replicas=3, shards=shards, steps=steps)
        compiled = compilations(
            caplog,
            lambda counting=counting, trace=trace: dbjax.replay(
                *(trace, counting, PARAMS, DATA),
                optimizer=MOMENTUM,
                exact=executor == "exact",
            ),
        )
        ours = [
            (name, shapes)
            for (name, shapes), times in compiled.items()
            # What an optimizer's state begins with takes no arguments to tell apart.
            if times > 1 and "init_fn" not in name
        ]
        assert compiled and not ours, f"compiled more than once: {ours}"
        numbers.append(sum(compiled.values()))
        traced.append(count[0])
    # The second run finds some small functions of the first one in the cache.
    assert numbers[1] <= numbers[0]
    assert traced[0] == traced[1] <= 3


@pytest.mark.parametrize("case", CASES)
def test_looking_ahead_takes_no_more_memory_than_is_allowed(case):
    """R + 4 copies, 2 R + 4 where gradients accrue, or what the plan needs anyway."""
    trace = simulated(case)
    plan = make_plan(trace)
    most = (1 if plan.direct else 2) * int(trace.header["replicas"]) + 4
    assert replay(trace).info.peak_copies <= max(most, peak_copies(plan))
