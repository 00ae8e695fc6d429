"""On Ray in earnest: what is refused, who is killed, and replicas of several devices."""

import dataclasses
import functools
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import dbjax
from dbjax import checkpoint
from dbjax.runtime import ray as ray_lib
from dbjax.runtime.parcels import Held, Parcel
from dbjax.runtime.ray import Session
from dbjax.runtime.shard_host import ShardHost
from dbjax.runtime.transport import Gone
from dbjax.server.messages import Push
from dbjax.server.shard import make_shard
from dbjax.trace import COMPUTE, FAIL, NOT_FINITE, RESTART
from tests import many_devices, problems
from tests.problems import train

pytestmark = pytest.mark.ray
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    yield from problems.alarm()


@pytest.fixture
def variant(ray_cluster):
    """The cluster's runtime with other settings, and its processes."""

    def make(**settings):
        changed = dataclasses.replace(ray_cluster, **settings)
        object.__setattr__(changed, "_kept", ray_cluster._kept)
        return changed

    return make


@pytest.fixture
def pids(monkeypatch):
    """The processes that a run starts, by name."""
    known, host = {}, Session.host

    def noting(self, name, *args, **keywords):
        address, reply = host(self, name, *args, **keywords)
        pid = address.ask("pid", lane="side")
        pid.then(lambda reply: known.__setitem__(name, reply.result(10)))
        return address, reply

    monkeypatch.setattr(Session, "host", noting)
    return known


def assert_whole(run, steps, **keywords):
    run.trace.validate()
    assert sorted(run.trace.step[run.trace.kind == COMPUTE]) == list(range(steps))
    problems.assert_replays(run, **keywords)


def killing(pids, name, at):
    """A `watch` that kills a process once `at` minibatches are done."""
    killed = []

    def watch(progress):
        if progress.step >= at and name in pids and not killed:
            killed.append(name)
            os.kill(pids[name], signal.SIGKILL)

    return {"watch": watch, "watch_every": 0.02}, killed


def test_a_replica_is_killed(variant, pids):
    watch, killed = killing(pids, "replica 1", 40)
    run = train(variant(**watch), steps=600, shards=2)
    assert killed
    assert run.trace.header["deaths"] == {"replicas": 1, "shards": 0}
    rows = run.trace.take(np.isin(run.trace.kind, (FAIL, RESTART)))
    assert set(rows.replica) == {1}
    assert run.info.lost_updates == 0
    assert_whole(run, 600)


@pytest.mark.parametrize("standby", [0, 1])
def test_a_shard_is_killed(variant, pids, standby):
    watch, killed = killing(pids, "shard 1", 60)
    runtime = variant(standby=standby, snapshot_every=20, **watch)
    run = train(runtime, steps=400, shards=2)
    assert killed
    assert run.trace.header["deaths"] == {"replicas": 0, "shards": 1}
    assert run.trace.header["promotions"] == standby
    assert run.info.lost_gradients == 0
    if standby:
        assert run.info.lost_updates == 0
    assert np.any(run.trace.incarnation) == (not standby)
    assert_whole(run, 400)


def wide_loss(params, batch):
    return problems.loss_fn(params, batch) + 0.1 * jnp.mean(params["z"] ** 2)


WIDE = problems.PARAMS | {"z": np.linspace(-1, 1, 2**14, dtype=np.float32)}


@pytest.mark.parametrize(("standby", "overlap"), [(0, False), (1, True)])
def test_large_arrays_lie_in_memory_that_processes_share(
    variant, pids, standby, overlap
):
    of_shard, killed = killing(pids, "shard 0", 40)
    of_replica, killed_too = killing(pids, "replica 2", 80)

    def watch(progress):
        of_shard["watch"](progress)
        of_replica["watch"](progress)

    runtime = variant(standby=standby, snapshot_every=20, watch=watch, watch_every=0.02)
    run = train(
        runtime, loss_fn=wide_loss, params=WIDE, steps=400, shards=2, overlap=overlap
    )
    assert killed and killed_too
    assert run.trace.header["deaths"] == {"replicas": 1, "shards": 1}
    assert_whole(run, 400, loss_fn=wide_loss, params=WIDE)
    if sys.platform.startswith("linux"):
        assert "memfd:dbjax" in pathlib.Path("/proc/self/maps").read_text()


DRIVER = """
import sys
import dbjax
from tests import many_devices, problems
problems.train(
    dbjax.Ray(digest_every=5), steps=100_000, shards=2, checkpoint_dir=sys.argv[1],
    checkpoint_every=30,
)
"""


def test_the_driver_is_killed(tmp_path, ray_cluster):
    """Its processes go with it; a new one goes on from its last checkpoint."""
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, tmp_path], cwd=ROOT, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(90, child.kill)
    timer.start()
    while not checkpoint.steps(tmp_path) and child.poll() is None:
        signal.sigtimedwait([], 0.05)
    timer.cancel()
    child.kill()
    _, text = child.communicate()
    done = checkpoint.latest(tmp_path)
    assert done is not None, text
    note = done.note["arguments"]
    assert note["steps"] == 100_000
    steps = done.step + 100
    # A run with other arguments is refused; so this one has the same but for its end.
    with pytest.raises(ValueError, match="holds a run with steps=100000"):
        train(ray_cluster, steps=steps, shards=2, checkpoint_dir=tmp_path)
    stop = []

    def eval_fn(params, step, time):
        stop.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            ray_cluster, steps=100_000, shards=2, checkpoint_dir=tmp_path,
            eval_fn=eval_fn, eval_every=steps,
        )  # fmt: skip
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step >= steps > done.step


def test_each_replica_has_devices_of_its_own():
    """Rules cut it over two of them, in its own process; the Trace replays here."""
    (line,) = many_devices.run(ROOT / "tests/downpour/ray_partitions_check.py")
    assert line == "replays"


@pytest.mark.slow
def test_a_replica_spans_processes(tmp_path):
    """One of them is killed: all of the replica go with it, and the run ends whole."""
    script = ROOT / "tests/downpour/ray_processes_check.py"
    lines = many_devices.run(script, str(tmp_path))
    assert [line for line in lines if "replay" in line] == [  # Ray has news of its own
        "a group dies as one, and replays",
        "two processes of two devices replay",
    ]


# What is refused.


def test_nobody_answers_at_the_address(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**options):
        raise ConnectionError("nobody")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="no Ray cluster answers at address="):
        train(dbjax.Ray(address="192.0.2.1:6379"))


def test_a_cluster_of_another_version_is_not_joined(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**options):
        raise RuntimeError("Version mismatch: The cluster was started with Ray: 1.0")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="cannot be joined: Version mismatch"):
        train(dbjax.Ray(address="auto"))


def test_a_node_with_other_versions_is_named(variant, monkeypatch):
    versions = ray_lib._versions() | {"jax": "0.1"}
    monkeypatch.setattr(ray_lib, "_versions", lambda: versions)
    with pytest.raises(RuntimeError, match=r"this node has jax .*, the driver has 0.1"):
        train(variant())


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"replica_cpus": 50.0, "shard_cpus": 0.0}, "150 CPUs"),
        ({"replica_cpus": 0.0, "shard_cpus": 0.0, "replica_gpus": 1.0}, "3 GPUs"),
    ],
)
def test_what_a_cluster_lacks_is_said(variant, settings, missing):
    with pytest.raises(ValueError, match=f"need {missing}, .* are missing"):
        with variant(**settings) as runtime:
            train(runtime)


def test_processes_must_divide_the_devices_of_a_replica(variant):
    with pytest.raises(ValueError, match="replica_processes=2 must divide .* has 1"):
        train(variant(replica_processes=2))


def test_what_cannot_be_sent_is_named(ray_cluster):
    lock = threading.Lock()

    def loss(params, batch):
        with lock:
            return problems.loss_fn(params, batch)

    with pytest.raises(TypeError, match=r"loss_fn cannot be sent .*lock"):
        train(ray_cluster, loss_fn=loss)

    class Locked(problems.Wrapped):
        def __init__(self):
            super().__init__(lambda replica, step: None)
            self.lock = threading.Lock()

    with pytest.raises(TypeError, match="data cannot be sent"):
        train(ray_cluster, Locked())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"address": ""}, "address must be"),
        ({"standby": 2}, "standby must be 0 or 1"),
        ({"digest_every": -1}, "digest_every must be at least 0"),
        ({"snapshot_every": 0}, "snapshot_every must be at least 1"),
        ({"replica_processes": 0}, "replica_processes must be at least 1"),
        ({"replica_processes": None}, "replica_processes must be at least 1"),
        ({"replica_cpus": -1.0}, "replica_cpus must be at least 0"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"watch_every": float("inf")}, "watch_every must be above 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dbjax.Ray(**wrong)


# What a shard does with what it is sent; in this process.


@pytest.fixture
def shard():
    return ShardHost(
        0, make_shard(problems.SGD), Held({"w": np.ones(4, np.float32)}),
        lambda clocks, replica, staleness: True, lambda params: 1, 0, 0.0,
        lambda what, value: value, 5.0,
    )  # fmt: skip


def parcel(gradients, id_=0, life=0, **more):
    push = Push(replica=1, id=id_, step=3, gradients={"w": gradients}, base=0)
    return Parcel(push, life, 1, ((0, 0),), **more)


def test_a_push_is_handled_once_however_often_it_comes(shard):
    ones = np.ones(4, np.float32)
    first, again = shard.push(parcel(ones)), shard.push(parcel(ones))
    assert (first.version, again.version) == (1, 1)
    assert shard.push(parcel(ones, id_=1)).version == 2
    np.testing.assert_allclose(shard.held().params["w"], 0.9, rtol=1e-6)


def test_a_former_life_is_fenced(shard):
    (sent,) = (shard.push(parcel(np.ones(4, np.float32))), *shard.fence(1, 0))[1:]
    assert (sent.push.id, sent.push.gradients) == (0, None)
    late = shard.push(parcel(np.ones(4, np.float32), id_=1))
    assert late.status == -1
    assert shard.push(parcel(np.ones(4, np.float32), id_=1, life=1)).version == 2


@pytest.mark.parametrize(
    "gradients",
    [np.ones(3, np.float32), np.ones(4, np.float64), np.ones((4, 1), np.float32)],
)
def test_gradients_of_wrong_shapes_are_refused(shard, gradients):
    with pytest.raises(ValueError, match="replica 1 sent shard 0 gradients of other"):
        shard.push(parcel(gradients))
    assert shard.held().version == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing_whoever_says_it_is(shard, value):
    answer = shard.push(parcel(np.full(4, value, np.float32)))
    assert (answer.version, answer.status) == (1, NOT_FINITE)
    np.testing.assert_array_equal(shard.held().params["w"], np.ones(4))


def test_a_version_in_use_is_not_written_over(shard):
    answers = [
        shard.push(parcel(np.ones(4, np.float32), id_=i, fetches=True))
        for i in range(9)
    ]
    seen = [answer.params["w"][0] for answer in answers]
    np.testing.assert_allclose(seen, 1 - 0.05 * np.arange(1, 10), rtol=1e-5)


def test_a_process_that_was_killed_is_gone(ray_cluster):
    session = ray_cluster._kept[0]
    address, there = session.host("somebody", dict)
    there.result(60)
    alive = address.ask("alive", lane="side")
    heard = threading.Event()
    alive.then(lambda reply: heard.set())
    session.kill(address)
    assert heard.wait(60)
    with pytest.raises(Gone, match="somebody"):
        alive.result(1)


def test_what_a_process_cannot_import_is_an_error_at_once(
    ray_cluster, tmp_path, monkeypatch
):
    (tmp_path / "only_here.py").write_text("def loss(params, batch):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    only_here = importlib.import_module("only_here")
    _, reply = ray_cluster._kept[0].host("somebody", functools.partial(only_here.loss))
    with pytest.raises(RuntimeError, match="(?s)somebody.*only_here") as caught:
        reply.result(60)
    assert not isinstance(caught.value, Gone)
