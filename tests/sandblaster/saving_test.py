"""A run that was killed goes on from its checkpoint as if nothing had happened."""

import json

import jax
import numpy as np
import pytest

import dbjax
from dbjax import checkpoint
from dbjax.optim.linesearch import backtracking
from dbjax.optim.status import Status
from dbjax.trace import PUSH
from tests.problems import alarm, assert_same_bits
from tests.sandblaster import problems
from tests.sandblaster.problems import (
    CONSTRAINED,
    PARAMS,
    PROBLEMS,
    assert_close,
    minimize,
)

within_time = pytest.fixture(autouse=True)(alarm)


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    problems.compile_once(monkeypatch)


class Killed(Exception):
    pass


FAILING = dbjax.Cluster(
    latency=dbjax.Exponential(0.1),
    failures=dbjax.Failures(uptime=dbjax.Exponential(5.0), downtime=1.0),
)
RULES = {
    "full": dbjax.FullBatch(),
    "multi": dbjax.MultiBatch(4, seed=1),
    "progressive": dbjax.ProgressiveBatch(3, seed=1),
}


def settings(**more):
    return {
        "portion_size": 2, "iterations": 9, "tolerance": 0, "shards": 2, "replicas": 3,
        "push_every": 2, "checkpoint_every": 2, "problem": PROBLEMS["logistic"],
    } | more  # fmt: skip


def killed(at, tmp_path, **keywords):
    """A run that dies in its evaluation of iteration `at`, then one that goes on."""

    def dies(params, iteration, time):
        if iteration == at:
            raise Killed
        return {"norm": float(np.sum(np.square(params["w"])))}

    def lives(params, iteration, time):
        return {"norm": float(np.sum(np.square(params["w"])))}

    with pytest.raises(Killed):
        minimize(eval_fn=dies, checkpoint_dir=tmp_path, **keywords)
    whole = minimize(eval_fn=lives, **keywords)
    return minimize(eval_fn=lives, checkpoint_dir=tmp_path, **keywords), whole


CASES = [
    ("full", "lbfgs", 5),
    ("full", "conjugate gradient", 4),
    ("full", "gradient descent", 7),
    ("full", "l1", 5),
    ("full", "bounds", 3),
    ("multi", "lbfgs", 7),
    ("multi", "bounds", 5),
    ("progressive", "lbfgs", 5),
    ("progressive", "l1", 7),
]


@pytest.mark.parametrize(("rule", "method", "at"), CASES)
def test_an_emulated_run_goes_on_to_the_same_rows_and_bits(rule, method, at, tmp_path):
    keywords = settings(
        method=CONSTRAINED[method],
        batches=RULES[rule],
        runtime=dbjax.Emulated(FAILING, seed=6),
    )
    run, whole = killed(at, tmp_path, **keywords)
    assert run.info.resumed_at == (at - 1) // 2 * 2
    assert run.trace.diff(whole.trace) is None
    assert run.trace.evaluations == whole.trace.evaluations
    assert_same_bits(run.params, whole.params)
    assert (run.value, run.status) == (whole.value, whole.status)
    assert run.info._replace(resumed_at=0) == whole.info


@pytest.mark.parametrize(("rule", "method", "at"), CASES)
def test_a_threaded_run_goes_on_to_the_same_result(rule, method, at, tmp_path):
    keywords = settings(
        method=CONSTRAINED[method], batches=RULES[rule], runtime=dbjax.Threads()
    )
    run, whole = killed(at, tmp_path, **keywords)
    assert run.info.resumed_at > 0
    assert (run.iterations, run.evaluations) == (whole.iterations, whole.evaluations)
    np.testing.assert_allclose(run.value, whole.value, 1e-5)
    assert_close(run.params, whole.params, 1e-3)
    rows, theirs = run.trace.evaluations, whole.trace.evaluations
    assert [row["step"] for row in rows] == [row["step"] for row in theirs]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    # One Trace of both lives, and it can have happened.
    trace = run.trace
    trace.validate()
    pushed = trace.count[(trace.kind == PUSH) & (trace.shard == 1)].sum()
    assert pushed == run.info.portions_evaluated == whole.info.portions_evaluated
    assert len(trace.kind[(trace.kind == PUSH) & (trace.shard == 1)]) == (
        run.info.portions.pushes
    )


def test_a_run_that_has_ended_gives_its_end_again(tmp_path):
    keywords = settings(iterations=8, checkpoint_dir=tmp_path)
    first = minimize(**keywords)
    again = minimize(**keywords)
    assert again.info.resumed_at == 8
    assert_same_bits(again.params, first.params)
    assert (again.value, again.status) == (first.value, first.status)
    assert again.trace.evaluations == first.trace.evaluations


@pytest.mark.parametrize("rule", RULES)
def test_more_iterations_go_on_where_fewer_ended(rule, tmp_path):
    """They are no part of what must be the same: the path does not depend on them."""
    keywords = settings(batches=RULES[rule], checkpoint_dir=tmp_path)
    whole = minimize(**keywords | {"checkpoint_dir": None})
    minimize(**keywords | {"iterations": 4})
    run = minimize(**keywords)
    assert run.iterations == 9 and run.info.resumed_at == 4
    assert_same_bits(run.params, whole.params)
    assert run.trace.diff(whole.trace) is None


def test_fewer_iterations_than_there_are_end_at_once(tmp_path):
    minimize(**settings(iterations=9, checkpoint_dir=tmp_path))
    run = minimize(**settings(iterations=3, checkpoint_dir=tmp_path))
    assert (run.status, run.iterations) == (Status.LIMIT, 8)


def test_mixed_dtypes_come_back_as_they_were(tmp_path):
    import jax.numpy as jnp

    params = PARAMS | {"b": jnp.zeros(2, jnp.bfloat16)}
    method = dbjax.LBFGS(3, history_dtype=jnp.bfloat16)
    keywords = settings(params=params, method=method)
    run, whole = killed(5, tmp_path, **keywords)
    assert_same_bits(run.params, whole.params)
    assert run.params["b"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"replicas": 4}, "replicas"),
        ({"shards": 1}, "shards"),
        ({"method": dbjax.LBFGS(memory_size=4)}, "method"),
        ({"method": dbjax.LBFGS(5, linesearch=backtracking())}, "method"),
        ({"batches": dbjax.MultiBatch(4)}, "batches"),
        ({"portion_size": 3}, "examples"),
        ({"seed": 3}, "seed"),
        ({"tolerance": 1e-3}, "tolerance"),
        ({"runtime": dbjax.Threads()}, "runtime"),
        ({"runtime": dbjax.Emulated(seed=3)}, "runtime"),
        ({"strategy": "static"}, "strategy"),
        ({"push_every": 3}, "push_every"),
    ],
)
def test_a_checkpoint_of_another_run_is_an_error_that_names_the_argument(
    change, name, tmp_path
):
    keywords = settings(iterations=4, checkpoint_dir=tmp_path)
    keywords["method"] = dbjax.LBFGS(5)
    minimize(**keywords)
    with pytest.raises(ValueError, match=f"checkpoint_dir.*{name}="):
        minimize(**(keywords | change))


@pytest.mark.parametrize("weights", [np.full(2000, 0.1), np.full(2000, 0.0)])
def test_long_arrays_of_a_method_are_compared_too(weights, tmp_path):
    """As text they would look alike: only their ends are written out."""
    weights = weights.copy()

    def loss(params, batch):
        return ((params["w"] - batch["c"].mean()) ** 2).sum()

    def run(weights):
        data = dbjax.from_arrays({"c": np.ones(4, np.float32)}, batch_size=1)
        return minimize(
            loss_fn=loss, params={"w": np.zeros(2000, np.float32)}, data=data,
            method=dbjax.OWLQN({"w": weights}), iterations=2, checkpoint_dir=tmp_path,
        )  # fmt: skip

    run(weights)
    other = weights.copy()
    other[1000] = 0.7
    run(weights)
    with pytest.raises(ValueError, match="l1"):
        run(other)


def test_a_checkpoint_holds_scalars_and_vectors_and_nothing_else(tmp_path):
    minimize(**settings(iterations=4, checkpoint_dir=tmp_path))
    saved = checkpoint.latest(tmp_path)
    assert saved.step == 4
    note = json.dumps(saved.note["state"])
    assert len(note) < 10_000
    sizes = {leaf.size for leaf in saved.leaves.values()}
    assert sizes == {leaf.size for leaf in jax.tree.leaves(PARAMS)}
