"""`train`: what it refuses, what it survives, and what it says about it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.downpour.protocol import Protocol
from dbjax.runtime.base import MOST_REJECTED, RejectedTooOften
from dbjax.trace import COMPUTE, NOT_FINITE, PUSH, TAKEN
from tests import problems, textbook
from tests.problems import DATA, MOMENTUM, PARAMS, loss_fn, train

RUNTIMES = {"emulated": dbjax.Emulated(), "threads": dbjax.Threads()}


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return RUNTIMES[request.param]


def of(names, *values):
    return [({name: value}, name) for name in names for value in values]


def loss_of(value):
    return {"loss_fn": lambda params, batch: value(loss_fn(params, batch))}


WHOLE = ("replicas", "shards", "steps", "n_fetch", "n_push")
BAD = [
    *of(WHOLE, 0, -1, 1.0, 2.5, "3", None, True, [2], np.nan),
    *of(WHOLE, np.int64(0), np.True_, np.float32(2), np.array([2]), 2j),
    *of(("warmstart_steps",), -1, 0.5, "1", None),
    *of(("eval_every", "checkpoint_every"), 0, -5, 2.5, "3"),
    *of(("overlap",), 1, None, "yes"),
    *of(("protocol",), "asynchronous", None, dbjax.asynchronous),
    *of(("eval_fn", "checkpoint_dir"), 3),
    *of(("optimizer", "local_optimizer"), 0.1, "adagrad", optax.sgd),
    *of(("optimizer",), None),
    *of(("loss_fn",), None, 3),
    *of(("data",), None, problems.X),
    *of(("runtime",), "threads", dbjax.Threads),
    *of(("split",), "odd", None),
    *of(("version_dtype",), jnp.int32, "int8", "no dtype"),
    *of(("mesh",), 1),
    *of(("rules",), [("w", None)]),
    # With one shard and with several: another check comes first.
    *of(("provide",), "staleness", ("age",), 3),
    *[({"provide": p, "shards": 2}, "provide") for p in ("staleness", ("age",))],
    # More shards than parameters, or than leaves that stay whole.
    ({"shards": 45}, r"shards must be at most .* \(44\), got 45"),
    ({"shards": 3, "split": "leaf"}, r"shards must be at most .* leaves \(2\)"),
    ({"params": {"w": jnp.ones(3)}, "shards": 4}, "shards must be at most"),
    # Nothing to train, or nothing that can be.
    *of(("params",), None, {}, [], {"w": None}),
    *of(("params",), {"w": np.arange(3)}, {"w": True}, 3, {"w": 1j}, {"w": "no"}),
    *of(("params",), {"w": np.zeros((3, 0), np.float32)}),
    ({"params": {"a": PARAMS["w"], "b": np.arange(2)}}, r"params\['b'\] .* int"),
    ({"params": {"a": PARAMS["w"], "b": np.zeros((0,))}}, r"params\['b'\] is empty"),
    # Losses.
    (loss_of(lambda x: x[None]), r"loss_fn must return a scalar float.*\(1,\)"),
    (loss_of(lambda x: jnp.int32(3)), "loss_fn must return a scalar float.*int32"),
    (loss_of(lambda x: True), "loss_fn must return a scalar float.*bool"),
    (loss_of(lambda x: x + 1j), "loss_fn must return a scalar float.*complex"),
    (loss_of(lambda x: (x, x)), "loss_fn must return .* a tuple .*has_aux=True"),
    (loss_of(lambda x: {"loss": x}), "loss_fn must return .* a dict"),
    (loss_of(lambda x: None), "loss_fn must return .* NoneType"),
    (loss_of(lambda x: x) | {"has_aux": True}, r"loss_fn must return \(loss, aux\)"),
    (loss_of(lambda x: ({}, x)) | {"has_aux": True}, "loss_fn must return"),
    (loss_of(lambda x: x * jnp.nan), "loss_fn gives nan on the first minibatch"),
    (loss_of(lambda x: x / 0), "loss_fn gives inf on the first minibatch"),
    ({"params": PARAMS | {"b": np.full(4, np.nan)}}, "loss_fn gives nan"),
    # A rule that the split would change.
    (
        {"optimizer": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))}
        | {"shards": 2},
        "optimizer's result depends on the split over 2 shards",
    ),
]


IDS = [f"{'-'.join(change)}-{number}" for number, (change, _) in enumerate(BAD)]


@pytest.mark.parametrize(("change", "words"), BAD, ids=IDS)
def test_bad_input_is_named_before_anything_runs(change, words, tmp_path):
    asked = set()
    data = problems.Wrapped(lambda *at: asked.add(at))
    eval_fn = pytest.fail
    change = {"checkpoint_dir": tmp_path, "eval_fn": eval_fn, "data": data} | change
    for runtime in RUNTIMES.values():
        with pytest.raises((ValueError, TypeError), match=words):
            train(**{"runtime": runtime} | change)
        assert asked <= {(0, 0)}
        assert not list(tmp_path.iterdir())
        assert not problems.replica_threads()


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int32])
def test_numpy_integers_are_integers(runtime, kind):
    names = {"replicas": 3, "shards": 2, "steps": 9, "n_fetch": 2, "n_push": 2}
    names |= {"warmstart_steps": 2, "eval_every": 4}
    given = {name: kind(value) for name, value in names.items()}
    run = train(runtime, eval_fn=lambda *_: {}, per_shard=True, **given)
    kept = {name: run.trace.header[name] for name in list(names)[:-1]}
    assert kept == {name: names[name] for name in kept}
    assert all(type(value) is int for value in kept.values())
    assert [each["step"] for each in run.trace.evaluations] == [4, 8, 9]


@pytest.mark.parametrize("kind", [np.int8, jnp.int32])
def test_integers_of_any_kind_are_integers(kind):
    run, want = (train(shards=shards, per_shard=True) for shards in (kind(6), 6))
    problems.assert_same_bits(run.params, want.params)


@pytest.mark.parametrize(
    "params",
    [
        {"w": np.ones(3, np.float16)},
        {"w": jnp.ones(3, jnp.bfloat16), "b": np.float32(1)},
        [np.ones(2), (np.float32(3),)],  # float64 becomes what JAX is set to
        np.ones((2, 2), np.float32),
        0.5,
    ],
)
def test_any_tree_of_floats_can_be_trained(runtime, params):
    def loss(params, batch):
        return jnp.mean((sum(map(jnp.sum, jax.tree.leaves(params))) - batch["y"]) ** 2)

    run = train(runtime, loss_fn=loss, params=params, n_push=2, optimizer=MOMENTUM)
    start = jax.tree.map(jnp.asarray, params)
    assert jax.tree.structure(run.params) == jax.tree.structure(start)
    for leaf, first in zip(*map(jax.tree.leaves, (run.params, start)), strict=True):
        assert (leaf.dtype, leaf.shape) == (first.dtype, first.shape)
        assert np.all(leaf != first)


def test_a_barrier_and_a_picky_protocol_need_no_special_treatment(runtime):
    """Four lines are a protocol."""
    lockstep = Protocol(
        "two at most",
        may_begin=lambda clocks, r: clocks.rounds[r] <= clocks.slowest + 2,
        takes=lambda clocks, r, staleness: staleness < 3,
    )
    run = train(runtime, protocol=lockstep, steps=30)
    assert run.trace.header["protocol"] == "two at most"
    ahead = np.zeros(3, int)
    for r in run.trace.replica[run.trace.kind == COMPUTE]:
        ahead[r] += 1
        assert ahead.max() - ahead.min() <= 3


OTHER = {
    "another size": lambda batch: jax.tree.map(lambda a: a[:3], batch),
    "another dtype": lambda batch: batch | {"y": batch["y"].astype(np.float16)},
    "another name": lambda batch: {"x": batch["x"], "z": batch["y"]},
    "one more": lambda batch: batch | {"z": batch["y"]},
}


@pytest.mark.parametrize("other", OTHER)
def test_a_batch_of_other_shapes_is_named(runtime, other, monkeypatch):
    problems.compile_once(monkeypatch)

    def before(replica, step):
        if (replica, step) == (1, 3):
            return OTHER[other](DATA.batch(replica, step))

    with pytest.raises(Exception, match="minibatch 3 of replica 1 has other shapes"):
        train(runtime, problems.Wrapped(before), protocol=dbjax.synchronous())


def spoilt(*where, value=np.nan):
    """Data with `value` in the minibatches `(replica, step)`."""

    def before(replica, step):
        if (replica, step) in where:
            batch = DATA.batch(replica, step)
            return batch | {"y": np.full_like(batch["y"], value)}

    return problems.Wrapped(before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_gradient_that_is_not_finite_is_rejected(runtime, shards, value, monkeypatch):
    """With its whole push, everywhere; all shards count a version and go on."""
    problems.compile_once(monkeypatch)
    where = {(0, 2), (0, 3), (1, 1), (2, 0)}
    data = spoilt(*where, value=value)
    keywords = {"shards": shards, "n_push": 2, "protocol": dbjax.synchronous()}
    run = train(runtime, data, **keywords)
    trace, info = run.trace, run.info
    # Windows of two: replica 0's second push, and the first of each of the others.
    rejected = trace.status == NOT_FINITE
    names = set(zip(trace.replica[rejected], trace.id[rejected], strict=True))
    assert names == {(0, 1), (1, 0), (2, 0)}
    assert rejected.sum() == 3 * shards
    assert set(trace.status) == {TAKEN, NOT_FINITE}
    assert (info.not_finite, info.dropped, info.pushes) == (3, 0, 12)
    assert trace.lost()["not_finite"] == 3
    trace.validate()
    with np.errstate(all="ignore"):
        want = problems.play(trace, lambda: textbook.Adagrad(0.05), data=data)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    problems.assert_replays(run, data)


@pytest.mark.parametrize("n_push", [1, 2])
@pytest.mark.parametrize("shards", [1, 3])
def test_too_many_in_a_row_end_the_run(runtime, shards, n_push, monkeypatch, tmp_path):
    """And what was trained before stays on disk, to go on from with better data."""
    problems.compile_once(monkeypatch)

    def before(replica, step):
        if step >= 4:
            batch = DATA.batch(replica, step)
            return batch | {"x": np.full_like(batch["x"], np.nan)}

    keywords = {"steps": 400, "n_push": n_push, "shards": shards}
    keywords |= {"checkpoint_dir": tmp_path, "checkpoint_every": 399}
    with pytest.raises(RejectedTooOften) as caught:
        train(runtime, problems.Wrapped(before), **keywords)
    assert f"{MOST_REJECTED} pushes in a row were not finite" in str(caught.value)
    run = train(runtime, **keywords)
    trace = run.trace
    if isinstance(runtime, dbjax.Emulated):
        # The hundredth push, by its first row.
        pushes = zip(trace.replica, trace.id, strict=True)
        rows = np.flatnonzero(trace.status == NOT_FINITE)
        first = {name: row for row, name in reversed(list(enumerate(pushes)))}
        row = sorted({first[trace.replica[i], trace.id[i]] for i in rows})[99]
        named = f"replica {trace.replica[row]} at step {trace.step[row]}:"
        assert named in str(caught.value)
    assert run.info.resumed_at > 0
    # And those that were accrued, on their way, or not yet in a row.
    assert MOST_REJECTED <= run.info.not_finite < 2 * MOST_REJECTED
    assert run.info.steps == 400
    assert np.isfinite(problems.flat(run.params)).all()
    assert not problems.replica_threads()


def test_as_many_but_not_in_a_row_do_not(runtime, monkeypatch):
    problems.compile_once(monkeypatch)

    def before(replica, step):
        if step % 50:
            batch = DATA.batch(replica, step)
            return batch | {"x": np.full_like(batch["x"], np.nan)}

    run = train(runtime, problems.Wrapped(before), steps=250, replicas=1)
    assert run.info.not_finite == 245


def test_info(runtime, monkeypatch):
    problems.compile_once(monkeypatch)
    run = train(runtime, shards=3, n_push=2, steps=25)
    info, trace = run.info, run.trace
    staleness = trace.staleness()
    assert info.steps == 25
    assert info.pushes == len(staleness)
    assert (info.not_finite, info.dropped, info.lost_gradients) == (0, 0, 0)
    assert info.mean_staleness == staleness.mean()
    assert info.max_staleness == staleness.max()
    assert info.executor == (
        "exact" if trace.header["runtime"] == "Emulated" else "live"
    )
    assert 4 < info.peak_copies < 40
    assert info.resumed_at == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_what_failed_replicas_lose_is_counted(shards, monkeypatch):
    problems.compile_once(monkeypatch)
    failures = dbjax.Failures(uptime=dbjax.Exponential(9.0), downtime=4.0)
    runtime = dbjax.Emulated(dbjax.Cluster(failures=failures), seed=5)
    run = train(runtime, shards=shards, n_push=3, steps=60)
    trace = run.trace
    pushed = trace.count[(trace.kind == PUSH) & (trace.shard == 0)].sum()
    assert run.info.lost_gradients == run.info.steps - pushed > 0
    want = problems.play(trace, lambda: textbook.Adagrad(0.05))
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    problems.assert_replays(run)


def test_the_header_says_what_was_run(runtime, monkeypatch):
    problems.compile_once(monkeypatch)
    run = train(runtime, shards=3, n_push=2, n_fetch=4, warmstart_steps=3)
    header = run.trace.header
    want = {"replicas": 3, "shards": 3, "steps": 24, "n_push": 2, "n_fetch": 4}
    want |= {"warmstart_steps": 3, "overlap": False, "protocol": "asynchronous"}
    want |= {"batch_size": 8, "runtime": type(runtime).__name__}
    assert {name: header[name] for name in want} == want
    assert sum(header["shard_sizes"]) == 44
    assert header["jax"] == jax.__version__
    assert run.trace.samples_per_replica().sum() == 24 * 8


def test_what_does_not_fit_in_memory_is_refused_before_it_is_made():
    calls = []

    def make():
        calls.append(1)
        return {"w": jnp.zeros((2_000_000, 1_000_000)), "b": jnp.zeros(3)}

    with pytest.raises(ValueError, match=r"21.8 TiB.*parameters 7.3 TiB.*would fit"):
        problems.train(params=make)
    assert len(calls) == 1  # for its shapes


def test_parameters_may_come_from_a_function():
    made = jax.tree.map(jnp.array, PARAMS)
    for runtime in (dbjax.Emulated(), dbjax.Threads()):
        one = problems.train(runtime, params=lambda: made, replicas=1, steps=9)
        other = problems.train(runtime, params=PARAMS, replicas=1, steps=9)
        problems.assert_same_bits(one.params, other.params)
