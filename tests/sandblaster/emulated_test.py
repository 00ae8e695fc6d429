"""Whatever an emulated cluster does to portions, their sum is the whole batch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dbjax
from dbjax.runtime.emulated import Emulated
from dbjax.sandblaster import vectors
from dbjax.sandblaster.arguments import check_arguments
from dbjax.sandblaster.emulated import EmulatedReplicas
from dbjax.sandblaster.live import LiveReplicas
from dbjax.sandblaster.messages import Evaluate
from dbjax.sandblaster.problem import make_problem
from dbjax.sandblaster.threaded import ThreadCrew
from dbjax.server.layout import Layout
from dbjax.trace import COMPUTE, FAIL, PUSH, TAKEN, Trace
from tests.problems import alarm, flat
from tests.sandblaster.problems import (
    EXAMPLES,
    PARAMS,
    SQUARES,
    X,
    Y,
    squares_loss,
)

within_time = pytest.fixture(autouse=True)(alarm)

WHOLE = {"x": X, "y": Y}
VALUE, GRADIENT = jax.value_and_grad(squares_loss)(PARAMS, WHOLE)
CLUSTERS = {
    "equal": dbjax.Cluster(),
    "slow": dbjax.Cluster(step_time=1.0, slow=dbjax.Slow(0.3, 20.0)),
    "heavy tails": dbjax.Cluster.heavy_tailed(),
    "far away": dbjax.Cluster(
        latency=dbjax.LogNormal(0.5, 1.0), shard_service=0.3, bandwidth=1e3
    ),
    "failing": dbjax.Cluster(
        step_time=dbjax.LogNormal(1.0, 0.5),
        latency=dbjax.Exponential(0.2),
        shard_service=0.05,
        failures=dbjax.Failures(uptime=dbjax.Exponential(3.0), downtime=1.0),
    ),
}  # fmt: skip
_PROBLEMS = {}


def problem_of(portion_size):
    """Made once for each size, for all tests."""
    if portion_size not in _PROBLEMS:
        data = SQUARES.data(portion_size)
        _PROBLEMS[portion_size] = make_problem(squares_loss, PARAMS, data)
    return _PROBLEMS[portion_size]


def make(portion_size, runtime, shards=1, **keywords):
    """Replicas, and the vectors that they push to."""
    defaults = {
        "method": dbjax.LBFGS(), "batches": dbjax.FullBatch(), "replicas": 1,
        "iterations": 1, "tolerance": 0, "push_every": 4, "strategy": "backups",
        "copies": 4, "split": "even", "seed": 0, "mesh": None, "rules": None,
        "eval_fn": None, "eval_every": None, "checkpoint_dir": None,
        "checkpoint_every": None, "runtime": runtime, "shards": shards,
    }  # fmt: skip
    arguments = check_arguments(**(defaults | keywords))
    layout = Layout.of(PARAMS, shards)
    ours = vectors.on_shards(layout)
    ours.put("x", PARAMS)
    problem = problem_of(portion_size)
    if isinstance(runtime, Emulated):
        return ours, EmulatedReplicas(problem, ours, arguments, runtime, 48.0)
    crew = ThreadCrew(problem, ours, arguments.replicas, runtime, layout.nbytes)
    return ours, LiveReplicas(problem, ours, arguments, crew)


def everything(portion_size, squares=False):
    portions = -(-EXAMPLES // portion_size)
    return Evaluate("x", (("g", tuple(range(portions))),), squares)


def assert_whole(ours, evaluated, value=VALUE, gradient=GRADIENT, into="g"):
    n, values = np.array(evaluated.examples), np.array(evaluated.values)
    np.testing.assert_allclose(n @ values / n.sum(), value, 1e-6)
    np.testing.assert_allclose(flat(ours.get(into)), flat(gradient), 1e-4, 1e-6)


@pytest.mark.parametrize("runtime", ["Emulated", "Threads"])
@pytest.mark.parametrize(
    ("portion_size", "shards", "replicas", "push_every"),
    [(EXAMPLES, 1, 1, 1), (7, 1, 1, 1), (7, 3, 4, 2), (1, 2, 5, 100), (5, 3, 30, 3)],
)
def test_equals_the_whole_batch(portion_size, shards, replicas, push_every, runtime):
    """Also where the last portion is short: portions count by their examples."""
    where = Emulated() if runtime == "Emulated" else dbjax.Threads()
    ours, crew = make(
        portion_size, where, shards, replicas=replicas, push_every=push_every
    )
    with crew.at_work():
        for _ in range(2):
            evaluated = crew.evaluate(everything(portion_size))
            assert_whole(ours, evaluated)
            assert sum(evaluated.examples) == EXAMPLES


@pytest.mark.parametrize("strategy", ["backups", "portions", "static"])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("shards", "replicas", "push_every"), [(1, 3, 2), (3, 20, 3)])
def test_every_portion_counts_exactly_once_whatever_happens(
    cluster, strategy, shards, replicas, push_every
):
    runtime = Emulated(CLUSTERS[cluster], seed=shards)
    ours, crew = make(
        2, runtime, shards, replicas=replicas, push_every=push_every, strategy=strategy
    )
    for _ in range(3):
        assert_whole(ours, crew.evaluate(everything(2)))
        crew.asked()
    trace = Trace.from_columns(
        {"replicas": replicas, "shards": shards}, [], **crew.columns()
    )
    trace.validate()
    if cluster == "failing":
        assert (trace.kind == FAIL).any()
    # The Trace agrees: on every shard as many portions as there are, three times; one
    # that a failure left on some shards only was computed, and kept, once more.
    portions = EXAMPLES // 2
    for shard in range(shards):
        pushed = (trace.kind == PUSH) & (trace.shard == shard)
        assert trace.count[pushed].sum() == 3 * portions
    computed = (trace.kind == COMPUTE) & (trace.status == TAKEN)
    assert set(trace.step[computed]) == set(range(3 * portions))
    if cluster != "failing":
        assert computed.sum() == 3 * portions


def test_troubles_are_counted():
    """Seeded: among so many evaluations each kind of trouble happens."""
    failing, slow = (Emulated(CLUSTERS[name], seed=3) for name in ("failing", "slow"))
    ours, crew = make(1, failing, 3, replicas=6, push_every=2)
    for _ in range(12):
        assert_whole(ours, crew.evaluate(everything(1)))
    info = crew.info()
    assert min(info._replace(steals=1)) > 0, info
    ours, crew = make(1, slow, 2, replicas=4)
    assert_whole(ours, crew.evaluate(everything(1)))
    info = crew.info()
    assert info.steals > 0 and info.returned == info.repaired == 0


def test_the_value_does_not_depend_on_who_computes_what():
    values = set()
    for cluster in CLUSTERS.values():
        for replicas in (1, 2, 7, 40):
            _, crew = make(5, Emulated(cluster), replicas=replicas)
            values.add(crew.evaluate(everything(5)).values)
    assert len(values) == 1


@pytest.mark.parametrize("runtime", [Emulated(CLUSTERS["failing"]), dbjax.Threads()])
def test_groups_go_into_vectors_of_their_own(runtime):
    """And the answer is in the order of the request, whatever its portions."""
    ours, crew = make(3, runtime, 2, replicas=4, push_every=2)
    data = SQUARES.data(3)
    groups = (("a", (7, 2)), ("b", (0,)), ("c", (5, 1, 3)))
    with crew.at_work():
        evaluated = crew.evaluate(Evaluate("x", groups, squares=True))
    listed = [p for _, group in groups for p in group]
    for place, p in enumerate(listed):
        value, gradient = jax.value_and_grad(squares_loss)(PARAMS, data.portion(p))
        np.testing.assert_allclose(evaluated.values[place], value, 1e-6)
        square = np.sum(flat(gradient).astype(float) ** 2)
        np.testing.assert_allclose(evaluated.squares[place], square, 1e-5)
    for into, group in groups:
        parts = [data.portion(p) for p in group]
        batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        gradient = jax.grad(squares_loss)(PARAMS, batch)
        np.testing.assert_allclose(flat(ours.get(into)), flat(gradient), 1e-4, 1e-6)


@pytest.mark.parametrize("runtime", [Emulated(), dbjax.Threads()])
def test_gradient_descent_in_five_lines(runtime):
    """The coordinator holds scalars only, and still gets down to the optimum."""
    ours, crew = make(10, runtime, 3, replicas=4)
    values = []
    with crew.at_work():
        for _ in range(60):
            evaluated = crew.evaluate(everything(10))
            values.append(np.average(evaluated.values, weights=evaluated.examples))
            ours.combine("x", {"x": 1.0, "g": -0.4})
    assert np.all(np.diff(values) <= 1e-6) and values[-1] < 0.02 * values[0]
    assert ours.dots([("g", "g")])[0] < 1e-4


@pytest.mark.parametrize("runtime", [Emulated(), dbjax.Threads()])
def test_a_loss_that_is_not_finite_is_said_and_leaves_no_trace(runtime):
    ours, crew = make(10, runtime, 2, replicas=2)
    ours.put("broken", jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS))
    with crew.at_work():
        broken = crew.evaluate(everything(10)._replace(at="broken"))
        assert np.isnan(broken.values).all()
        assert_whole(ours, crew.evaluate(everything(10)))


def test_going_on_from_what_was_saved_is_going_on():
    """All that a failing cluster has been through follows from what was asked."""
    runtime = Emulated(CLUSTERS["failing"], seed=7)
    first, second = (make(2, runtime, 2, replicas=5)[1] for _ in range(2))
    for _ in range(3):
        first.evaluate(everything(2))
        first.asked()
    second.restore(first.save())
    assert second.now() == first.now()
    for crew in (first, second):
        crew.evaluate(everything(2))
    assert second.now() == first.now() and second.info() == first.info()
    for name, column in first.columns().items():
        np.testing.assert_array_equal(column, second.columns()[name])
