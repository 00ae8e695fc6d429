"""One small regression for every test of a run, compiled once and not once a run."""

import dataclasses
import json
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbjax
from dbjax.downpour.problem import make_problem
from dbjax.server.layout import Layout
from tests import textbook

EXAMPLES, INPUTS, OUTPUTS, BATCH = 48, 10, 4, 8

_random = np.random.default_rng(0)
X = _random.standard_normal((EXAMPLES, INPUTS)).astype(np.float32)
Y = (X @ _random.standard_normal((INPUTS, OUTPUTS))).astype(np.float32)
W = (0.3 * _random.standard_normal((INPUTS, OUTPUTS))).astype(np.float32)
PARAMS = {"b": np.zeros(OUTPUTS, np.float32), "w": W}
DATA = dbjax.from_arrays({"x": X, "y": Y}, batch_size=BATCH, seed=0)

# Made once: a rule is compiled anew for every object that is not the same.
ADAGRAD, SGD = dbjax.adagrad(0.05), optax.sgd(0.05)
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def gradient(flat, replica, batch, data=DATA):
    """The gradient of `loss_fn` by hand, for parameters laid end to end."""
    batch = data.batch(replica, batch)
    b, w = flat[:OUTPUTS], flat[OUTPUTS:].reshape(INPUTS, OUTPUTS)
    residual = batch["x"] @ w + b - batch["y"]
    outer = batch["x"].T @ residual
    return 2 * np.concatenate([residual.sum(0), outer.ravel()]) / residual.size


def flat(params):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(params)])


class Notes:
    """What replicas note down, in whichever process they are."""

    def __init__(self, folder):
        self.file = folder / "notes"
        self.file.touch()

    def add(self, *values):
        """Append a row of plain values."""
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def read(self):
        """Give all rows."""
        return list(map(json.loads, self.file.read_text().splitlines()))


class Wrapped:
    """Data that first calls `before(replica, step)`, which may raise, or gives a batch."""

    def __init__(self, before, data=DATA):
        self.before, self.data = before, data

    def batch(self, replica, step):
        other = self.before(replica, step)
        return self.data.batch(replica, step) if other is None else other


def train(runtime=None, data=DATA, **keywords):
    """`downpour.train` on this problem."""
    keywords = {"optimizer": ADAGRAD, "replicas": 3, "steps": 24} | keywords
    loss = keywords.pop("loss_fn", loss_fn)
    params = keywords.pop("params", PARAMS)
    return dbjax.downpour.train(loss, params, data, runtime=runtime, **keywords)


def replay(trace, data=DATA, **keywords):
    """`replay` on this problem, every digest checked; keywords as `train` had them."""
    names = (
        "optimizer",
        "provide",
        "local_optimizer",
        "split",
        "rng",
        "has_aux",
        "seed",
    )
    keywords = {"optimizer": ADAGRAD} | keywords
    kept = {name: keywords[name] for name in names if name in keywords}
    loss = keywords.get("loss_fn", loss_fn)
    params = keywords.get("params", PARAMS)
    return dbjax.replay(trace, loss, params, data, verify=True, **kept)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def assert_replays(run, data=DATA, **keywords):
    """The exact replay of a run's Trace ends in the run's own bits."""
    again = replay(run.trace, data, **keywords)
    assert_same_bits(again.params, run.params)
    assert_same_bits(again.optimizer_state, run.optimizer_state)


def play(trace, rule, local_rule=None, data=DATA, aware=False):
    """The textbook's end of a Trace, flat; `rule()` makes the rule of one shard."""
    start = flat(PARAMS)
    places, at = [], 0
    for leaf in jax.tree.leaves(PARAMS):
        places.append(np.arange(at, at + leaf.size).reshape(leaf.shape))
        at += leaf.size
    places = jax.tree.unflatten(jax.tree.structure(PARAMS), places)
    parts = Layout.of(PARAMS, trace.header["shards"]).split(places)
    shards = [flat(part) for part in parts]
    versions = textbook.downpour(
        trace,
        lambda w, r, b: gradient(w, r, b, data),
        *(start, shards, rule, local_rule, aware),
    )
    end = np.full_like(start, np.nan)
    for place, shard in zip(shards, versions, strict=True):
        end[place] = shard[-1]
    return end


def replica_threads():
    """Threads of a run that are still there."""
    names = ("replica-", "ThreadPoolExecutor-")
    return [t for t in threading.enumerate() if t.name.startswith(names)]


def alarm(left_behind=replica_threads):
    """A fixture: a run that waits for ever is an error, and so is a thread left behind."""

    def stop(signum, frame):
        raise TimeoutError("the run hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not left_behind()


_made = {}


def compile_once(monkeypatch):
    """Let all runs of one problem share what `make_problem` compiles, whatever the data."""

    def shared(loss_fn, params, data, *, replicas=1, **keywords):
        key = loss_fn, id(params), *sorted(keywords.items(), key=lambda item: item[0])
        if key not in _made:
            made = make_problem(loss_fn, params, data, replicas=replicas, **keywords)
            _made[key] = made, params  # held, so that its id is not given out again
        elif hasattr(data, "start"):
            data.start(replicas)
        made = _made[key][0]
        # A run's parameters are its own, to write over.
        own = jax.tree.map(jnp.copy, made.params)
        return dataclasses.replace(made, data=data, params=own)

    for module in ("train", "replay", "probe"):
        # By name: the package's attributes are the functions.
        monkeypatch.setattr(
            sys.modules[f"dbjax.downpour.{module}"], "make_problem", shared
        )
