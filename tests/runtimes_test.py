"""What every runtime does alike: one suite over all of them."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import downpour
from dbjax.downpour.protocol import Protocol
from dbjax.runtime.threads import Crew
from dbjax.trace import COMPUTE, FETCH, PUSH
from tests import problems, textbook
from tests.problems import DATA, PARAMS, Notes, train
from tests.runtime.pretend import Pretend

LATE = dbjax.Cluster(latency=0.7)
RUNTIMES = {
    "emulated": dbjax.Emulated(),
    "emulated, far away": dbjax.Emulated(LATE, seed=3),
    "threads": dbjax.Threads(digest_every=5),
    "threads, jitter": dbjax.Threads(digest_every=1, jitter=3e-4, seed=1),
    "processes, pretended": Pretend(digest_every=1, standby=1),
}
RAY = pytest.param("ray", marks=pytest.mark.ray)


@pytest.fixture(params=[*RUNTIMES, RAY])
def runtime(request):
    if request.param == "ray":
        return request.getfixturevalue("ray_cluster")
    return RUNTIMES[request.param]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    yield from problems.alarm()


# Takes a push that has missed at most one other.
PICKY = Protocol("picky", lambda clocks, r: True, lambda clocks, r, missed: missed < 2)

CASES = {
    "plain": {},
    "shards": {"shards": 3},
    "fetch seldom": {"shards": 3, "n_fetch": 3},
    "push seldom": {"n_push": 3, "steps": 23},
    "both seldom": {"shards": 2, "n_fetch": 2, "n_push": 4, "steps": 23},
    "overlap": {"shards": 2, "overlap": True},
    "overlap, push seldom": {"overlap": True, "n_push": 2, "n_fetch": 3},
    "barrier": {"shards": 2, "protocol": dbjax.synchronous(), "warmstart_steps": 5},
    "stale synchronous": {"shards": 2, "protocol": dbjax.ssp(1)},
    "backups": {"shards": 2, "protocol": dbjax.synchronous(backups=1)},
    "threshold": {"shards": 2, "protocol": dbjax.delay_threshold(2)},
    "picky": {"shards": 2, "n_push": 2, "protocol": PICKY},
    "one replica": {"shards": 3, "replicas": 1, "n_push": 2},
    "local steps": {"n_fetch": 3, "n_push": 2, "local_optimizer": problems.SGD},
    "more replicas than steps": {"replicas": 9, "steps": 4, "n_push": 2},
}


ALONE = {
    "averaging": downpour.parameter_averaging(problems.SGD, replicas=3, every=4),
    "diloco": downpour.diloco(problems.SGD, replicas=3, every=4),
    "async diloco": downpour.async_diloco(problems.SGD, replicas=3, every=(4, 2, 1)),
    "easgd": downpour.easgd(problems.SGD, replicas=3, every=2),
}


@pytest.mark.parametrize("method", ALONE)
def test_replicas_that_train_by_themselves_are_replayed(runtime, method):
    """Also where a fetch does not replace what they have."""
    settings = ALONE[method]
    run = train(runtime, shards=2, steps=36, **settings)
    problems.assert_replays(run, **settings)
    run.trace.validate()
    start, end = (problems.loss_fn(p, DATA.batch(0, 0)) for p in (PARAMS, run.params))
    assert end < 0.9 * start


PROTOCOLS = [dbjax.synchronous(), dbjax.synchronous(backups=1), dbjax.ssp(1)]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_run_that_is_held_still_for_its_checkpoints_goes_on(
    runtime, protocol, tmp_path
):
    """Nobody is kept waiting for those who wait until it is over."""
    run = train(
        runtime, steps=40, shards=2, protocol=protocol, checkpoint_dir=tmp_path,
        checkpoint_every=3,
    )  # fmt: skip
    assert run.info.steps == 40
    assert sorted(run.trace.step[run.trace.kind == COMPUTE]) == list(range(40))


@pytest.mark.parametrize("case", CASES)
def test_does_what_the_textbook_does(runtime, case):
    """From what its Trace says, by plain loops; and nothing is dropped."""
    keywords = CASES[case]
    run = train(runtime, **keywords)
    local_rule = textbook.sgd(0.05) if "local_optimizer" in keywords else None
    want = problems.play(run.trace, lambda: textbook.Adagrad(0.05), local_rule)
    np.testing.assert_allclose(problems.flat(run.params), want, rtol=3e-4, atol=3e-5)
    run.trace.validate()
    problems.assert_replays(run, **keywords)
    steps, shards = keywords.get("steps", 24), keywords.get("shards", 1)
    pushes = run.trace.kind == PUSH
    for s in range(shards):
        assert run.trace.count[pushes & (run.trace.shard == s)].sum() == steps
    computed = run.trace.step[run.trace.kind == COMPUTE]
    assert sorted(computed) == list(range(steps))
    assert run.info.steps == steps
    assert run.info.pushes == pushes.sum() // shards
    assert run.info.dropped == run.trace.lost()["dropped"]
    assert len(run.optimizer_state) == shards


def test_pushes_carry_the_sum_and_the_last_is_partial(runtime):
    """Learning rate once, on the shard; by hand, with no library in between."""
    run = train(
        runtime, replicas=1, n_fetch=4, n_push=4, steps=6, optimizer=problems.SGD
    )
    assert run.trace.count[run.trace.kind == PUSH].tolist() == [4, 2]
    w = problems.flat(PARAMS)
    for window in (range(4), range(4, 6)):
        w = w - 0.05 * sum(problems.gradient(w, 0, batch) for batch in window)
    np.testing.assert_allclose(problems.flat(run.params), w, rtol=1e-5, atol=1e-6)


def test_a_fetch_overwrites_the_local_steps(runtime, tmp_path):
    """A server that learns nothing: each fetch brings the start back."""
    notes = Notes(tmp_path)
    still = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda g, state, params=None: (jax.tree.map(jnp.zeros_like, g), state),
    )

    def watched(params, batch):
        jax.debug.callback(lambda w: notes.add(w.tolist()), params["w"])
        return problems.loss_fn(params, batch)

    run = train(
        *(runtime, DATA),
        loss_fn=watched,
        optimizer=still,
        replicas=1,
        n_fetch=2,
        n_push=4,
        steps=8,
        local_optimizer=problems.SGD,
    )
    jax.effects_barrier()
    problems.assert_same_bits(run.params, PARAMS)
    w = problems.flat(PARAMS)
    moved = w - 0.05 * problems.gradient(w, 0, 0)
    moved = moved[problems.OUTPUTS :].reshape(PARAMS["w"].shape)
    # The loss's check at the beginning looks once more.
    seen = [np.asarray(w, np.float32) for (w,) in notes.read()[-8:]]
    for each in seen[::2]:
        np.testing.assert_array_equal(each, PARAMS["w"])
    np.testing.assert_allclose(seen[1], moved, rtol=1e-5, atol=1e-6)
    assert all(np.any(each != PARAMS["w"]) for each in seen[1::2])


@pytest.mark.parametrize("warmstart_steps", [1, 7, 24])
def test_a_warmstart_is_alone(runtime, warmstart_steps):
    run = train(runtime, warmstart_steps=warmstart_steps, n_push=2, shards=2)
    trace = run.trace
    computed = trace.kind == COMPUTE
    early = computed & (trace.step < warmstart_steps)
    assert early.sum() == warmstart_steps
    assert set(trace.replica[early]) == {0}
    others = np.flatnonzero((trace.kind == FETCH) & (trace.replica != 0))
    assert np.flatnonzero(early)[-1] < min(others, default=len(trace))
    if warmstart_steps < 24 and isinstance(runtime, dbjax.Emulated):
        # On threads a replica that is slow to wake may find no ticket left.
        assert set(trace.replica[computed]) == {0, 1, 2}
    # The versions the others begin with hold the warm start's finished pushes.
    begins = trace.version[others[:2]]
    assert np.all(begins >= warmstart_steps // 2)


def test_subsets_are_disjoint(runtime, tmp_path):
    x = np.arange(30, dtype=np.float32)
    notes = Notes(tmp_path)
    subsets = dbjax.from_arrays({"x": x}, batch_size=5, seed=2, subsets=3)

    class Watched:
        def batch(self, replica, step):
            batch = subsets.batch(replica, step)
            notes.add(replica, batch["x"].tolist())
            return batch

    def loss(params, batch):
        return jnp.mean((params["w"] - batch["x"]) ** 2)

    train(
        *(runtime, Watched()),
        loss_fn=loss,
        params={"w": jnp.zeros(())},
        protocol=dbjax.synchronous(),  # so that everybody has a turn
        steps=12,
    )
    given = {0: set(), 1: set(), 2: set()}
    for replica, examples in notes.read():
        given[replica].update(examples)
    assert [len(each) for each in given.values()] == [10, 10, 10]
    assert len(set().union(*given.values())) == 30


@pytest.mark.parametrize("keywords", [{}, {"shards": 3, "n_fetch": 2, "n_push": 3}])
def test_with_overlap_the_trace_says_what_landed_when(runtime, keywords):
    """A push's base is the version of the fetch in force at its oldest gradient."""
    run = train(runtime, overlap=True, steps=40, **keywords)
    trace, shards = run.trace, keywords.get("shards", 1)
    for r, s in itertools.product(range(3), range(shards)):
        held, bases = None, []
        for row in np.flatnonzero(trace.replica == r):
            if trace.kind[row] == FETCH and trace.shard[row] == s:
                held = trace.version[row]
            elif trace.kind[row] == COMPUTE:
                bases.append(held)
            elif trace.kind[row] == PUSH and trace.shard[row] == s:
                count = trace.count[row]
                assert trace.base[row] == bases[0]
                bases = bases[count:]
        assert not bases


def landings(trace):
    """For each fetch but each replica's first: which ticket's COMPUTE row it follows."""
    later = []
    for r in range(trace.header["replicas"]):
        newest = None
        for row in np.flatnonzero(trace.replica == r):
            if trace.kind[row] == COMPUTE:
                newest = trace.step[row]
            elif trace.kind[row] == FETCH and newest is not None:
                later.append((int(trace.step[row]), int(newest)))
    return later


def test_with_overlap_a_fetch_lands_later_emulated():
    """It travels for longer than a minibatch takes."""
    run = train(dbjax.Emulated(dbjax.Cluster(1.0, latency=1.5)), overlap=True)
    later = landings(run.trace)
    assert len(later) > 10
    assert all(landed >= asked for asked, landed in later)


def test_with_overlap_a_fetch_lands_later_threads(monkeypatch):
    """A shard that handles a push only when its replica is at the next minibatch."""
    steps, begun, push = 8, threading.Semaphore(0), Crew.push

    def slow(crew, replica, step, messages, count):
        if step < steps - 1:
            assert begun.acquire(timeout=60)
        push(crew, replica, step, messages, count)

    def before(replica, step):
        if step:
            begun.release()

    monkeypatch.setattr(Crew, "push", slow)
    data = problems.Wrapped(before)
    run = train(dbjax.Threads(), data, overlap=True, replicas=1, steps=steps)
    # The check of the first batch asks for batch 0 and releases nothing.
    assert landings(run.trace) == [(step, step) for step in range(1, steps)]
    assert run.trace.staleness()[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    problems.assert_replays(run)


def remember(params):
    return {
        "count": jnp.zeros((), jnp.int32),
        "staleness": jnp.full(64, -1, jnp.int32),
        "new": jnp.zeros(64),
        "stale": jnp.zeros(64),
    }


def note(g, state, params=None, *, staleness, stale_params, **extra):
    """Plain SGD that writes down what it was provided with."""
    at = state["count"]
    state = {
        "count": at + 1,
        "staleness": state["staleness"].at[at].set(staleness),
        "new": state["new"].at[at].set(jax.tree.leaves(params)[-1].ravel()[0]),
        "stale": state["stale"]
        .at[at]
        .set(jax.tree.leaves(stale_params)[-1].ravel()[0]),
    }
    return jax.tree.map(lambda g: -0.02 * g, g), state


NOTES = optax.GradientTransformationExtraArgs(remember, note)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"shards": 3}, {"shards": 3, "n_fetch": 2, "n_push": 3}, {"overlap": True}],
)
def test_the_optimizer_is_provided_with_the_traces_staleness(runtime, keywords):
    keywords = {"optimizer": NOTES, "provide": ("staleness", "stale_params")} | keywords
    run = train(runtime, **keywords)
    trace, most = run.trace, 0
    for s, state in enumerate(run.optimizer_state):
        rows = np.flatnonzero((trace.kind == PUSH) & (trace.shard == s))
        count = int(state["count"])
        assert count == len(rows)
        staleness = np.asarray(state["staleness"])[:count]
        np.testing.assert_array_equal(
            staleness, trace.version[rows] - 1 - trace.base[rows]
        )
        # And the stale parameters are those of so many versions ago, in all bits.
        new, stale = np.asarray(state["new"]), np.asarray(state["stale"])
        np.testing.assert_array_equal(stale[:count], new[np.arange(count) - staleness])
        most = max(most, staleness.max())
    assert run.info.max_staleness == most
    problems.assert_replays(run, **keywords)


def test_evaluations(runtime):
    asked = []

    def eval_fn(params, step, time):
        asked.append((step, time))
        assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
        return {"loss": problems.loss_fn(params, {"x": problems.X, "y": problems.Y})}

    run = train(runtime, steps=18, shards=2, eval_fn=eval_fn, eval_every=5)
    evaluations = run.trace.evaluations
    assert [each["step"] for each in evaluations] == [5, 10, 15, 18]
    assert [(each["step"], each["time"]) for each in evaluations] == asked
    times = [each["time"] for each in evaluations]
    assert times == sorted(times)
    assert times[-1] <= run.trace.time.max() or not isinstance(runtime, dbjax.Emulated)
    assert all(type(each["loss"]) is float for each in evaluations)
    # The last is of the parameters that the run brings home.
    assert evaluations[-1]["loss"] == eval_fn(run.params, 18, 0)["loss"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_what_is_evaluated_stays_as_it_is(runtime):
    """Training goes on in recycled memory; a user who keeps parameters has them."""
    kept = []

    def eval_fn(params, step, time):
        kept.append((params, jax.tree.map(np.array, params)))
        return {}

    run = train(runtime, steps=40, eval_fn=eval_fn, eval_every=3)
    kept.append((run.params, jax.tree.map(np.array, run.params)))
    train(runtime, steps=10)
    assert len(kept) == 15
    for params, copied in kept:
        problems.assert_same_bits(params, copied)


class Broken(Exception):
    pass


@pytest.mark.parametrize("keywords", [{}, {"overlap": True, "n_push": 3, "shards": 2}])
@pytest.mark.parametrize("protocol", [dbjax.asynchronous(), dbjax.synchronous()])
def test_an_exception_reaches_the_caller(runtime, protocol, keywords):
    """With the replica and the step it had in hand, and nobody is left waiting."""

    def before(replica, step):
        if (replica, step) == (1, 4):
            raise Broken("the disk is gone")

    data = problems.Wrapped(before)
    with pytest.raises(Exception) as caught:
        train(runtime, data, protocol=protocol, steps=4_000, **keywords)
    error = caught.value
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert "the disk is gone" in text
    assert "replica 1" in text
    assert "step " in text
    assert isinstance(error, Broken) or isinstance(error.__cause__, Broken)


def test_the_step_named_is_the_ticket_in_hand(runtime):
    def before(replica, step):
        if step == 5:
            raise Broken

    with pytest.raises(Exception) as caught:
        train(runtime, problems.Wrapped(before), replicas=1, n_push=3)
    error = caught.value
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert "replica 0" in text
    assert "step 5" in text


@pytest.mark.parametrize("at", [5, 24])
def test_an_exception_in_an_evaluation_reaches_the_caller_as_it_is(runtime, at):
    def eval_fn(params, step, time):
        if step == at:
            raise Broken(step)
        return {}

    with pytest.raises(Broken, match=str(at)):
        train(runtime, eval_fn=eval_fn, eval_every=5)


def test_iterators(runtime, tmp_path):
    """Each replica reads its own iterator, in order and once."""
    notes = Notes(tmp_path)

    def make(replica, replicas):
        assert replicas == 3
        for step in itertools.count():
            notes.add(replica, step)
            yield DATA.batch(replica, step)

    data = dbjax.from_iterators(make)
    run = train(runtime, data, shards=2, n_push=2)
    computed, read = run.trace.minibatches_per_replica(), dict(notes.read())
    assert [read[r] + 1 for r in range(3) if computed[r]] == computed[
        computed > 0
    ].tolist()
    # The same iterators begun anew, and the same batches from arrays.
    problems.assert_replays(run, data)
    problems.assert_replays(run, DATA)


def test_an_iterator_that_ends_is_named(runtime):
    data = dbjax.from_iterators(
        lambda r, replicas: [DATA.batch(r, s) for s in range(3)]
    )
    with pytest.raises(Exception, match="ended after 3 batches"):
        train(runtime, data)


def noisy(params, batch, key):
    return jnp.sum(params["b"] * jax.random.normal(key, (problems.OUTPUTS,)))


@pytest.mark.parametrize("seed", [0, 7])
def test_a_loss_with_a_key(runtime, seed):
    """The key is a pure function of (seed, replica, minibatch): here all there is."""
    keywords = {"loss_fn": noisy, "rng": True, "seed": seed, "optimizer": problems.SGD}
    run = train(runtime, **keywords)
    trace = run.trace
    want = np.zeros(problems.OUTPUTS)
    for row in np.flatnonzero(trace.kind == COMPUTE):
        key = jax.random.fold_in(jax.random.key(seed), trace.replica[row])
        key = jax.random.fold_in(key, trace.batch[row])
        want -= 0.05 * np.asarray(jax.random.normal(key, (problems.OUTPUTS,)))
    np.testing.assert_allclose(run.params["b"], want, rtol=1e-4, atol=1e-5)
    problems.assert_replays(run, **keywords)


def with_aux(params, batch):
    loss = problems.loss_fn(params, batch)
    return loss, {"twice": 2 * loss, "name": jnp.zeros((3,), jnp.int32)}


def test_a_loss_with_aux(runtime):
    """It changes nothing."""
    run = train(runtime, loss_fn=with_aux, has_aux=True, shards=2)
    problems.assert_replays(run, loss_fn=with_aux, has_aux=True)
    problems.assert_replays(run)


def test_params_of_any_dtype_and_place_are_left_alone(runtime):
    """The caller's arrays are neither written to nor donated."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    before = jax.tree.map(np.array, params)
    run = train(runtime, params=params)
    problems.assert_same_bits(params, before)
    assert np.any(problems.flat(run.params) != problems.flat(params))
