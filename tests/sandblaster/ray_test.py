"""On Ray: the laws that hold on threads, and processes that are killed."""

import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import dbjax
from dbjax.runtime.ray import Ray, Session
from dbjax.runtime.recorder import Recorder
from dbjax.runtime.threads import ReplicaError
from dbjax.sandblaster import live, remote
from dbjax.sandblaster.messages import Add
from dbjax.sandblaster.remote_vectors import ShardError, Shards
from dbjax.trace import COMPUTE, FAIL, FETCH, JOIN, PUSH, RESTART, TAKEN
from tests.problems import alarm
from tests.sandblaster import problems
from tests.sandblaster.problems import CONSTRAINED, SQUARES, Wrapped, assert_close

pytestmark = pytest.mark.ray

within_time = pytest.fixture(autouse=True)(alarm)


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture
def ray(ray_cluster):
    return ray_cluster


@pytest.fixture
def addresses(monkeypatch):
    """Where every process that is started lives, by name; the newest."""
    known, host = {}, Session.host

    def noting(self, name, *args, **keywords):
        known[name], reply = host(self, name, *args, **keywords)
        return known[name], reply

    monkeypatch.setattr(Session, "host", noting)
    return known


def settings(**more):
    return {
        "portion_size": 2, "iterations": 4, "tolerance": 0, "shards": 2, "replicas": 2,
        "push_every": 2,
    } | more  # fmt: skip


def assert_agrees(run, want):
    """The same path to rounding, and an account of it in which nothing is twice."""
    assert (run.iterations, run.evaluations) == (want.iterations, want.evaluations)
    np.testing.assert_allclose(run.value, want.value, 1e-5)
    assert_close(run.params, want.params, 1e-3)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run.params))
    rows, theirs = run.trace.evaluations, want.trace.evaluations
    assert [row["step"] for row in rows] == [row["step"] for row in theirs]
    trace = run.trace
    trace.validate()
    for shard in range(trace.header["shards"]):
        pushed = (trace.kind == PUSH) & (trace.shard == shard)
        assert trace.count[pushed].sum() == want.info.portions_evaluated
    assert run.info.portions_evaluated == want.info.portions_evaluated


CASES = {
    "one of each": {"portion_size": 7, "shards": 1, "replicas": 1},
    "no backups": {"push_every": 5, "strategy": "portions"},
    "static": {"replicas": 3, "strategy": "static"},
    "few portions": {"portion_size": 24, "replicas": 3, "copies": 2},
    "samples": {"batches": dbjax.MultiBatch(4, seed=1), "method": CONSTRAINED["l1"]},
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_one_process(case, ray):
    keywords = settings(**CASES[case])
    run = problems.minimize(runtime=ray, **keywords)
    assert_agrees(run, problems.minimize(**keywords))
    trace, portions = run.trace, run.info.portions
    assert trace.header["runtime"] == "Ray"
    assert (trace.kind == JOIN).sum() == keywords["replicas"]
    kept = (trace.kind == COMPUTE) & (trace.status == TAKEN)
    assert kept.sum() == run.info.portions_evaluated
    pushes = (trace.kind == PUSH) & (trace.shard == 0)
    assert pushes.sum() == portions.pushes
    fetched = (trace.kind == FETCH) & (trace.shard == 0)
    assert fetched.sum() <= keywords["replicas"] * run.evaluations
    assert (trace.time >= trace.start).all()
    if case == "few portions":
        assert portions.backups > 0
    else:
        assert keywords.get("strategy", "") != "static" or not portions.steals


def test_vectors_that_are_not_small_come_by_reference(ray):
    """The same path, for parameters of more bytes than an answer holds."""
    wide = np.random.default_rng(3).standard_normal((24, 30_000)).astype(np.float32)
    arrays = {"x": wide, "y": problems.Y}

    def loss(params, batch):
        residual = batch["x"] @ params["w"] / 100 - batch["y"]
        return (residual**2).mean() + 0.01 * (params["w"] ** 2).sum()

    keywords = settings(
        loss_fn=loss, params={"w": np.zeros((30_000, 2), np.float32)},
        data=dbjax.from_arrays(arrays, batch_size=1, portion_size=6), iterations=3,
    )  # fmt: skip
    assert_agrees(
        problems.minimize(runtime=ray, **keywords), problems.minimize(**keywords)
    )


class Once:
    """Data whose `before(i)` is called in one replica, when a portion is due there."""

    def __init__(self, directory, portions, before):
        self.directory, self.portions = pathlib.Path(directory), portions
        self.before, self.data, self.driver = before, SQUARES.data(2), os.getpid()
        self.num_portions = self.data.num_portions

    def portion(self, i):
        if i in self.portions and os.getpid() != self.driver:
            try:
                (self.directory / str(i)).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                self.before(i)
        return self.data.portion(i)


def die(i):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(i):
    raise OSError(f"portion {i} cannot be read")


def cut_the_cable(i):
    """This process dies in its next push, when one shard has added it."""
    ask = Shards._ask

    def dies(self, calls):
        shard = min(calls)
        if not isinstance(calls[shard][1], Add):
            return ask(self, calls)
        ask(self, {shard: calls[shard]})
        die(i)

    Shards._ask = dies


@pytest.mark.parametrize(
    ("before", "portion", "replicas"),
    [(die, 8, 1), (fail, 0, 1), (cut_the_cable, 8, 2)],
)
def test_a_replica_that_dies_or_fails_loses_nothing(
    before, portion, replicas, ray, tmp_path
):
    """If it was alone, all wait for the one that comes in its place."""
    keywords = settings(replicas=replicas, push_every=5)
    data = Once(tmp_path, {portion}, before)
    run = problems.minimize(data=data, runtime=ray, **keywords)
    assert_agrees(run, problems.minimize(**keywords))
    assert (run.trace.kind == FAIL).sum() == 1
    if replicas == 1:  # else it may come when the run has ended
        assert (run.trace.kind == RESTART).sum() == 1
    assert run.info.portions.returned > (before is die)
    assert (run.info.portions.repaired > 0) == (before is cut_the_cable)


def test_replicas_killed_at_any_time_lose_nothing(ray, addresses, monkeypatch):
    """A portion counts once, wherever its sum was when the process ended."""
    slow = CONSTRAINED["gradient descent"]  # as it is not at its end by then
    keywords = settings(replicas=3, iterations=15, push_every=3, method=slow)
    moments, messages = {15: 0, 45: 1, 90: 2}, []
    take = live.LiveReplicas._take

    def taking(self, message):
        messages.append(message)
        if (replica := moments.get(len(messages))) is not None:
            ray._kept[-1].kill(addresses[f"replica {replica}"])
        return take(self, message)

    monkeypatch.setattr(live.LiveReplicas, "_take", taking)
    run = problems.minimize(runtime=ray, **keywords)
    assert_agrees(run, problems.minimize(**keywords))
    assert 0 < (run.trace.kind == FAIL).sum() <= len(moments)


def refuse(driver, i):
    if i == 3 and os.getpid() != driver:
        raise OSError("no such file")


def test_a_portion_that_always_fails_ends_the_run_and_is_named(ray):
    data = Wrapped(functools.partial(refuse, os.getpid()), SQUARES.data(2))
    with pytest.raises(ReplicaError, match=r"replica \d.*portion 3.*no such file") as e:
        problems.minimize(data=data, runtime=ray, **settings())
    assert isinstance(e.value.__cause__, OSError)


def test_an_error_of_the_users_evaluation_ends_the_run(ray):
    def look(params, iteration, time):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        problems.minimize(eval_fn=look, runtime=ray, **settings())


@pytest.mark.parametrize("what", ["loss_fn", "data"])
def test_what_cannot_be_sent_is_named(what, ray):
    lock = threading.Lock()

    def locked(*args):
        with lock:
            return problems.squares_loss(*args) if what == "loss_fn" else None

    value = locked if what == "loss_fn" else Wrapped(locked)
    with pytest.raises(TypeError, match=f"^{what} cannot be sent to another process"):
        problems.minimize(runtime=ray, **settings(), **{what: value})


def test_a_cluster_that_is_too_small_is_an_error_before_anything_starts(ray, addresses):
    small = dataclasses.replace(ray, replica_cpus=1000.0)
    with pytest.raises(ValueError, match="2 replicas and 2 shards.*CPUs"):
        problems.minimize(runtime=small, **settings())
    assert not addresses


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"runtime": Ray(standby=1)}, r"Ray\(standby=1\)"),
        ({"runtime": Ray(replica_processes=2)}, r"Ray\(replica_processes=2\)"),
        ({"runtime": Ray(), "mesh": dbjax.make_mesh(model=1)}, "mesh.*Threads"),
    ],
)
def test_what_ray_has_not_is_an_error(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        problems.minimize(**settings(), **change)


def test_a_killed_shard_is_an_error_and_the_next_call_goes_on(
    ray, addresses, tmp_path, monkeypatch
):
    """It dies while replicas push to it, and it is they who say so."""
    keywords = settings(checkpoint_dir=tmp_path, checkpoint_every=2)
    due, take = [], live.LiveReplicas._take

    def taking(self, message):
        while due:
            ray._kept[-1].kill(addresses[due.pop()])
        return take(self, message)

    def look(params, iteration, time):
        due.extend(["shard 1"] * (iteration == 3))
        return {}

    monkeypatch.setattr(live.LiveReplicas, "_take", taking)
    with pytest.raises(ShardError, match=r"^shard 1 is lost.*checkpoint_dir"):
        problems.minimize(runtime=ray, eval_fn=look, **keywords)
    run = problems.minimize(runtime=ray, **keywords)
    assert run.info.resumed_at == 2
    assert_agrees(run, problems.minimize(**keywords | {"checkpoint_dir": None}))


KILLED = """
import os, signal, sys
import dbjax
from dbjax.runtime.ray import Ray
from tests.sandblaster import problems, ray_test

def look(params, iteration, time):
    if iteration == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}

keywords = ray_test.settings(**ray_test.LONG)
problems.minimize(
    runtime=Ray(), eval_fn=look, checkpoint_dir=sys.argv[1], **keywords
)
"""
LONG = {"shards": 1, "replicas": 1, "checkpoint_every": 2}


def test_a_driver_killed_on_the_way_is_resumed_by_another(ray, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    child = subprocess.run(command, cwd=root, timeout=100, check=False)
    assert child.returncode == -signal.SIGKILL
    keywords = settings(**LONG)
    run = problems.minimize(runtime=ray, checkpoint_dir=tmp_path, **keywords)
    assert run.info.resumed_at == 2
    assert_agrees(run, problems.minimize(**keywords))
    times = [row["time"] for row in run.trace.evaluations]
    assert times == sorted(times)


def test_rows_of_machines_whose_clocks_differ_are_put_in_order():
    """The shard's clock is behind that of the replica, who is first to begin."""
    recorder = Recorder()

    def row(kind, time, start, version=-1):
        made = recorder.add(kind, 0, start, version=version)
        made[1] = time
        return made

    first, second = row(COMPUTE, 5.0, 4.0), row(COMPUTE, 7.0, 6.0)
    pushes = [row(PUSH, 3.0, 5.0, 1), row(PUSH, 4.0, 4.5, 2), row(PUSH, 6.5, 7.0, 3)]
    merged = remote.in_order([first, second], [pushes])
    assert merged == [first, *pushes[:2], second, pushes[2]]
    assert [row[1] for row in merged] == [5.0, 5.0, 5.0, 7.0, 7.0]
