"""The laws of Downpour, one by one; what has a test file of its own is short here."""

import collections
import pathlib
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.server.layout import Layout
from dbjax.trace import COMPUTE, FAIL, PUSH
from tests import problems
from tests.problems import ADAGRAD, DATA, MOMENTUM, PARAMS, SGD, loss_fn, train

RUNTIMES = {
    "emulated": dbjax.Emulated(),
    "threads": dbjax.Threads(digest_every=1, jitter=1e-4),
}
FAR = dbjax.Cluster(
    step_time=dbjax.Gamma(1.0, 2.0),
    latency=dbjax.Exponential(0.4),
    shard_service=dbjax.Exponential(0.05),
)


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return RUNTIMES[request.param]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    yield from problems.alarm()


# One replica is the plain loop: whatever is trained, on however many shards.

random = np.random.default_rng(1)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)


def perceptron(params, batch):
    hidden = batch["x"]
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return jnp.mean((hidden @ params[-1]["w"] + params[-1]["b"] - batch["y"]) ** 2)


def linear(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def elementwise(params, batch):
    """Gradients that end in products, which could be fused into the rule's sums."""
    scale = jnp.mean(batch["x"])
    each = (
        jnp.mean((scale * w - jnp.sin(w) + 1) ** 2) for w in jax.tree.leaves(params)
    )
    return sum(each)


TREES = {
    "a perceptron": (
        perceptron,
        [{"b": normal(n), "w": normal(m, n)} for m, n in ((10, 17), (17, 4))],
    ),
    "one matrix": (linear, normal(10, 4)),
    "odds and ends": (
        elementwise,
        {"a": normal(1), "s": np.float32(0.3), "t": (normal(3, 5, 4), [normal(37)])},
    ),
}
RULES = {
    "sgd": SGD,
    "momentum": MOMENTUM,
    "adagrad": ADAGRAD,
}
SHARDS = (1, 2, 3, 4, 6)
# Every tree on every number of shards; each rule meets each tree and each number.
CASES = [
    (tree, shards, list(RULES)[(i + j) % 3])
    for i, tree in enumerate(TREES)
    for j, shards in enumerate(SHARDS)
]
ADAM = optax.adam(0.01)


def plain(tree, rule, steps):
    """What anybody would write."""
    loss, params = TREES[tree]

    @jax.jit
    def step(params, state, batch):
        updates, state = rule.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = rule.init(params)
    for t in range(steps):
        params, state = step(params, state, DATA.batch(0, t))
    return params


def alone(runtime, tree, rule, steps, shards):
    """The same with one replica and `n_fetch = n_push = 1`."""
    loss, params = TREES[tree]
    keywords = {"loss_fn": loss, "params": params, "optimizer": rule, "steps": steps}
    # Whether a rule can be split is checked elsewhere, and takes a while.
    keywords |= {"replicas": 1, "shards": shards, "per_shard": True}
    return train(runtime, DATA, **keywords).params


@pytest.mark.parametrize(("tree", "shards", "rule"), CASES)
def test_one_replica_is_the_plain_loop_bit_for_bit(tree, shards, rule):
    want = plain(tree, RULES[rule], 60)
    for runtime in RUNTIMES.values():
        got = alone(runtime, tree, RULES[rule], 60, shards)
        problems.assert_same_bits(got, want)


@pytest.mark.parametrize("shards", [1, 3])
def test_one_replica_with_adam_is_the_plain_loop(runtime, shards):
    """Where one leaf alone is divided by a scalar, XLA multiplies it by the reciprocal:
    so with shards that hold one leaf, the last bit is free."""
    want = plain("a perceptron", ADAM, 60)
    got = alone(runtime, "a perceptron", ADAM, 60, shards)
    if shards == 1:
        problems.assert_same_bits(got, want)
    got, want = problems.flat(got), problems.flat(want)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# A barrier is a large batch.

BARRED = {
    "emulated": [dbjax.Emulated(), dbjax.Emulated(FAR, seed=3)],
    # With pauses drawn for each replica, so that some are late for a round.
    "threads": [dbjax.Threads(jitter=4e-3, seed=seed) for seed in range(4)],
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("where", "replicas"),
    [("emulated", 1), ("emulated", 2), ("emulated", 5), ("threads", 1), ("threads", 5)],
)
def test_a_barrier_with_sgd_is_one_step_on_the_summed_gradient(where, replicas, shards):
    rounds = 8
    w = problems.flat(PARAMS)
    for batch in range(rounds):
        w = w - 0.05 * sum(problems.gradient(w, r, batch) for r in range(replicas))
    for runtime in BARRED[where]:
        run = train(
            *(runtime, DATA),
            **{"optimizer": SGD, "protocol": dbjax.synchronous()},
            **{"replicas": replicas, "shards": shards, "steps": rounds * replicas},
        )
        # Every gradient of a round is one of the parameters that it begins with.
        pushes = run.trace.take(run.trace.kind == PUSH)
        begun = (pushes.version - 1) // replicas * replicas
        np.testing.assert_array_equal(pushes.base, begun)
        np.testing.assert_allclose(problems.flat(run.params), w, rtol=1e-4, atol=1e-5)


# A run is its Trace.

KINDS = {
    "plain": {},
    "three shards": {"shards": 3},
    "accrual": {"shards": 3, "n_push": 3, "n_fetch": 2},
    "overlap": {"shards": 3, "overlap": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_exact_replay_of_its_trace(runtime, kind):
    run = train(runtime, steps=60, replicas=4, **KINDS[kind])
    problems.assert_replays(run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_replay_is_the_exact_one_to_rounding(runtime, kind):
    run = train(runtime, steps=60, replicas=4, **KINDS[kind])
    again = dbjax.replay(
        run.trace, loss_fn, PARAMS, DATA, optimizer=ADAGRAD, exact=False
    )
    assert again.info.executor == "loop"
    for got, want in (
        (again.params, run.params),
        (again.optimizer_state, run.optimizer_state),
    ):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        got, want = problems.flat(got), problems.flat(want)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


# A fixed seed fixes everything.

FIXED = {
    "plain": (dbjax.Emulated(), {}),
    "far": (dbjax.Emulated(FAR, seed=3), {"shards": 3, "n_push": 2, "overlap": True}),
}


def checksums():
    """Of the Trace and of the bits of each run in FIXED."""
    for runtime, keywords in FIXED.values():
        run = train(runtime, steps=120, **keywords)
        leaves = jax.tree.leaves((run.params, run.optimizer_state))
        for array in [*run.trace.columns().values(), *leaves]:
            yield zlib.crc32(np.ascontiguousarray(array).tobytes())


ELSEWHERE = "from tests import laws_test; print(*laws_test.checksums())"


def test_a_seed_fixes_the_trace_and_all_bits_in_every_process():
    mine = list(checksums())
    assert list(checksums()) == mine
    theirs = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        **{"capture_output": True, "check": True, "text": True, "timeout": 100},
        cwd=pathlib.Path(__file__).parent.parent,
    )
    assert theirs.stdout.split() == [str(number) for number in mine]


def test_another_seed_is_another_run():
    one, other = (train(dbjax.Emulated(seed=seed), steps=60) for seed in (0, 1))
    assert one.trace.diff(other.trace) is not None
    assert np.any(problems.flat(one.params) != problems.flat(other.params))


# A killed replica loses what it has accrued, and that is all.

FAILING = dbjax.Cluster(
    latency=dbjax.Exponential(0.2),
    failures=dbjax.Failures(uptime=dbjax.Exponential(8.0), downtime=2.0),
)


def lost_by_hand(trace, shard):
    """Gradients in no push to a shard: every replica's, between its rows there."""
    lost = collections.Counter()
    for r in range(trace.header["replicas"]):
        mine = trace.take(
            (trace.replica == r) & ((trace.shard == shard) | (trace.shard < 0))
        )
        waiting = 0
        for kind, count in zip(mine.kind, mine.count, strict=True):
            if kind == COMPUTE:
                waiting += 1
            elif kind == PUSH:
                waiting -= count
            elif kind == FAIL:
                lost[r] += count
        assert waiting == lost[r] >= 0
    return lost


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("n_push", [1, 2, 5])
def test_a_killed_replica_loses_only_its_accrued_gradients(shards, n_push):
    killed = 0
    for seed in range(20):
        trace = dbjax.simulate(
            *(FAILING,),
            **{"replicas": 4, "shards": shards, "steps": 80},
            **{"n_push": n_push, "n_fetch": 2, "seed": seed},
        )
        assert np.all(trace.count[trace.kind == FAIL] <= n_push)
        killed += np.count_nonzero(trace.kind == FAIL)
        lost = [lost_by_hand(trace, shard) for shard in range(shards)]
        assert all(each == lost[0] for each in lost)
        assert sum(lost[0].values()) == trace.lost()["gradients"]
    assert killed > 20


@pytest.mark.parametrize("shards", [1, 3])
def test_what_a_killed_replica_loses_is_counted_and_nothing_else_is_missing(shards):
    run = train(dbjax.Emulated(FAILING, seed=1), shards=shards, n_push=3, steps=60)
    trace, info = run.trace, run.info
    for shard in range(shards):
        pushed = trace.count[(trace.kind == PUSH) & (trace.shard == shard)].sum()
        assert info.steps - pushed == info.lost_gradients > 0
    assert (info.not_finite, info.dropped) == (0, 0)
    problems.assert_replays(run)


# Draws are keyed by (seed, replica, step).

OTHERWISE = {
    "more replicas": {"replicas": 7},
    "more shards": {"shards": 3},
    "more steps": {"steps": 90},
    "a barrier": {"protocol": dbjax.synchronous()},
    "seldom": {"n_fetch": 3, "n_push": 2},
    "overlap": {"overlap": True},
    "a warm start": {"warmstart_steps": 9},
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_a_step_takes_as_long_and_sees_the_same_batch_in_another_run(change):
    """So that clusters and protocols can be compared pairwise."""
    seen = []
    for keywords in ({}, OTHERWISE[change]):
        given = {}
        keywords = {"steps": 45} | keywords

        def before(replica, step, given=given):
            given[replica, step] = DATA.batch(replica, step)["x"].tobytes()

        run = train(dbjax.Emulated(FAR, seed=5), problems.Wrapped(before), **keywords)
        rows = run.trace.take(run.trace.kind == COMPUTE)
        names = zip(rows.replica.tolist(), rows.batch.tolist(), strict=True)
        seen.append((dict(zip(names, rows.time - rows.start, strict=True)), given))
    (times, given), (other_times, other_given) = seen
    common = times.keys() & other_times.keys()
    assert len(common) >= 12
    assert {replica for replica, _ in common} == {0, 1, 2}
    for name in common:
        # A duration is the difference of two moments.
        assert times[name] == pytest.approx(other_times[name], rel=1e-9)
        assert given[name] == other_given[name]


# Each jitted function is compiled once per run and shape.


@pytest.fixture
def compilations(monkeypatch):
    """How often XLA has compiled what, in all threads."""
    monkeypatch.undo()  # really compile
    names = collections.Counter()

    def hear(event, seconds, **more):
        if event.endswith("backend_compile_duration"):
            names[more["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield names
    jax.monitoring.unregister_event_duration_listener(hear)


COMPILED = {
    "plain": {},
    "shards": {"shards": 4},
    "accrual": {"shards": 4, "n_push": 3, "n_fetch": 2, "overlap": True},
    "local steps": {"n_push": 2, "n_fetch": 3, "local_optimizer": SGD},
    "provided": {"shards": 2, "provide": ("staleness", "stale_params")},
}


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [*(("emulated", kind) for kind in COMPILED), ("threads", "accrual")],
    indirect=["runtime"],
)
def test_each_function_is_compiled_once_per_run_and_shape(runtime, kind, compilations):
    """No more often in a longer run, and for shards of the same shapes only once."""
    keywords = COMPILED[kind]
    parts = Layout.of(PARAMS, keywords.get("shards", 1)).split(PARAMS)
    shapes = {str(jax.tree.map(np.shape, part)) for part in parts}
    before = None
    for steps in (20, 90):
        traced = []

        def counted(params, batch, traced=traced):
            traced.append(None)
            return loss_fn(params, batch)

        compilations.clear()
        train(runtime, loss_fn=counted, steps=steps, **keywords)
        assert len(traced) == 2  # when it is checked, and as a gradient
        assert compilations["jit(gradient)"] == 1
        updates = "apply_gradients", "recycle_spare", "update_in_place"
        assert any(compilations[f"jit({name})"] for name in updates)
        assert all(compilations[f"jit({name})"] <= len(shapes) for name in updates)
        # Small eager functions may be in JAX's cache already, or not.
        names = "split", "merge", "gradient", "on_one", "on_shards", "loss"
        counts = [compilations[f"jit({name})"] for name in names]
        assert before is None or counts == before
        before = counts


def test_shards_of_one_shape_share_what_is_compiled(compilations):
    """Four cost what two cost."""
    before = None

    def loss(params, batch):
        return jnp.mean((batch["x"][:, :8] @ params["w"][:8]) ** 2)

    for shards in (2, 4):
        params = {"w": np.ones((4 * shards, 4), np.float32)}
        compilations.clear()
        train(dbjax.Emulated(), loss_fn=loss, params=params, shards=shards)
        assert compilations["jit(apply_gradients)"] == 1
        # Small eager functions may be in JAX's cache already, or not.
        names = "split", "merge", "gradient", "on_one", "on_shards", "loss"
        counts = [compilations[f"jit({name})"] for name in names]
        assert before is None or counts == before
        before = counts


@pytest.mark.parametrize("replicas", [1, 2, 5, 11])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_emulated_downpour_is_stable_as_far_as_theory_says(replicas, factor):
    """Equal machines in turn: w[t+1] = w[t] - a w[t - tau], tau = replicas - 1.

    That is stable for a < 2 sin(pi / (4 tau + 2)); the error shrinks or grows by the
    largest root of z^(tau+1) = z^tau - a.
    """
    tau, steps, errors = replicas - 1, 60 * replicas, []
    a = factor * 2 * np.sin(np.pi / (4 * tau + 2))
    data = dbjax.from_arrays({"x": np.ones((4, 1), np.float32)}, 4)
    run = dbjax.downpour.train(
        lambda params, batch: 0.5 * params["w"] ** 2 * jnp.mean(batch["x"]),
        *({"w": np.ones((), np.float32)}, data),
        optimizer=optax.sgd(a),
        replicas=replicas,
        steps=2 * steps,
        runtime=dbjax.Emulated(dbjax.Cluster(step_time=1.0)),
        eval_fn=lambda params, *_: errors.append(abs(float(params["w"]))) or {},
        eval_every=1,
    )
    assert set(run.trace.staleness()[replicas:, 0]) == {tau}
    roots = np.roots([1, -1, *[0] * (tau - 1), a] if tau else [1, a - 1])
    # The error swings: its largest in a window, and in one that is so much later.
    size = np.array(errors)[-steps:].reshape(2, -1).max(axis=1)
    rate = (size[1] / size[0]) ** (2 / steps)
    assert (rate < 1) == (factor < 1)
    np.testing.assert_allclose(rate, np.abs(roots).max(), rtol=5e-3)
