"""Runs in processes of their own, without Ray: who dies, joins, leaves, is silent."""

import collections
import contextlib
import threading

import numpy as np
import optax
import pytest

import dbjax
from dbjax import checkpoint
from dbjax.runtime import remote
from dbjax.runtime.remote import RemoteCrew
from dbjax.runtime.threads import ReplicaError
from dbjax.trace import COMPUTE, DROPPED, FAIL, JOIN, LEAVE, NOT_FINITE, PUSH, RESTART
from tests import problems
from tests.problems import train
from tests.runtime.pretend import Pretend, killer


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    # Threads of those that were killed may be left: they play processes.
    yield from problems.alarm(left_behind=list)
    for thread in problems.replica_threads():
        thread.join(20)


KINDS = {
    "plain": {"shards": 2},
    "accrual": {"shards": 2, "n_push": 3, "n_fetch": 2},
    "overlap": {"shards": 3, "overlap": True},
    "barrier": {"shards": 2, "protocol": dbjax.synchronous()},
}


def assert_whole(run, steps, **keywords):
    """Every step is computed once; the Trace replays to the run's own bits."""
    run.trace.validate()
    assert sorted(run.trace.step[run.trace.kind == COMPUTE]) == list(range(steps))
    assert run.trace.header["gaps"] == 0
    problems.assert_replays(run, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("standby", "seed"), [(0, 0), (1, 0), (1, 1)])
def test_whoever_dies_the_run_ends_and_its_trace_replays(kind, standby, seed):
    """Replicas, shards and standbys are killed at any message."""
    before = killer(seed, chance=0.03)
    runtime = Pretend(before, digest_every=1, standby=standby, snapshot_every=10)
    run = train(runtime, steps=60, **KINDS[kind])
    assert_whole(run, 60, **KINDS[kind])
    deaths = run.trace.header["deaths"]
    assert sum(deaths.values()) >= min(1, len(before.killed))
    pushed = run.trace.take((run.trace.kind == PUSH) & (run.trace.shard == 0))
    if not np.any(run.trace.incarnation):
        assert pushed.count.sum() + run.info.lost_gradients == 60


@pytest.mark.parametrize("seed", range(6))
def test_one_death_after_the_other_costs_nothing_acknowledged(seed):
    """With a standby, as long as that is there before the next one dies."""
    lock, killed = threading.Lock(), []

    def before(session, address, method):
        with lock:
            handled = sum(method == "push" for method in methods[address.name])
            methods[address.name].append(method)
            ready = not any("standby" in name and not methods[name] for name in killed)
            if method == "push" and handled == 5 + seed and len(killed) < 1 and ready:
                killed.append(address.name)
                address.end()

    methods = collections.defaultdict(list)
    run = train(Pretend(before, digest_every=1, standby=1), shards=2, steps=60)
    assert len(killed) == 1
    assert run.trace.header["promotions"] == 1
    assert run.info.lost_updates == run.info.lost_gradients == 0
    assert not np.any(run.trace.incarnation)
    assert run.info.pushes == 60
    assert_whole(run, 60)


def test_a_shard_without_standby_says_what_it_lost():
    copies = []

    def before(session, address, method):
        if method == "held":
            copies.append(address.name)
        pushes[address.name] += method == "push"
        if address.name == "shard 1" and pushes["shard 1"] == 47 and copies:
            pushes["shard 1"] = 100
            address.end()

    pushes = collections.Counter()
    runtime = Pretend(before, digest_every=1, snapshot_every=20)
    run = train(runtime, shards=2, steps=80)
    trace = run.trace
    (fail,) = np.flatnonzero((trace.kind == FAIL) & (trace.shard >= 0))
    (restart,) = np.flatnonzero((trace.kind == RESTART) & (trace.shard >= 0))
    assert trace.shard[fail] == trace.shard[restart] == 1
    lost = trace.count[fail]
    assert 1 <= lost == run.info.lost_updates <= 46
    newest = trace.version[(trace.kind == PUSH) & (trace.incarnation == 0)].max()
    old = (trace.kind == PUSH) & (trace.shard == 1) & (trace.incarnation == 0)
    assert trace.version[old].max() == trace.version[restart] + lost <= newest
    assert_whole(run, 80)


def test_a_replica_loses_only_what_it_had_accrued():
    """And the others do not wait for it."""
    computed = collections.Counter()

    def before(session, address, method):
        if address.name == "replica 1" and method == "take":
            computed[address.name] += 1
            if computed[address.name] == 6:
                address.end()

    run = train(Pretend(before, digest_every=1), steps=60, n_push=4, shards=2)
    trace = run.trace
    (fail,) = np.flatnonzero((trace.kind == FAIL) & (trace.replica >= 0))
    (restart,) = np.flatnonzero(trace.kind == RESTART)
    assert trace.replica[fail] == trace.replica[restart] == 1
    assert trace.count[fail] == run.info.lost_gradients <= 3
    assert run.info.lost_updates == 0
    assert_whole(run, 60)


def test_a_replica_that_dies_again_and_again_ends_the_run():
    def before(session, address, method):
        if address.name == "replica 1" and method == "take":
            address.end()

    with pytest.raises(ReplicaError, match="replica 1 .*died 5 times in a row"):
        train(Pretend(before), steps=4_000)


def test_a_replica_that_is_silent_is_replaced(monkeypatch):
    """It is killed when it has not answered for `timeout` seconds."""
    monkeypatch.setattr(remote, "LOOK_UP", 0.05)
    asleep, seen = threading.Event(), []

    def before(session, address, method):
        if address.name == "replica 2" and method == "take" and not seen:
            seen.append(method)
            asleep.wait(30)

    run = train(Pretend(before, timeout=3), steps=100)
    asleep.set()
    assert run.trace.header["deaths"]["replicas"] == 1
    assert_whole(run, 100)


def test_replicas_join_and_leave():
    wanted = {0: 1, 20: 3, 60: 2}

    def replicas_at(step):
        return wanted[max(begin for begin in wanted if begin <= step)]

    run = train(Pretend(replicas_at=replicas_at), steps=300, shards=2, n_push=2)
    trace = run.trace
    alone = trace.step[(trace.kind == COMPUTE) & (trace.replica > 0)]
    assert alone.min() >= 15
    assert set(trace.replica[trace.kind == JOIN]) == {0, 1, 2}
    gone = np.flatnonzero((trace.kind == LEAVE) & (trace.replica == 2))
    assert len(gone) == 1
    assert trace.step[: gone[0]].max() < 200
    assert run.info.lost_gradients == 0
    assert_whole(run, 300)


def test_the_watch_is_told(monkeypatch):
    monkeypatch.setattr(remote, "LOOK_UP", 0.01)
    told = []
    train(Pretend(watch=told.append, watch_every=1e-3), steps=200, shards=2)
    assert len(told) > 3
    steps = [progress.step for progress in told]
    assert steps == sorted(steps)
    busy = [progress for progress in told if progress.updates_per_second > 0]
    assert busy
    assert max(progress.replicas for progress in told) == 3
    assert all(progress.deaths == 0 for progress in told)
    assert max(progress.staleness for progress in busy) > 0


def test_an_error_in_the_watch_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(remote, "LOOK_UP", 0.01)

    def watch(progress):
        raise OSError("the disk is full")

    with pytest.raises(Exception, match="the disk is full"):
        train(Pretend(watch=watch, watch_every=1e-3), steps=4_000)


@pytest.mark.parametrize("kind", [*KINDS])
def test_checkpoints_resume(tmp_path, kind):
    """The second half joins the first, and both replay as one."""
    keywords = {"checkpoint_dir": tmp_path, "checkpoint_every": 10} | KINDS[kind]
    stop = []

    def eval_fn(params, step, time):
        if step >= 30 and not stop:
            stop.append(step)
            raise KeyboardInterrupt
        return {"loss": 0.0}

    keywords |= {"eval_fn": eval_fn, "eval_every": 10}
    with pytest.raises(KeyboardInterrupt):
        train(Pretend(digest_every=1), steps=60, **keywords)
    assert checkpoint.steps(tmp_path)
    run = train(Pretend(digest_every=1), steps=60, **keywords)
    assert run.info.resumed_at >= 30
    assert_whole(run, 60, **KINDS[kind])


@pytest.mark.parametrize("seed", range(4))
def test_deaths_between_checkpoints(tmp_path, seed):
    """What was recorded before a checkpoint is not recorded again after it."""
    before = killer(seed, 0.02, names=("replica",), most=8)
    run = train(
        Pretend(before, digest_every=1, standby=1), steps=120, shards=2,
        checkpoint_dir=tmp_path, checkpoint_every=8,
    )  # fmt: skip
    assert_whole(run, 120)


def test_a_pause_does_not_take_the_last_ones_stillness_for_its_own(
    monkeypatch, tmp_path
):
    """The driver hears of the end of a pause only when the next one is wanted."""
    quiet, go_on = RemoteCrew.quiet, RemoteCrew._go_on
    again, seen = threading.Event(), []

    @contextlib.contextmanager
    def twice(crew):
        with quiet(crew):
            pass
        again.set()
        with quiet(crew):
            heard = threading.Event()
            crew._inbox.put(heard.set)  # all that was said before has been heard, too
            assert heard.wait(20)
            seen.append([list(member.orders) for member in crew._members])
            yield

    def go_on_late(crew):
        if again.wait(20) and not seen:
            while crew._inbox.empty():
                pass
            crew._look_around()
        go_on(crew)

    monkeypatch.setattr(RemoteCrew, "quiet", twice)
    monkeypatch.setattr(RemoteCrew, "_go_on", go_on_late)
    run = train(
        Pretend(digest_every=1), steps=40, checkpoint_dir=tmp_path, checkpoint_every=10
    )
    assert seen and not any(map(any, seen))
    assert_whole(run, 40)


def test_a_shard_that_is_silent_is_replaced(monkeypatch):
    """Its standby takes its place, though it may only have been asleep."""
    monkeypatch.setattr(remote, "LOOK_UP", 0.05)
    asleep, pushes = threading.Event(), []

    def before(session, address, method):
        if address.name == "shard 0" and method != "alive":
            pushes.append(method)
            if len(pushes) > 30:
                asleep.wait(30)

    runtime = Pretend(before, digest_every=1, standby=1, timeout=6)
    run = train(runtime, steps=100, shards=2)
    asleep.set()
    assert run.trace.header["promotions"] == 1
    assert run.info.lost_updates == 0
    assert_whole(run, 100)


@pytest.mark.parametrize("keywords", [{}, {"n_push": 2, "shards": 2}])
def test_local_optimizers_and_streams_resume(tmp_path, keywords):
    """Iterators with a state of their own, local momentum."""

    class Stream:
        def __init__(self, replica):
            self.replica, self.at = replica, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return problems.DATA.batch(self.replica, self.at - 1)

        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    data = dbjax.from_iterators(lambda replica, replicas: Stream(replica))
    stop = []

    def eval_fn(params, step, time):
        if step >= 20 and not stop:
            stop.append(step)
            raise KeyboardInterrupt
        return {}

    keywords = {
        "checkpoint_dir": tmp_path, "eval_fn": eval_fn, "eval_every": 10, "n_fetch": 2,
        "local_optimizer": problems.MOMENTUM,
    } | keywords  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(Pretend(digest_every=1), data, steps=40, **keywords)
    run = train(Pretend(digest_every=1), data, steps=40, **keywords)
    assert run.info.resumed_at >= 20
    assert_whole(run, 40, local_optimizer=problems.MOMENTUM)


def test_a_push_that_is_not_finite_goes_out_as_rejected():
    def before(replica, step):
        if (replica, step) == (1, 3):
            batch = problems.DATA.batch(replica, step)
            return {**batch, "x": np.full_like(batch["x"], np.nan)}

    data = problems.Wrapped(before)
    run = train(Pretend(digest_every=1), data, steps=40, shards=2)
    assert run.info.not_finite == 1
    status = run.trace.status[run.trace.kind == PUSH]
    assert (status == NOT_FINITE).sum() == 2
    problems.assert_replays(run, data)


def test_too_many_of_them_end_the_run():
    with pytest.raises(dbjax.runtime.base.RejectedTooOften, match="100 pushes"):
        train(
            Pretend(), steps=4_000, params={"w": problems.W, "b": problems.Y[0]},
            optimizer=optax.sgd(1e30),
        )  # fmt: skip


def test_a_push_that_only_some_shards_have_counts_on_all_as_dropped():
    """A replica dies between two sends: what the others were to get is lost."""
    sent = collections.Counter()

    def before(session, address, method):
        if method == "push" and address.name == "shard 1":
            sent["push"] += 1
            if sent["push"] == 20:
                raise OSError("lost on its way")

    # What a shard raises is an error of the run; here the replica dies of it instead.
    run = None
    with pytest.raises(ReplicaError, match="lost on its way"):
        run = train(Pretend(before, digest_every=1), shards=2, steps=60)
    assert run is None
    dropped = killer(3, 0.05, names=("replica",))
    run = train(Pretend(dropped, digest_every=1), shards=3, steps=150)
    torn = (run.trace.kind == PUSH) & (run.trace.status == DROPPED)
    assert run.info.dropped == len(set(run.trace.id[torn]))
    assert_whole(run, 150)
