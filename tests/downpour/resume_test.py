"""A run that was interrupted goes on, to the bits and the Trace of one that was not."""

import pathlib
import random
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import checkpoint
from dbjax.downpour.protocol import Protocol
from dbjax.runtime.threads import ReplicaError
from dbjax.trace import COMPUTE
from tests import problems
from tests.problems import DATA, MOMENTUM, PARAMS, SGD, loss_fn, train

FAR = dbjax.Emulated(
    dbjax.Cluster(
        step_time=dbjax.Gamma(1.0, 2.0),
        latency=dbjax.Exponential(0.4),
        shard_service=dbjax.Exponential(0.05),
    )
)
FAILING = dbjax.Emulated(
    dbjax.Cluster(failures=dbjax.Failures(uptime=dbjax.Exponential(9.0), downtime=2.0)),
    seed=5,
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
# Whatever a run can have in hand: gradients, local steps, old versions, narrow ones.
KINDS = {
    "plain": {},
    "far shards": {"runtime": FAR, "shards": 3, "optimizer": MOMENTUM},
    "accrual": {"runtime": FAR, "shards": 2, "n_push": 3, "n_fetch": 2},
    "overlap": {"runtime": FAR, "shards": 2, "overlap": True, "n_push": 2},
    "local steps": {"n_fetch": 3, "n_push": 2, "local_optimizer": MOMENTUM},
    "failing": {"runtime": FAILING, "n_push": 3, "shards": 2},
    "provided": {
        "runtime": FAR,
        "optimizer": COMPENSATED,
        "provide": ("stale_params", "staleness"),
    },
    "narrow": {"runtime": FAR, "shards": 3, "version_dtype": jnp.bfloat16},
    "barrier": {"protocol": dbjax.synchronous(), "warmstart_steps": 5},
}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_hangs():
    yield from problems.alarm()


class Interrupted(Exception):
    pass


def evaluate(params, step, time):
    return {"loss": loss_fn(params, {"x": problems.X, "y": problems.Y})}


def interrupted(at, where="data", **keywords):
    """Run until the `at`-th minibatch, or evaluation: None, or a run that ended before.

    The problem must be compiled, so that no minibatch is asked for to check it.
    """
    left = at

    def count(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted

    def eval_fn(params, step, time):
        if where == "eval_fn":
            count()
        return evaluate(params, step, time)

    data = problems.Wrapped(count) if where == "data" else DATA
    try:
        return train(data=data, eval_fn=eval_fn, eval_every=7, **keywords)
    except Interrupted:
        return None


def whole(**keywords):
    return train(eval_fn=evaluate, eval_every=7, **keywords)


def assert_same_run(run, want):
    assert want.trace.diff(run.trace) is None  # with evaluations, digests and header
    problems.assert_same_bits(run.params, want.params)
    problems.assert_same_bits(run.optimizer_state, want.optimizer_state)
    assert run.info._replace(resumed_at=0) == want.info


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_interrupted_anywhere_ends_in_the_same_bits(tmp_path, kind, seed):
    """Again and again, by its data or by its evaluations."""
    drawn = random.Random(f"{kind} {seed}")
    keywords = {"steps": 30} | KINDS[kind]
    want = whole(**keywords)
    keywords |= {"checkpoint_dir": tmp_path}
    keywords |= {"checkpoint_every": drawn.choice([8, 100])}
    run, times = None, 0
    while run is None:
        where = drawn.choice(["data", "data", "eval_fn"])
        at = drawn.randrange(5, 15) if where == "data" else drawn.randrange(1, 3)
        run = interrupted(at, where, **keywords)
        times += run is None
    assert times
    assert run.info.resumed_at > 0
    assert_same_run(run, want)


@pytest.mark.parametrize("at", [1, 6, 11])
@pytest.mark.parametrize("keywords", [{}, {"n_push": 2, "shards": 2}])
def test_not_a_minibatch_is_lost(tmp_path, at, keywords):
    """What was computed before the interruption is not computed again."""
    keywords = {"steps": 12} | keywords
    want = whole(**keywords)
    keywords["checkpoint_dir"] = tmp_path
    assert interrupted(at, **keywords) is None
    asked = []
    data = problems.Wrapped(lambda *which: asked.append(which))
    run = train(data=data, eval_fn=evaluate, eval_every=7, **keywords)
    assert run.info.resumed_at == at
    assert len(asked) == 12 - at
    assert_same_run(run, want)


def test_a_run_that_is_interrupted_often_gets_on(tmp_path):
    """Though there is more on its way to the shards than it computes at a time."""
    far = dbjax.Emulated(dbjax.Cluster(latency=3.0))
    keywords = {"replicas": 8, "steps": 40, "runtime": far}
    want = whole(**keywords)
    keywords |= {"checkpoint_dir": tmp_path, "checkpoint_every": 20}
    with pytest.MonkeyPatch.context() as patch:
        # Killed after the first checkpoint.
        save = checkpoint.save

        def save_once(*args, **more):
            save(*args, **more)
            raise SystemExit

        patch.setattr(checkpoint, "save", save_once)
        with pytest.raises(SystemExit):
            whole(**keywords)
    [step] = checkpoint.steps(tmp_path)
    assert 0 < step <= 20
    for _ in range(5):
        assert interrupted(3, **keywords) is None
        step += 3
        assert checkpoint.latest(tmp_path).step == step
    assert_same_run(whole(**keywords), want)


def watch_shards(monkeypatch, before):
    """Call `before(push)` each time a shard is about to handle a push."""
    module = sys.modules["dbjax.downpour.problem"]
    make = module.make_shard

    def watched(*args):
        shard = make(*args)

        def handle(state, message, **spare):
            before(message)
            return shard.handle(state, message, **spare)

        return shard._replace(handle=handle)

    monkeypatch.setattr(module, "make_shard", watched)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_does_not_tear_a_push_apart(tmp_path, monkeypatch, presses):
    """It waits for the other shards, or at the second time leaves without saving."""
    handled = []

    def before(push):
        handled.append(push)
        if len(handled) == 3 * 9 + 2:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    # An own rule, as watched shards are not for others to share.
    keywords = {"shards": 3, "steps": 20, "optimizer": optax.sgd(0.05, momentum=0.9)}
    keywords |= {"checkpoint_dir": tmp_path, "checkpoint_every": 20}
    watch_shards(monkeypatch, before)
    with pytest.raises(KeyboardInterrupt):
        train(**keywords)
    assert len(handled) == (30 if presses == 1 else 29)
    assert checkpoint.steps(tmp_path) == ([10] if presses == 1 else [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = train(**keywords)
    assert len(handled) == (60 if presses == 1 else 89)
    assert_same_run(run, train(**keywords | {"checkpoint_dir": None}))


KILLED = {"runtime": FAR, "shards": 2, "n_push": 2, "steps": 45, "checkpoint_every": 10}
KILL = """
import os, signal, sys
from tests import problems
from tests.downpour import resume_test

def before(replica, step):
    if (replica, step) == (2, 11):
        os.kill(os.getpid(), signal.SIGKILL)

data = problems.Wrapped(before)
problems.train(data=data, checkpoint_dir=sys.argv[1], **resume_test.KILLED)
"""


def test_a_killed_process_is_resumed_by_another(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path)],
        cwd=pathlib.Path(__file__).parent.parent.parent,
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    run = train(checkpoint_dir=tmp_path, **KILLED)
    assert run.info.resumed_at >= 20
    assert_same_run(run, train(**KILLED))


def test_iterators_are_read_on_from_where_they_stood(tmp_path):
    def stream(replica, replicas):
        step = 0
        while True:
            yield DATA.batch(replica, step)
            step += 1

    keywords = {"shards": 2, "n_push": 3, "checkpoint_dir": tmp_path}

    def eval_fn(params, step, time):
        if step == 15:
            raise Interrupted
        return {}

    data = dbjax.from_iterators(stream)
    with pytest.raises(Interrupted):
        train(data=data, eval_fn=eval_fn, eval_every=15, **keywords)
    run = train(data=data, **keywords)
    assert 0 < run.info.resumed_at <= 15
    assert_same_run(run, train(**keywords | {"checkpoint_dir": None}))


class Placed:
    """An iterator that knows where it stands, as grain's do, and counts its reads."""

    def __init__(self, replica, read):
        self.replica, self.read, self.at = replica, read, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.read.append((self.replica, self.at))
        self.at += 1
        return DATA.batch(self.replica, self.at - 1)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("name", ["emulated", "threads"])
def test_iterators_with_a_state_are_not_read_again(name, tmp_path):
    """From a checkpoint between two minibatches; nothing is read twice but the check's."""
    read = []
    data = dbjax.from_iterators(lambda replica, replicas: Placed(replica, read))
    keywords = {"n_push": 3, "checkpoint_dir": tmp_path, "runtime": RUNTIMES[name]}
    keywords |= {"checkpoint_every": 12, "steps": 240}
    save = checkpoint.save

    def last(*args, **kw):
        save(*args, **kw)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint, "save", last)
        train(data=data, **keywords)
    assert 12 <= checkpoint.latest(tmp_path).step < 240
    first = set(read)
    read.clear()
    run = train(data=data, **keywords)
    assert not (set(read) - {(0, 0)}) & first
    assert run.info.steps == 240
    problems.assert_replays(run)


RUNTIMES = {"emulated": dbjax.Emulated(), "threads": dbjax.Threads(digest_every=1)}


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return RUNTIMES[request.param]


def test_a_finished_run_is_not_run_again(runtime, tmp_path):
    """It is read from its checkpoint, and its end is evaluated."""
    keywords = {"runtime": runtime, "shards": 2, "checkpoint_dir": tmp_path}
    want = train(**keywords)
    saved = checkpoint.steps(tmp_path)
    asked = []
    data = problems.Wrapped(lambda *which: asked.append(which))
    run = train(data=data, **keywords)
    assert not asked
    assert run.info.resumed_at == run.info.steps == 24
    rows = want.trace.kind == COMPUTE
    for name in ("replica", "step", "batch"):
        column = getattr(want.trace, name)[rows]
        again = run.trace.take(run.trace.kind == COMPUTE)
        np.testing.assert_array_equal(getattr(again, name), column)
    problems.assert_same_bits(run.params, want.params)
    problems.assert_same_bits(run.optimizer_state, want.optimizer_state)
    problems.assert_replays(run)
    assert checkpoint.steps(tmp_path) == saved


# Checkpoints that are damaged, or of another run.


def damage(folder):
    """Change a bit of every file."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        contents = bytearray(file.read_bytes()) or bytearray(1)
        contents[len(contents) // 2] ^= 16
        file.write_bytes(contents)


def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(runtime, tmp_path):
    keywords = {"runtime": runtime, "shards": 2, "steps": 60, "n_push": 2}
    keywords |= {"checkpoint_dir": tmp_path, "checkpoint_every": 10}
    # So that all replicas get on alike, and one of them to its 16th minibatch.
    keywords |= {"protocol": dbjax.synchronous()}

    def before(replica, step):
        if (replica, step) == (1, 15):
            raise Interrupted

    with pytest.raises((Interrupted, ReplicaError)):
        train(data=problems.Wrapped(before), **keywords)
    older, newest = checkpoint.steps(tmp_path)
    assert older < newest
    damage(tmp_path / str(newest))
    with pytest.warns(UserWarning, match=f"{newest} is damaged .* the one before"):
        run = train(**keywords)
    assert run.info.resumed_at == older
    assert run.info.steps == 60
    problems.assert_replays(run)
    if isinstance(runtime, dbjax.Emulated):
        assert_same_run(run, train(**keywords | {"checkpoint_dir": None}))


def test_where_all_are_damaged_nothing_is_begun_anew(runtime, tmp_path):
    keywords = {"runtime": runtime, "checkpoint_dir": tmp_path}
    train(**keywords)
    for step in checkpoint.steps(tmp_path):
        damage(tmp_path / str(step))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="all checkpoints in .* are damaged"),
    ):
        train(**keywords)


OTHER = [
    ({"replicas": 4}, "with replicas=3, not 4: use another directory"),
    ({"shards": 3}, "with shards=2, not 3"),
    ({"steps": 48}, "with steps=24, not 48"),
    ({"n_fetch": 2}, "with n_fetch=1, not 2"),
    ({"n_push": 2}, "with n_push=1, not 2"),
    ({"overlap": True}, "with overlap=False, not True"),
    ({"warmstart_steps": 3}, "with warmstart_steps=0, not 3"),
    ({"protocol": dbjax.synchronous()}, "with protocol='asynchronous'"),
    ({"optimizer": SGD}, "with optimizer state="),
    ({"local_optimizer": SGD}, "with local_optimizer state="),
    ({"optimizer": COMPENSATED, "provide": ("staleness", "stale_params")}, "with"),
    ({"version_dtype": jnp.bfloat16}, "with version_dtype='None'"),
    ({"params": PARAMS | {"w": PARAMS["w"].astype(jnp.bfloat16)}}, "with params="),
    ({"split": "leaf"}, "with split="),
]
EMULATED_ONLY = [
    ({"runtime": FAR}, "on another cluster or seed"),
    ({"runtime": dbjax.Emulated(seed=1)}, "on another cluster or seed"),
    ({"runtime": RUNTIMES["threads"]}, r"of another runtime \(emulated\)"),
]
THREADS_ONLY = [({"runtime": RUNTIMES["emulated"]}, r"of another runtime \(threads\)")]


def key(params, batch, key):
    return jnp.sum(params["b"] * jax.random.normal(key, (problems.OUTPUTS,)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("emulated", OTHER + EMULATED_ONLY), ("threads", OTHER + THREADS_ONLY)],
)
def test_a_checkpoint_of_another_run_is_refused(name, changes, tmp_path):
    """And stays as it is."""
    keywords = {"runtime": RUNTIMES[name], "shards": 2, "checkpoint_dir": tmp_path}
    run = train(**keywords)
    for change, words in changes:
        with pytest.raises(ValueError, match=f"checkpoint_dir '{tmp_path}' .*{words}"):
            train(**keywords | change)
    problems.assert_same_bits(train(**keywords).params, run.params)


def test_a_checkpoint_with_other_batches_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()  # what is compiled is shared whatever the batches are
    train(checkpoint_dir=tmp_path)
    smaller = dbjax.from_arrays({"x": problems.X, "y": problems.Y}, batch_size=4)
    with pytest.raises(ValueError, match="checkpoint_dir .* with batches of="):
        train(data=smaller, checkpoint_dir=tmp_path)


def picky(most):
    return Protocol("picky", lambda clocks, r: True, lambda clocks, r, n: n < most)


@pytest.mark.parametrize(
    ("keywords", "change"),
    [
        # The same order of events, at other times.
        (
            {"runtime": dbjax.Emulated(dbjax.Cluster(step_time=1.0))},
            {"runtime": dbjax.Emulated(dbjax.Cluster(step_time=2.0))},
        ),
        ({"protocol": picky(1)}, {"protocol": picky(5)}),
        ({"loss_fn": key, "rng": True}, {"seed": 1}),
        ({}, {"params": PARAMS | {"b": PARAMS["b"] + 1}}),
    ],
    ids=["times", "protocol", "seed", "start"],
)
def test_more_checkpoints_of_another_run_are_refused(keywords, change, tmp_path):
    """A run that goes on has the bits and the Trace of one, not of two."""
    keywords = {"checkpoint_dir": tmp_path} | keywords
    assert interrupted(10, **keywords) is None
    with pytest.raises(ValueError, match="checkpoint_dir"):
        train(**keywords | change)


@pytest.mark.xfail(
    strict=True,
    raises=ValueError,
    reason="not supported: DESIGN.md, section 4, point 10",
)
@pytest.mark.parametrize(
    "change", [{"shards": 4}, {"shards": 1}, {"replicas": 5}, {"replicas": 2}]
)
def test_a_live_run_goes_on_with_other_shards_or_replicas(change, tmp_path):
    """As nothing is in flight in its checkpoint."""
    keywords = {"runtime": RUNTIMES["threads"], "checkpoint_dir": tmp_path}
    keywords |= {"shards": 2, "steps": 60}

    def before(replica, step):
        if (replica, step) == (1, 8):
            raise Interrupted

    with pytest.raises(ReplicaError):
        train(data=problems.Wrapped(before), protocol=dbjax.synchronous(), **keywords)
    run = train(protocol=dbjax.synchronous(), **keywords | change)
    assert run.info.resumed_at > 0
    assert run.info.steps == 60
