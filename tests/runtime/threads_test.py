"""Real asynchrony: every run is the exact replay of its Trace, and ends in order."""

import random
import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import checkpoint
from dbjax.downpour.protocol import Protocol
from dbjax.runtime.live_shard import LiveShard
from dbjax.runtime.threads import Crew, ReplicaError
from dbjax.server.messages import Push
from dbjax.server.shard import make_shard
from dbjax.trace import COMPUTE, FAIL, FETCH, PUSH
from tests import problems
from tests.problems import DATA, PARAMS, train

BOUNDED = Protocol(
    "two ahead",
    may_begin=lambda clocks, r: clocks.rounds[r] <= clocks.slowest + 2,
    takes=lambda clocks, r, staleness: staleness < 4,
)
COMPENSATED = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda g, state, params=None, *, stale_params, staleness, **extra: (
        jax.tree.map(
            lambda g, w, old: -0.05 * (g + 0.1 * g * g * (w - old)) / (1 + staleness),
            *(g, params, stale_params),
        ),
        state,
    ),
)
KINDS = {
    "plain": {},
    "accrual": {"n_push": 3, "n_fetch": 2},
    "overlap": {"overlap": True},
    "overlap, accrual": {"overlap": True, "n_push": 3, "n_fetch": 2},
    "barrier": {"protocol": dbjax.synchronous(), "warmstart_steps": 7},
    "bounded": {"protocol": BOUNDED, "n_push": 2},
    "local steps": {"n_fetch": 3, "n_push": 2, "local_optimizer": problems.MOMENTUM},
    "compensated": {
        "optimizer": COMPENSATED,
        "provide": ("stale_params", "staleness"),
        "n_push": 2,
    },
    "compensated, overlap": {
        "optimizer": COMPENSATED,
        "provide": ("stale_params", "staleness"),
        "overlap": True,
    },
    "momentum, many": {"optimizer": problems.MOMENTUM, "replicas": 8},
}
# Fifty runs; every kind with every number of shards, and with another jitter.
RUNS = [(kind, 1 + (i + j) % 3, i) for i in range(5) for j, kind in enumerate(KINDS)]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    yield from problems.alarm()


@pytest.mark.parametrize(("kind", "shards", "seed"), RUNS)
def test_a_run_is_the_exact_replay_of_its_trace(kind, shards, seed):
    """Bit for bit, and in every digest on the way."""
    jitter = (0, 1e-4, 3e-4, 1e-3, 3e-3)[seed]
    runtime = dbjax.Threads(digest_every=1, jitter=jitter, seed=seed)
    keywords = {"shards": shards, "steps": 40, "replicas": 4} | KINDS[kind]
    run = train(runtime, **keywords)
    run.trace.validate()
    # A version that was gone at once has none.
    assert np.mean(run.trace.digest[run.trace.kind == PUSH] > 0) > 0.1
    problems.assert_replays(run, **keywords)


BARRIERS = {
    "plain": {},
    "warm start": {"warmstart_steps": 5},
    "accrual": {"n_push": 3, "n_fetch": 2},
    "overlap": {"overlap": True},
    "overlap, accrual": {"overlap": True, "n_push": 2},
}


@pytest.mark.parametrize("kind", BARRIERS)
@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_barrier_is_finished_before_all_fall_quiet(tmp_path, kind, every):
    """A replica that holds back its push waits for others to begin their round."""
    keywords = {"replicas": 4, "shards": 3, "steps": 42} | BARRIERS[kind]
    run = train(
        dbjax.Threads(digest_every=1, jitter=1e-3, seed=every),
        protocol=dbjax.synchronous(),
        checkpoint_dir=tmp_path,
        checkpoint_every=every,
        **keywords,
    )
    pushes = run.trace.take(run.trace.kind == PUSH)
    assert pushes.count.sum() == 3 * 42
    problems.assert_replays(run)
    if "n_push" not in keywords:
        alone, steps = keywords.get("warmstart_steps", 0), pushes.version - 1
        want = np.where(steps < alone, steps, (steps - alone) // 4 * 4 + alone)
        late = want - pushes.base
        # With overlap what was fetched may come too late for its own round.
        assert set(late) <= ({0, 4} if "overlap" in keywords else {0})


def test_nobody_waits_to_push_for_a_replica_that_failed():
    def before(replica, step):
        if (replica, step) == (1, 4):
            raise OSError("the disk is gone")

    with pytest.raises(ReplicaError, match="replica 1 failed at .* disk is gone"):
        train(
            dbjax.Threads(jitter=3e-3),
            problems.Wrapped(before),
            steps=60,
            protocol=dbjax.synchronous(),
        )


def test_every_version_that_was_asked_for_has_its_own_digest():
    """However soon another replica's push follows."""
    for _ in range(4):
        trace = train(dbjax.Threads(digest_every=1), replicas=4, steps=40).trace
        assert trace.digest[trace.kind == PUSH].all()


def test_the_replay_of_another_order_is_not_the_same():
    """So the test above can fail; and the first push that differs is named."""
    keywords = {"protocol": dbjax.synchronous()}
    run = train(dbjax.Threads(digest_every=1), **keywords)
    columns = run.trace.columns()
    pushes = np.flatnonzero(run.trace.kind == PUSH)
    digest = columns["digest"].copy()
    digest[pushes[7]] ^= np.uint64(1)
    trace = dbjax.Trace.from_columns(
        run.trace.header, run.trace.evaluations, **columns | {"digest": digest}
    )
    with pytest.raises(
        ValueError, match="at version 8 of shard 0 .* agreed at version 7"
    ):
        problems.replay(trace)
    other = dbjax.from_arrays({"x": problems.X, "y": problems.Y}, 8, seed=1)
    with pytest.raises(ValueError, match="at version 1 of shard 0 .* at the start"):
        problems.replay(run.trace, other)


def test_jitter_makes_other_orders():
    """Replicas do run at the same time: some pushes are stale, on some shards more."""
    run = train(dbjax.Threads(jitter=1e-3), shards=3, steps=60)
    assert run.info.max_staleness > 0
    assert np.all(run.trace.minibatches_per_replica() > 0)


def interrupt():
    """Ctrl-C."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("keywords", [{}, {"shards": 3, "n_push": 4, "overlap": True}])
@pytest.mark.parametrize("where", ["a minibatch", "an evaluation", "a checkpoint"])
def test_ctrl_c_saves_a_checkpoint_and_leaves(tmp_path, monkeypatch, where, keywords):
    """And the run can be resumed, to the end and to a Trace that replays."""
    keywords = keywords | {"checkpoint_dir": tmp_path, "steps": 20_000}
    keywords |= {"checkpoint_every": 10_000}
    runtime = dbjax.Threads(digest_every=3, jitter=1e-4)
    data, eval_fn, save = DATA, None, checkpoint.save
    if where == "a minibatch":
        where = {(0, 9): interrupt}
        data = problems.Wrapped(lambda *at: where.pop(at, lambda: None)())
    elif where == "an evaluation":

        def eval_fn(params, step, time):
            if step == 20:
                interrupt()
            return {}

        keywords["eval_every"] = 20
    else:
        keywords["checkpoint_every"] = 20
        times = iter([interrupt])

        def interrupted(*args, **kw):
            next(times, int)()
            save(*args, **kw)

        monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(runtime, data, eval_fn=eval_fn, **keywords)
    assert not problems.replica_threads()
    saved = checkpoint.latest(tmp_path)
    assert 9 < saved.step < 20_000
    # Nothing was in flight: all that was computed is pushed, on all shards.
    kind, count = saved.leaves["trace/kind"], saved.leaves["trace/count"]
    shards = keywords.get("shards", 1)
    assert (kind == COMPUTE).sum() == saved.step
    assert count[kind == PUSH].sum() == saved.step * shards
    assert len(set(saved.note["versions"])) == 1
    # Resumed by a run that takes as many steps as there are in the checkpoint, and more.
    keywords |= {"eval_every": None, "checkpoint_every": 10_000}
    with pytest.raises(ValueError, match="steps=20000, not 60"):
        train(runtime, **keywords | {"steps": 60})
    again = []

    def stop(replica, step):
        again.append(step)
        if len(again) == 30:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        train(runtime, problems.Wrapped(stop), **keywords)
    later = checkpoint.latest(tmp_path)
    assert later.step > saved.step
    assert later.leaves["trace/kind"][: len(kind)].tolist() == kind.tolist()


def test_an_impatient_second_ctrl_c_saves_nothing_half_done(tmp_path, monkeypatch):
    """It does not wait for the replicas, so there is no telling what is in flight."""
    pressed, left = iter([interrupt]), threading.Event()

    def before(replica, step):
        if (replica, step) == (0, 9):
            interrupt()
            assert left.wait(60)

    def stop(crew):
        Crew_stop(crew)
        next(pressed, int)()  # while the driver waits for replica 0

    Crew_stop = Crew.stop
    monkeypatch.setattr(Crew, "stop", stop)
    keywords = {"steps": 20_000, "checkpoint_every": 10_000, "shards": 2, "n_push": 3}
    with pytest.raises(KeyboardInterrupt):
        train(
            *(dbjax.Threads(), problems.Wrapped(before)),
            checkpoint_dir=tmp_path,
            **keywords,
        )
    assert checkpoint.latest(tmp_path) is None
    left.set()
    for thread in problems.replica_threads():
        thread.join()


def test_a_second_run_finishes_what_the_first_began(tmp_path):
    """After Ctrl-C, in a run short enough to be finished and replayed."""
    pressed = iter([interrupt])

    def before(replica, step):
        if step == 5:
            next(pressed, int)()
            # The others go on until the driver has heard of it.
            if threading.current_thread().name == "replica-0":
                stopped.wait(60)

    stopped, stop = threading.Event(), Crew.stop

    def stopping(crew):
        stop(crew)
        stopped.set()

    keywords = {"shards": 2, "steps": 60, "n_push": 2, "checkpoint_dir": tmp_path}
    keywords |= {"protocol": dbjax.synchronous()}  # so that all wait for replica 0
    runtime = dbjax.Threads(digest_every=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Crew, "stop", stopping)
        train(runtime, problems.Wrapped(before), **keywords)
    run = train(runtime, **keywords)
    assert 15 <= run.info.resumed_at <= 18
    assert run.info.steps == 60
    problems.assert_replays(run)


def test_a_replicas_failure_costs_its_accrued_gradients_only(tmp_path):
    """They are counted; its ticket is given out again, and the joined Trace replays."""

    def before(replica, step):
        if (replica, step) == (1, 4):
            raise OSError("the disk is gone")

    keywords = {"shards": 2, "steps": 60, "n_push": 3, "checkpoint_dir": tmp_path}
    # No checkpoint on the way, for which replicas would push what they have accrued.
    keywords |= {"protocol": BOUNDED, "checkpoint_every": 60}
    runtime = dbjax.Threads(digest_every=1, jitter=1e-4)
    with pytest.raises(ReplicaError, match="replica 1 failed at step .* disk is gone"):
        train(runtime, problems.Wrapped(before), **keywords)
    run = train(runtime, **keywords)
    trace, info = run.trace, run.info
    assert info.lost_gradients == 1  # the fourth minibatch: three were pushed
    failed = trace.kind == FAIL
    assert (trace.replica[failed].tolist(), trace.count[failed].tolist()) == ([1], [1])
    assert sorted(trace.step[trace.kind == COMPUTE]) == list(range(60))
    pushed = trace.count[(trace.kind == PUSH) & (trace.shard == 1)].sum()
    assert pushed == 59
    trace.validate()
    problems.assert_replays(run)


@pytest.mark.parametrize("n_push", [1, 2])
def test_the_ticket_of_a_failed_replica_in_its_last_minibatch(tmp_path, n_push):
    """Failing when all tickets are out: the run resumes for that one alone."""
    run = train(runtime := dbjax.Threads(digest_every=1), steps=12, n_push=n_push)

    def before(replica, step):
        if (replica, step) == (2, 3):
            raise OSError

    keywords = {"steps": 12, "n_push": n_push, "checkpoint_dir": tmp_path}
    keywords |= {"protocol": dbjax.synchronous()}
    with pytest.raises(ReplicaError):
        train(runtime, problems.Wrapped(before), **keywords)
    run = train(runtime, **keywords)
    steps = run.trace.step[run.trace.kind == COMPUTE]
    assert sorted(steps) == list(range(12))
    problems.assert_replays(run)


# A shard by itself: versions are recycled, held ones never.


def make_live(params):
    shard = make_shard(problems.MOMENTUM)
    return LiveShard(0, shard, shard.init(jax.tree.map(jnp.array, params)), 0)


def push(live, gradients, base=None, taken=True):
    base = live.state.version if base is None else base
    rows = []
    live.push(
        Push(0, len(rows), 0, gradients, base, taken),
        lambda staleness: True,
        lambda version, status: rows.append((version, status)),
    )
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_recycling_never_changes_a_held_version(seed):
    """Who holds what, and for how long, is drawn; all bits are looked at again."""
    rng, live = random.Random(seed), make_live(PARAMS)
    held, most = {}, 0
    for step in range(120):
        who = rng.randrange(6)
        match rng.randrange(4):
            case 0:
                state = live.hold(who)
                copied = jax.tree.map(lambda x: np.array(x, copy=True), state.params)
                held[who] = state.params, copied
            case 1:
                live.release(who)
                held.pop(who, None)
            case _:
                gradients = jax.tree.map(lambda x: jnp.full_like(x, step), PARAMS)  # noqa: B023
                push(live, gradients, taken=rng.random() < 0.9)
        for params, copied in held.values():
            problems.assert_same_bits(params, copied)
        alive = len({id(params) for params, _ in held.values()})
        most = max(most, alive)
        assert len(live.dead) + len(live.holders) <= 8
    # As many buffers as were ever held at once, the newest, and one to write to.
    assert live.most_versions <= most + 3


def test_a_version_that_nobody_holds_becomes_the_next():
    """Its memory is given away: it is gone for whoever looks at it without holding."""
    live = make_live(PARAMS)
    first = live.hold("me").params
    push(live, PARAMS)
    push(live, PARAMS)
    assert not jax.tree.leaves(first)[0].is_deleted()
    live.hold("me")
    push(live, PARAMS)
    assert jax.tree.leaves(first)[0].is_deleted()


def test_several_who_hold_one_version_all_have_to_let_go():
    live = make_live(PARAMS)
    first = live.hold("a").params
    assert live.hold("b").params is first
    push(live, PARAMS)
    live.hold("a")
    for _ in range(3):
        push(live, PARAMS)
        live.hold("a")
    assert not jax.tree.leaves(first)[0].is_deleted()
    live.hold("b")
    push(live, PARAMS)
    assert jax.tree.leaves(first)[0].is_deleted()


def test_the_newest_is_updated_in_place_where_nobody_holds_it():
    live = make_live(PARAMS)

    def memory():
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(live.state.params)]

    first, seen = memory(), live.hold("me").params
    push(live, PARAMS)
    assert memory() != first
    assert not jax.tree.leaves(seen)[0].is_deleted()
    second = memory()
    for _ in range(3):
        push(live, PARAMS)
        assert memory() == second


def test_alone_a_replica_needs_one_copy_of_the_parameters():
    """It lets go of the version that its gradient was computed on before it pushes."""
    run = train(dbjax.Threads(), replicas=1, shards=2)
    assert run.info.peak_copies == 1 + 2 * 2


def test_a_rejected_push_counts_a_version_and_keeps_the_parameters():
    live = make_live(PARAMS)
    before = jax.tree.map(np.array, live.state)
    push(live, PARAMS, taken=False)
    assert live.state.version == 1
    problems.assert_same_bits(live.state.params, before.params)
    problems.assert_same_bits(live.state.optimizer_state, before.optimizer_state)


def test_versions_stay_few_in_a_long_run():
    """Memory does not grow with the steps: replicas, the newest, and a few to write to."""
    run = train(dbjax.Threads(), steps=600, replicas=3)
    assert run.info.peak_copies < 6 * 3


def test_what_a_run_held_is_let_go():
    """A finished run keeps no version alive but the last."""
    seen = []

    def eval_fn(params, step, time):
        seen.append(weakref.ref(jax.tree.leaves(params)[0]))
        return {}

    train(dbjax.Threads(), steps=60, eval_fn=eval_fn, eval_every=5)
    assert len(seen) == 12
    assert sum(ref() is not None for ref in seen) <= 1


@pytest.mark.parametrize(
    ("name", "value"), [("digest_every", -1), ("jitter", -0.5), ("jitter", np.nan)]
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        dbjax.Threads(**{name: value})


def test_threads_have_names_and_the_main_thread_evaluates():
    names = set()

    def before(replica, step):
        names.add(threading.current_thread().name)

    def eval_fn(params, step, time):
        assert threading.current_thread() is threading.main_thread()
        return {}

    train(dbjax.Threads(), problems.Wrapped(before), eval_fn=eval_fn, eval_every=3)
    assert names - {"MainThread"} <= {"replica-0", "replica-1", "replica-2"}


def test_bytes_and_times_are_recorded():
    trace = train(dbjax.Threads(), shards=2).trace
    exchanged = np.isin(trace.kind, (FETCH, PUSH))
    sizes = np.array(trace.header["shard_sizes"])
    np.testing.assert_array_equal(
        trace.bytes[exchanged], 4 * sizes[trace.shard[exchanged]]
    )
    assert np.all(trace.time >= trace.start)
    for r in range(3):
        assert np.all(np.diff(trace.time[trace.replica == r]) >= 0)
