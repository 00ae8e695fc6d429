"""Replicas on threads that fail, at moments that a seed decides, lose nothing."""

import threading

import numpy as np
import pytest

import dbjax
from dbjax.optim.status import Status
from dbjax.runtime.threads import ReplicaError
from dbjax.sandblaster import live, vectors
from dbjax.trace import FAIL, JOIN, PUSH, RESTART
from tests.problems import alarm
from tests.sandblaster import problems
from tests.sandblaster.problems import (
    BOX,
    CONSTRAINED,
    L1,
    SQUARES,
    Wrapped,
    assert_close,
    minimize,
)

within_time = pytest.fixture(autouse=True)(alarm)


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    problems.compile_once(monkeypatch)


class Flaky:
    """Raises at the n-th look at a portion, where (seed, portion, n) say so.

    The looks of a portion are numbered, whoever takes them; among `window` successive
    ones at most `most` fail, so that nobody has to give up.
    """

    def __init__(self, seed, share, most=1, window=8):
        self.seed, self.share, self.most, self.window = seed, share, most, window
        self.lock, self.looks, self.failed = threading.Lock(), {}, {}
        self.failures = 0

    def __call__(self, portion):
        with self.lock:
            look = self.looks[portion] = self.looks.get(portion, -1) + 1
            failed = self.failed.setdefault(portion, [])
            recent = sum(each > look - self.window for each in failed)
            die = np.random.default_rng([self.seed, portion, look]).random()
            # The first looks are those of `minimize`, before the run.
            fails = look > 1 and die < self.share and recent < self.most
            if fails:
                failed.append(look)
                self.failures += 1
        if fails:
            raise OSError(f"portion {portion} cannot be read")


RULES = {
    "full": dbjax.FullBatch(),
    "multi": dbjax.MultiBatch(4, seed=1),
    "progressive": dbjax.ProgressiveBatch(3, seed=1),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("shards", "replicas", "push_every"), [(1, 3, 2), (2, 6, 3)])
def test_failing_replicas_change_nothing_but_the_time(
    shards, replicas, push_every, seed
):
    keywords = {
        "portion_size": 2, "iterations": 8, "tolerance": 0, "shards": shards,
        "replicas": replicas, "push_every": push_every,
    }  # fmt: skip
    want = minimize(**keywords)
    flaky = Flaky(seed, share=0.1)
    data = Wrapped(flaky, SQUARES.data(2))
    run = minimize(data=data, runtime=dbjax.Threads(), **keywords)
    assert (run.iterations, run.evaluations) == (want.iterations, want.evaluations)
    np.testing.assert_allclose(run.value, want.value, 1e-5)
    assert_close(run.params, want.params, 1e-3)
    trace = run.trace
    trace.validate()
    failed = (trace.kind == FAIL).sum()
    # A look ahead that fails is forgotten: the portion is looked at in its turn.
    assert 0 < failed <= flaky.failures
    assert (trace.kind == RESTART).sum() == failed
    assert (trace.kind == JOIN).sum() == replicas
    for shard in range(shards):
        pushed = trace.count[(trace.kind == PUSH) & (trace.shard == shard)]
        assert pushed.sum() == 12 * run.evaluations == run.info.portions_evaluated
    assert run.info.portions.returned > 0


@pytest.mark.parametrize("seed", range(2))
def test_a_push_that_some_shards_have_added_is_repaired_on_the_others(
    seed, monkeypatch
):
    """The replica dies between two shards: nothing is lost, and nothing twice."""
    keywords = {
        "portion_size": 2, "iterations": 6, "tolerance": 0, "shards": 3,
        "replicas": 3, "push_every": 2,
    }  # fmt: skip
    want = minimize(**keywords)
    add, lock, pushes = vectors.Vectors.add, threading.Lock(), []

    def dies(self, into, gradients, replica, life, id_, shards=None, record=None):
        with lock:
            pushes.append(id_)
            count = len(pushes)
        landed = (count // 9 + seed) % 3
        if shards is not None or count % 9 != 4:
            add(self, into, gradients, replica, life, id_, shards, record)
        else:
            add(self, into, gradients, replica, life, id_, range(landed), record)
            raise OSError("the cable is cut")

    monkeypatch.setattr(vectors.Vectors, "add", dies)
    run = minimize(runtime=dbjax.Threads(), **keywords)
    assert run.info.portions.repaired > 0
    assert run.info.portions.returned > run.info.portions.repaired
    assert run.evaluations == want.evaluations
    assert_close(run.params, want.params, 1e-3)
    run.trace.validate()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["lbfgs", "l1", "bounds"])
def test_every_method_and_batch_survives(method, rule):
    keywords = {
        "method": CONSTRAINED[method], "batches": RULES[rule], "portion_size": 2,
        "iterations": 6, "tolerance": 0, "replicas": 3, "shards": 2, "push_every": 2,
    }  # fmt: skip
    want = minimize(**keywords)
    flaky = Flaky(11, share=0.5)
    run = minimize(
        data=Wrapped(flaky, SQUARES.data(2)), runtime=dbjax.Threads(), **keywords
    )
    assert run.evaluations == want.evaluations
    assert run.info.portions_evaluated == want.info.portions_evaluated
    assert_close(run.params, want.params, 1e-3)
    assert flaky.failures > 0


def test_a_portion_that_often_fails_and_then_does_not_is_no_end():
    """A long run meets many failures; only those of one evaluation add up."""
    flaky = Flaky(5, share=1.0, most=live.MOST_FAILURES - 1, window=3)
    data = Wrapped(lambda p: flaky(p) if p == 2 else None, SQUARES.data(6))
    run = minimize(
        data=data, runtime=dbjax.Threads(), replicas=1, iterations=8, tolerance=0
    )
    assert run.status == Status.LIMIT
    assert flaky.failures > 2 * live.MOST_FAILURES
    assert (run.trace.kind == FAIL).sum() > live.MOST_FAILURES


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_portion_that_always_fails_ends_the_run_and_is_named(replicas):
    def before(portion, looks=[]):  # noqa: B006
        looks.append(portion)
        if portion == 3 and looks.count(3) > 1:
            raise OSError("no such file")

    data = Wrapped(before, SQUARES.data(2))
    with pytest.raises(ReplicaError, match=r"replica \d.*portion 3.*no such file") as e:
        minimize(data=data, runtime=dbjax.Threads(), replicas=replicas)
    assert isinstance(e.value.__cause__, OSError)


def test_a_loss_that_raises_is_named_as_well():
    """At a shape that the first portion does not have, and tracing does not like."""

    def loss(params, batch):
        if batch["x"].shape[0] == 4:
            raise ZeroDivisionError("four is too many")
        return problems.squares_loss(params, batch)

    with pytest.raises(ReplicaError, match="portion 2.*four is too many"):
        minimize(loss_fn=loss, portion_size=10, runtime=dbjax.Threads())


@pytest.mark.parametrize("runtime", [None, dbjax.Threads()])
def test_an_error_of_the_users_evaluation_ends_the_run(runtime):
    """It is the coordinator's own, and no thread is left behind."""

    def look(params, iteration, time):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        minimize(eval_fn=look, runtime=runtime, replicas=3)


def test_jitter_tries_other_orders_and_the_result_is_the_same():
    keywords = {"portion_size": 2, "iterations": 5, "replicas": 5, "tolerance": 0}
    want = minimize(**keywords)
    run = minimize(runtime=dbjax.Threads(jitter=2e-3, seed=4), shards=2, **keywords)
    assert_close(run.params, want.params, 1e-4)
    run.trace.validate()


def test_the_next_portion_is_fetched_ahead_and_used():
    looks = []
    data = Wrapped(looks.append, SQUARES.data(6))
    minimize(data=data, runtime=dbjax.Threads(), replicas=1, iterations=3, tolerance=0)
    looks = looks[5:]  # before the run: the lengths, and what the loss returns
    evaluations, rest = divmod(len(looks), 4)
    assert rest == 0 and evaluations >= 4, "each portion once an evaluation"
    assert looks == [0, 1, 2, 3] * evaluations


def test_bounds_and_penalties_hold_on_threads():
    for method in (L1, BOX):
        want = minimize(method=method, iterations=20, tolerance=0)
        run = minimize(
            method=method, iterations=20, tolerance=0, runtime=dbjax.Threads(),
            shards=3, replicas=4,
        )  # fmt: skip
        np.testing.assert_allclose(run.value, want.value, 1e-5)
