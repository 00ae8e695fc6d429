"""One battery of problems and laws for every method, and bad input of every kind."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.optim.status import Status
from dbjax.sandblaster import running, vector_shard
from tests.problems import alarm, assert_same_bits, flat
from tests.sandblaster import problems
from tests.sandblaster.problems import (
    CONSTRAINED,
    EXAMPLES,
    METHODS,
    PARAMS,
    PROBLEMS,
    SQUARES,
    X,
    Y,
    assert_close,
    least_squares,
    minimize,
    value_at,
)

PLAIN_CODE = True

within_time = pytest.fixture(autouse=True)(alarm)

LBFGS = METHODS["lbfgs"]


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    problems.compile_once(monkeypatch)


def assert_honest(run, tolerance):
    """The status says no more than what the numbers say."""
    if run.status == Status.CONVERGED:
        assert run.info.gradient_norm <= tolerance
    assert np.isfinite(flat(run.params)).all()
    run.trace.validate()
    assert run.trace.evaluations[-1]["step"] <= run.iterations
    assert run.trace.header["status"] == str(run.status)


# The battery.


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_solves_every_problem(method, problem):
    """The value never rises above the start's, and the best point comes home."""
    p = PROBLEMS[problem]
    slow = method == "gradient descent" and problem == "rosenbrock"
    most = 100 if slow else 300
    run = minimize(
        p, method=METHODS[method], iterations=most, tolerance=1e-4, replicas=3, seed=1
    )
    assert_honest(run, 1e-4)
    values = [row["value"] for row in run.trace.evaluations]
    np.testing.assert_allclose(values[0], value_at(p, p.params), 1e-5)
    assert run.value <= values[0]
    np.testing.assert_allclose(run.value, value_at(p, run.params), 1e-4, 1e-7)
    enough = 1.0 if slow else p.enough
    assert run.value <= p.lowest + enough, run
    # Nothing is taken that is worse, but for what rounding does.
    assert run.value <= min(values) + 1e-5 * abs(min(values)) + 1e-7
    limit = run.iterations == most
    assert (run.status == Status.LIMIT) == limit
    if not slow and problem != "network":
        assert run.status in (Status.CONVERGED, Status.SMALL_STEP)


@pytest.mark.parametrize("method", METHODS)
def test_the_solution_of_least_squares_is_found_to_many_digits(method):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(float), PARAMS)
        run = minimize(
            params=params, method=METHODS[method], iterations=300, tolerance=1e-9
        )
        solution, value = least_squares()
        assert run.status == Status.CONVERGED
        assert_close(run.params, solution, 1e-8)
        np.testing.assert_allclose(run.value, value, 1e-6)  # the data are float32
        assert {x.dtype for x in jax.tree.leaves(run.params)} == {np.dtype("float64")}


@pytest.mark.parametrize("method", METHODS)
def test_few_evaluations_as_the_first_step_tried_is_usually_taken(method):
    run = minimize(
        PROBLEMS["logistic"], method=METHODS[method], iterations=8, tolerance=0
    )
    per_step = 2.2 if method == "conjugate gradient" else 1.5
    assert run.evaluations <= 2 + per_step * run.iterations, run


def test_without_a_penalty_or_bounds_projected_methods_walk_the_same_path():
    """Both are L-BFGS with a projection that does nothing."""
    runs = [minimize(method=METHODS[m], iterations=5) for m in ("owlqn", "box")]
    assert_close(runs[0].params, runs[1].params, 1e-5)


def test_each_function_compiles_once_a_run(monkeypatch):
    """Twenty iterations compile what seven do, and all rounds are one program."""
    monkeypatch.undo()
    made = {}
    make_problem = running.make_problem

    def keep(*args, **keywords):
        made["problem"] = make_problem(*args, **keywords)
        return made["problem"]

    monkeypatch.setattr(running, "make_problem", keep)

    def loss(params, batch):
        return jnp.mean(jnp.cosh(batch["x"] @ params["w"] - batch["y"][:, 0]))

    def compiled(iterations):
        # Of a shape that no other test has: what is compiled is kept by shape.
        minimize(
            loss_fn=loss, params={"w": np.zeros(X.shape[1], np.float32)},
            portion_size=6, iterations=iterations, method=LBFGS, tolerance=0,
            push_every=2, replicas=2,
        )  # fmt: skip
        return counts() | {"both": made["problem"].both._cache_size()}

    def counts():
        kernels = vector_shard.KERNELS._asdict()
        return {name: kernel._cache_size() for name, kernel in kernels.items()}

    before = counts()
    few = compiled(7)
    assert few["dots"] == before["dots"] + 1
    assert few["both"] == 2, "the first of a sum, and the others"
    assert compiled(20) == few


# Against other people's code.


def standardised():
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), 2.0 * y - 1


def breast_cancer_loss(params, batch):
    scores = batch["x"] @ params["w"] + params["b"]
    return jnp.mean(jnp.logaddexp(0, -batch["y"] * scores))


def ridge_loss(params, batch):
    penalty = 0.5 * jnp.sum(params["w"] ** 2) / 569
    return breast_cancer_loss(params, batch) + penalty


def logistic_regression(loss_fn, **keywords):
    x, y = standardised()
    data = dbjax.from_arrays({"x": x, "y": y}, batch_size=1, portion_size=100)
    params = {"b": np.zeros(()), "w": np.zeros(x.shape[1])}
    return dbjax.sandblaster.minimize(
        loss_fn, params, data, iterations=3000, replicas=2, **keywords
    )


@pytest.fixture(scope="module")
def ridge():
    """scikit-learn's optimum with C=1: value of the mean loss, intercept, weights."""
    from sklearn.linear_model import LogisticRegression

    x, y = standardised()
    theirs = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000).fit(x, y)
    w, b = theirs.coef_[0], theirs.intercept_[0]
    loss = np.mean(np.logaddexp(0, -y * (x @ w + b)))
    return loss + 0.5 * w @ w / len(y), b, w


@pytest.mark.parametrize("method", METHODS)
def test_the_logistic_regression_of_scikit_learn_is_matched_to_six_digits(
    method, ridge
):
    value, b, w = ridge
    with jax.enable_x64(True):
        run = logistic_regression(ridge_loss, method=METHODS[method], tolerance=1e-7)
    assert run.status == Status.CONVERGED
    np.testing.assert_allclose(run.value, value, 1e-10)
    np.testing.assert_allclose(run.params["w"], w, 1e-4, 1e-5)
    np.testing.assert_allclose(run.params["b"], b, 1e-4)


@pytest.mark.parametrize("method", ["conjugate gradient", "lbfgs"])
def test_in_float32_its_value_is_matched_to_six_digits_as_well(method, ridge):
    """At the point returned, evaluated in float64: single precision finds it."""
    value, b, w = ridge
    run = logistic_regression(ridge_loss, method=METHODS[method], tolerance=1e-5)
    assert run.status in (Status.CONVERGED, Status.SMALL_STEP)
    np.testing.assert_allclose(run.value, value, 1e-6)
    np.testing.assert_allclose(run.params["w"], w, 2e-2, 2e-2)


def split_variables(x, y, weight):
    """scipy's optimum of the loss with an L1 norm of `w = u - v`, both from 0."""
    from scipy.optimize import minimize as scipy_minimize

    n, d = x.shape

    def value_and_gradient(z):
        u, v, b = z[:d], z[d : 2 * d], z[-1]
        margins = y * (x @ (u - v) + b)
        slope = -y / (1 + np.exp(margins)) / n
        g = x.T @ slope
        value = np.mean(np.logaddexp(0, -margins)) + weight * (u.sum() + v.sum())
        return value, np.concatenate([g + weight, weight - g, [slope.sum()]])

    bounds = [(0, None)] * (2 * d) + [(None, None)]
    options = {"maxiter": 50_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-10}
    theirs = scipy_minimize(
        value_and_gradient, np.zeros(2 * d + 1), jac=True, bounds=bounds,
        method="L-BFGS-B", options=options | {"maxcor": 50},
    )  # fmt: skip
    return theirs.fun, theirs.x[:d] - theirs.x[d : 2 * d], theirs.x[-1]


@pytest.mark.parametrize(("weight", "shards"), [(0.004, 1), (0.02, 2)])
def test_l1_with_a_free_intercept_is_matched_to_six_digits(weight, shards):
    value, w, b = split_variables(*standardised(), weight)
    method = dbjax.OWLQN({"b": 0.0, "w": weight})
    with jax.enable_x64(True):
        run = logistic_regression(
            breast_cancer_loss, method=method, tolerance=1e-8, shards=shards
        )
    assert run.status in (Status.CONVERGED, Status.SMALL_STEP)
    np.testing.assert_allclose(run.value, value, 1e-8)
    np.testing.assert_allclose(run.params["w"], w, atol=1e-3 * np.abs(w).max())
    np.testing.assert_allclose(run.params["b"], b, 1e-3)
    zeros = np.asarray(run.params["w"]) == 0
    assert zeros.any() and np.abs(w[zeros]).max() < 1e-5, "exactly 0, and rightly so"


@pytest.mark.parametrize("shards", [2])
def test_bounds_are_matched_to_scipy(shards):
    from scipy.optimize import minimize as scipy_minimize

    x, y = standardised()

    def value_and_gradient(z):
        margins = y * (x @ z[1:] + z[0])
        slope = -y / (1 + np.exp(margins)) / len(y)
        value = np.mean(np.logaddexp(0, -margins)) + 0.5 * z[1:] @ z[1:] / len(y)
        g = np.concatenate([[slope.sum()], x.T @ slope + z[1:] / len(y)])
        return value, g

    lower, upper = np.full(31, -0.6), np.full(31, 0.3)
    lower[0], upper[0] = -np.inf, 0.2
    lower[5], upper[5] = 0.1, 0.1  # held
    theirs = scipy_minimize(
        value_and_gradient, np.clip(np.zeros(31), lower, upper), jac=True,
        bounds=list(zip(lower, upper, strict=True)), method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-11},
    )  # fmt: skip
    method = dbjax.BoxLBFGS(
        {"b": lower[0], "w": lower[1:]}, {"b": upper[0], "w": upper[1:]}
    )
    with jax.enable_x64(True):
        run = logistic_regression(
            ridge_loss, method=method, tolerance=1e-8, shards=shards
        )
    assert run.status in (Status.CONVERGED, Status.SMALL_STEP)
    np.testing.assert_allclose(run.value, theirs.fun, 1e-10)
    ours = np.concatenate([[run.params["b"]], run.params["w"]])
    np.testing.assert_allclose(ours, theirs.x, atol=1e-5)
    assert (lower <= ours).all() and (ours <= upper).all()


# Whoever computes what.


def drawn(seed):
    """Settings that must not change where a run goes."""
    random = np.random.default_rng(seed)
    split = str(random.choice(["even", "leaf"]))
    return {
        "shards": int(random.integers(1, 4 if split == "even" else 3)),
        "split": split,
        "replicas": int(random.choice([1, 2, 5, 30])),
        "portion_size": int(random.choice([1, 5, 7, EXAMPLES])),
        "push_every": int(random.choice([1, 3, 100])),
        "copies": int(random.choice([1, 2, 4])),
        "strategy": str(random.choice(["backups", "portions", "static"])),
    }


@pytest.fixture(scope="module")
def singles():
    """What one replica and one shard do with the whole batch, by method."""
    return {}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("runtime", ["Emulated", "Threads"])
@pytest.mark.parametrize("method", CONSTRAINED)
def test_sharded_threaded_and_single_runs_agree_to_rounding(
    method, runtime, seed, singles
):
    """In float64, so that nine iterations do not make much of the rounding."""
    settings = drawn([seed, len(runtime), *map(ord, method)])
    keywords = {"method": CONSTRAINED[method], "iterations": 9, "tolerance": 0}
    keywords["problem"] = PROBLEMS["logistic"]
    where = {
        "Emulated": dbjax.Emulated(dbjax.Cluster.heavy_tailed(), seed=seed),
        "Threads": dbjax.Threads(),
    }[runtime]
    with jax.enable_x64(True):
        keywords["params"] = jax.tree.map(lambda x: x.astype(float), PARAMS)
        if method not in singles:
            singles[method] = minimize(portion_size=EXAMPLES, **keywords)
        single = singles[method]
        run = minimize(runtime=where, **settings, **keywords)
    assert (run.iterations, run.evaluations) == (single.iterations, single.evaluations)
    assert run.status == single.status
    for mine, its in zip(run.trace.evaluations, single.trace.evaluations, strict=True):
        np.testing.assert_allclose(mine["value"], its["value"], 1e-9, err_msg=settings)
    assert_close(run.params, single.params, 1e-8)
    np.testing.assert_allclose(run.value, single.value, 1e-9)
    run.trace.validate()


@pytest.mark.parametrize("runtime", ["Emulated", "Threads"])
@pytest.mark.parametrize("batches", ["multi", "progressive"])
def test_changing_batches_agree_as_well(batches, runtime):
    rule = {
        "multi": dbjax.MultiBatch(4, overlap=0.5, seed=3),
        "progressive": dbjax.ProgressiveBatch(2, seed=3),
    }[batches]
    where = {"Emulated": None, "Threads": dbjax.Threads()}[runtime]
    keywords = {"batches": rule, "method": LBFGS, "portion_size": 2, "iterations": 12}
    with jax.enable_x64(True):
        keywords["params"] = jax.tree.map(lambda x: x.astype(float), PARAMS)
        single = minimize(**keywords)
        run = minimize(runtime=where, shards=2, replicas=4, push_every=2, **keywords)
    assert run.evaluations == single.evaluations
    assert run.info.portions_evaluated == single.info.portions_evaluated
    assert_close(run.params, single.params, 1e-8)
    run.trace.validate()


# Bounds, penalties and walls.


def test_no_point_outside_the_box_is_ever_evaluated():
    """There the loss is not a number: a single look would end up in the values."""
    lower, upper = -0.3, np.float32(0.4)

    def walled(params, batch):
        inside = jnp.stack(
            [(lower <= x).all() & (x <= upper).all() for x in jax.tree.leaves(params)]
        )
        return jnp.where(inside.all(), problems.squares_loss(params, batch), jnp.nan)

    seen = []
    data = SQUARES.data()
    run = minimize(
        loss_fn=walled, data=data, method=dbjax.BoxLBFGS(lower, upper, memory_size=5),
        params=jax.tree.map(lambda x: x + 7, PARAMS),  # begins outside
        iterations=60, eval_fn=lambda p, i, t: seen.append(flat(p)) or {},
    )  # fmt: skip
    assert run.status in (Status.CONVERGED, Status.SMALL_STEP)
    # A search that met a NaN would have shortened its step: none did.
    assert run.evaluations <= run.iterations + 8
    points = np.array(seen)
    assert (points >= lower).all() and (points <= upper).all()
    at_bound = (points[-1] == np.float32(lower)) | (points[-1] == upper)
    assert 2 <= at_bound.sum() < at_bound.size


def test_penalised_coefficients_end_at_exactly_zero_and_the_value_counts_them():
    run = minimize(method=dbjax.OWLQN({"b": 0.0, "w": 0.6}), iterations=80)
    assert run.status in (Status.CONVERGED, Status.SMALL_STEP)
    zeros = np.asarray(run.params["w"]) == 0
    assert 0 < zeros.sum() < zeros.size
    want = value_at(SQUARES, run.params, dbjax.OWLQN({"b": 0.0, "w": 0.6}))
    np.testing.assert_allclose(run.value, want, 1e-5)
    # A minimum: the slope along a zero coefficient is within the penalty.
    g = jax.grad(problems.squares_loss)(run.params, SQUARES.arrays)
    assert np.abs(np.asarray(g["w"]))[zeros].max() <= 0.6 + 1e-3
    np.testing.assert_allclose(
        np.asarray(g["w"])[~zeros], -0.6 * np.sign(run.params["w"])[~zeros], atol=1e-3
    )


def walled_by(outside):
    """Steep, with a wall not far from the minimum."""

    def loss(params, batch):
        value = 100 * problems.squares_loss(params, batch)
        return jnp.where(jnp.abs(params["w"]).max() > 2.5, outside, value)

    return loss


# Made once, as are all that several tests share: so they are compiled once.
WALLED = {"nan": walled_by(np.nan), "infinity": walled_by(np.inf)}


@pytest.mark.parametrize("outside", WALLED)
@pytest.mark.parametrize("method", METHODS)
def test_a_wall_of_values_that_are_not_finite_shortens_the_step(method, outside):
    """The minimum lies near the wall, and the first step goes far beyond it."""

    run = minimize(loss_fn=WALLED[outside], method=METHODS[method], iterations=200)
    solution, value = least_squares()
    assert np.isfinite(run.value) and np.isfinite(flat(run.params)).all()
    np.testing.assert_allclose(run.value, 100 * value, 1e-3)


# Bad input.


@jax.custom_vjp
def backwards(x):
    """A number whose derivative has the wrong sign."""
    return x


backwards.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def wrong_sign(params, batch):
    return backwards(problems.squares_loss(params, batch))


def half_wrong(params, batch):
    half = {"b": params["b"], "w": backwards(params["w"])}
    return problems.squares_loss(half, batch)


def constant(params, batch):
    return 3.0 + 0.0 * problems.squares_loss(params, batch)


def infinite(params, batch):
    return problems.squares_loss(params, batch) + jnp.inf


def infinitely_steep(params, batch):
    """The value is finite, and the root's derivative at 0 is not."""
    return problems.squares_loss(params, batch) + jnp.sqrt(jnp.sum(params["w"] * 0))


@pytest.mark.parametrize("method", CONSTRAINED)
def test_a_gradient_of_the_wrong_sign_is_reported_and_nothing_moves(method):
    run = minimize(loss_fn=wrong_sign, method=CONSTRAINED[method], iterations=50)
    assert run.status == Status.INCONSISTENT
    assert_same_bits(run.params, jax.tree.map(jnp.asarray, PARAMS))
    np.testing.assert_allclose(run.value, value_at(SQUARES, PARAMS), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_at_odds_with_the_value_ends_honestly_at_the_best_point(method):
    """Most of the coefficients are told to go the wrong way."""
    run = minimize(loss_fn=half_wrong, method=METHODS[method], iterations=100)
    assert run.status in (
        Status.INCONSISTENT,
        Status.SEARCH_FAILED,
        Status.SMALL_STEP,
        Status.LIMIT,
    )
    values = [row["value"] for row in run.trace.evaluations]
    assert run.value <= values[0] and run.value <= min(values) * (1 + 1e-5)
    assert np.isfinite(flat(run.params)).all()


@pytest.mark.parametrize("batches", [dbjax.FullBatch(), dbjax.ProgressiveBatch(2)])
@pytest.mark.parametrize("method", [name for name in CONSTRAINED if name != "l1"])
def test_a_constant_loss_has_converged(method, batches):
    run = minimize(loss_fn=constant, method=CONSTRAINED[method], batches=batches)
    assert (run.status, run.value) == (Status.CONVERGED, 3.0)
    assert run.iterations <= 4, "no longer than the batch takes to grow"
    assert_same_bits(run.params, jax.tree.map(jnp.asarray, PARAMS))


@pytest.mark.parametrize("where", ["value", "gradient", "params", "data"])
@pytest.mark.parametrize("method", ["gradient descent", "lbfgs", "l1", "bounds"])
def test_a_start_that_is_not_finite_is_said_and_given_back(method, where):
    losses = {"value": infinite, "gradient": infinitely_steep}
    loss = losses.get(where, problems.squares_loss)
    params, arrays = PARAMS, {"x": X, "y": Y}
    if where == "params":
        params = PARAMS | {"b": np.array([np.nan, 1], np.float32)}
    if where == "data":
        arrays["y"] = np.where(np.arange(EXAMPLES) == 11, np.inf, Y[:, 0])[:, None]
        arrays["y"] = arrays["y"].astype(np.float32)
    data = dbjax.from_arrays(arrays, batch_size=1, portion_size=7)
    run = minimize(loss_fn=loss, params=params, data=data, method=CONSTRAINED[method])
    assert run.status == Status.NOT_FINITE
    assert run.iterations == 0
    if where != "params":
        assert_same_bits(run.params, jax.tree.map(jnp.asarray, PARAMS))


def test_no_iterations_give_the_start_and_its_value():
    run = minimize(iterations=0)
    assert (run.status, run.iterations, run.evaluations) == (Status.LIMIT, 0, 1)
    np.testing.assert_allclose(run.value, value_at(SQUARES, PARAMS), 1e-6)
    assert_same_bits(run.params, jax.tree.map(jnp.asarray, PARAMS))


def test_a_start_at_the_minimum_has_converged_at_once():
    solution = jax.tree.map(lambda x: x.astype(np.float32), least_squares()[0])
    run = minimize(params=solution, tolerance=1e-4)
    assert (run.status, run.iterations) == (Status.CONVERGED, 0)


def test_a_portion_larger_than_the_batch_is_the_batch():
    run = minimize(portion_size=10 * EXAMPLES, iterations=3)
    assert run.trace.header["portions"] == 1
    np.testing.assert_allclose(
        run.value, minimize(portion_size=7, iterations=3).value, 1e-5
    )


class Portions:
    """Data made of the arrays given."""

    def __init__(self, *lengths):
        self.num_portions = len(lengths)
        self.lengths = lengths

    def portion(self, i):
        return {"x": X[: self.lengths[i]], "y": Y[: self.lengths[i]]}


MESH = dbjax.make_mesh(data=1)


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"method": "LBFGS"}, TypeError, "method"),
        ({"method": dbjax.LBFGS}, TypeError, "method"),
        ({"batches": 3}, TypeError, "batches"),
        ({"batches": dbjax.MultiBatch(9)}, ValueError, "portions=9.*only 4"),
        ({"batches": dbjax.ProgressiveBatch(9)}, ValueError, "portions=9.*only 4"),
        ({"data": Portions()}, ValueError, "no examples"),
        ({"data": Portions(0)}, ValueError, "no examples"),
        ({"data": Portions(3, 0, 2)}, ValueError, "portion 1"),
        ({"data": {"x": X, "y": Y}}, TypeError, "num_portions.*dict"),
        ({"loss_fn": 3}, TypeError, "loss_fn"),
        ({"loss_fn": lambda p, b: p["w"]}, ValueError, "scalar"),
        ({"loss_fn": lambda p, b: (p["w"].sum(), 0)}, ValueError, "has_aux"),
        ({"has_aux": True}, ValueError, "has_aux"),
        ({"params": {"w": np.arange(3)}}, (TypeError, ValueError), "w"),
        ({"params": {}}, (TypeError, ValueError), "param"),
        ({"replicas": 0}, ValueError, "replicas"),
        ({"shards": 0}, ValueError, "shards"),
        ({"shards": 2.5}, (TypeError, ValueError), "shards"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"tolerance": -1e-3}, ValueError, "tolerance"),
        ({"tolerance": math.nan}, ValueError, "tolerance"),
        ({"push_every": 0}, ValueError, "push_every"),
        ({"copies": 0}, ValueError, "copies"),
        ({"strategy": "fast"}, ValueError, "strategy.*backups.*fast"),
        ({"split": "rows"}, ValueError, "split"),
        ({"rules": [("w", None)]}, ValueError, "rules.*mesh"),
        ({"mesh": MESH, "rules": [("no", None)]}, ValueError, "rules"),
        ({"mesh": MESH, "shards": 2}, ValueError, "shards=2"),
        ({"mesh": 8}, TypeError, "mesh"),
        ({"runtime": "threads"}, (TypeError, ValueError), "runtime"),
        ({"eval_fn": 3}, (TypeError, ValueError), "eval_fn"),
        ({"eval_every": 0}, ValueError, "eval_every"),
        ({"checkpoint_dir": 3}, (TypeError, ValueError), "checkpoint_dir"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every"),
        ({"seed": "x"}, (TypeError, ValueError), "seed"),
        ({"method": dbjax.BoxLBFGS(1.0, -1.0)}, ValueError, "cross"),
        ({"method": dbjax.BoxLBFGS(np.nan, 1.0)}, ValueError, "cross"),
        ({"method": dbjax.BoxLBFGS({"w": 1.0})}, ValueError, "lower does not fit"),
        ({"method": dbjax.OWLQN(np.ones(3))}, ValueError, "l1 does not fit"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_errors_that_name_them(keywords, error, match):
    with pytest.raises(error, match=match):
        minimize(**keywords)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dbjax.LBFGS(memory_size=0), "memory_size=0"),
        (lambda: dbjax.LBFGS(memory_size=-3), "memory_size=-3"),
        (lambda: dbjax.LBFGS(memory_size=2.5), "memory_size=2.5"),
        (lambda: dbjax.LBFGS(history_dtype=jnp.int32), "history_dtype"),
        (lambda: dbjax.OWLQN(-0.1), "l1=-0.1"),
        (lambda: dbjax.OWLQN({"w": np.array([0.1, -1.0])}), "l1"),
        (lambda: dbjax.OWLQN(np.nan), "l1=nan"),
        (lambda: dbjax.OWLQN(0.1, memory_size=0), "memory_size=0"),
        (lambda: dbjax.BoxLBFGS(0.0, 1.0, memory_size=-1), "memory_size=-1"),
        (lambda: dbjax.ConjugateGradient(eta=0.0), "eta=0.0"),
        (lambda: dbjax.MultiBatch(1), "portions=1"),
        (lambda: dbjax.MultiBatch(4, overlap=0.6), "overlap=0.6"),
        (lambda: dbjax.ProgressiveBatch(1), "portions=1"),
        (lambda: dbjax.ProgressiveBatch(theta=0.0), "theta=0.0"),
        (lambda: dbjax.ProgressiveBatch(growth=1.0), "growth=1.0"),
    ],
)
def test_wrong_settings_are_errors_at_construction(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


# What a loss may be.


def test_a_loss_with_aux_is_as_good_as_one_without():
    plain = minimize(iterations=6)
    run = minimize(
        loss_fn=lambda p, b: (problems.squares_loss(p, b), {"n": b["x"].shape[0]}),
        has_aux=True, iterations=6,
    )  # fmt: skip
    assert_close(run.params, plain.params, 1e-6)


@pytest.mark.parametrize("runtime", [None, dbjax.Threads()])
def test_a_portions_key_stays_the_same_for_all_of_the_run(runtime):
    """Or the loss would be another function at every step, and never converge."""

    def loss(params, batch, key):
        noise = jax.random.normal(key, batch["y"].shape)
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - noise) ** 2)

    keywords = {"loss_fn": loss, "rng": True, "iterations": 60, "replicas": 3}
    run = minimize(runtime=runtime, tolerance=1e-4, **keywords)
    assert run.status == Status.CONVERGED
    # The portions' keys are folded from the seed and the portion's number.
    key, data = jax.random.key(0), SQUARES.data()
    noise = [
        jax.random.normal(jax.random.fold_in(key, i), data.portion(i)["y"].shape)
        for i in range(data.num_portions)
    ]
    design = np.concatenate([np.ones((EXAMPLES, 1)), X], 1)
    solution = np.linalg.lstsq(design, np.concatenate(noise), rcond=None)[0]
    assert_close(run.params, {"b": solution[0], "w": solution[1:]}, 1e-3)
    other = minimize(runtime=runtime, seed=1, **keywords)
    assert not np.allclose(flat(other.params), flat(run.params), atol=1e-2)


@pytest.mark.parametrize(
    ("method", "shards"),
    [("lbfgs", 2), ("conjugate gradient", 1), ("l1", 2), ("bounds", 1)],
)
def test_leaves_of_several_dtypes_and_scalars(method, shards):
    """Each vector keeps the parameters' dtypes; half precision does what it can."""
    params = {
        "b": jnp.zeros(OUTPUTS := Y.shape[1], jnp.bfloat16),
        "scale": jnp.ones(()),
        "w": [jnp.zeros((X.shape[1], OUTPUTS))],
    }

    def loss(params, batch):
        out = batch["x"] @ params["w"][0] + params["b"]
        residual = params["scale"] * out - batch["y"]
        return jnp.mean(residual**2) + 0.01 * (params["scale"] - 1) ** 2

    bounds = {"lower": {"b": -1.0, "scale": 0.9, "w": -0.4}, "upper": 1.5}
    some = {"l1": dbjax.OWLQN(0.01), "bounds": dbjax.BoxLBFGS(**bounds)}
    method = some.get(method, METHODS.get(method))
    run = minimize(
        loss_fn=loss, params=params, method=method, iterations=40, shards=shards
    )
    dtypes = [x.dtype for x in jax.tree.leaves(run.params)]
    assert dtypes == [x.dtype for x in jax.tree.leaves(params)]
    values = [row["value"] for row in run.trace.evaluations]
    assert values[-1] < 0.35 * values[0]
    assert np.isfinite(flat(jax.tree.map(np.float32, run.params))).all()


def test_a_half_precision_history_is_close():
    full = minimize(iterations=30)
    half = minimize(
        method=dbjax.LBFGS(5, history_dtype=jnp.bfloat16), iterations=30, tolerance=1e-3
    )
    np.testing.assert_allclose(half.value, full.value, 1e-4)


def test_parameters_are_copied_and_never_written_to():
    mine = {name: x.copy() for name, x in PARAMS.items()}
    seen = []

    def look(params, iteration, time):
        seen.append((params, jax.tree.map(np.array, params)))
        return {}

    run = minimize(params=mine, iterations=5, eval_fn=look)
    mine["w"][:] = 7.0
    assert not (np.asarray(run.params["w"]) == 7).any()
    for params, then in seen:
        assert_same_bits(params, then)


# The record.


@pytest.mark.parametrize("runtime", [None, dbjax.Threads()])
@pytest.mark.parametrize("every", [None, 4])
def test_eval_fn_sees_its_iterations_and_the_end_once_each(runtime, every):
    calls = []

    def look(params, iteration, time):
        calls.append((iteration, time))
        return {"loss": problems.squares_loss(params, SQUARES.arrays)}

    run = minimize(
        iterations=10, tolerance=0, eval_fn=look, eval_every=every, runtime=runtime,
        replicas=2,
    )  # fmt: skip
    rows = run.trace.evaluations
    assert [row["step"] for row in rows] == list(range(run.iterations + 1))
    want = list(range(11)) if every is None else [0, 4, 8, 10]
    assert [iteration for iteration, _ in calls] == want
    for iteration, time in calls:
        row = rows[iteration]
        assert (row["step"], row["time"]) == (iteration, time)
        np.testing.assert_allclose(row["loss"], row["value"], 1e-5)
    assert all("loss" in row for row in rows) == (every is None)
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[0] > 0
    assert rows[-1]["evaluations"] == run.evaluations
    assert rows[-1]["portions"] == run.info.portions_evaluated


@pytest.mark.parametrize("runtime", [None, dbjax.Threads()])
def test_counts_and_trace_tell_the_same_story(runtime, tmp_path):
    run = minimize(
        iterations=4, tolerance=0, replicas=3, shards=2, push_every=2, runtime=runtime
    )
    trace, info = run.trace, run.info
    trace.validate()
    portions = SQUARES.data().num_portions
    assert info.examples == EXAMPLES
    assert info.portions_evaluated == portions * run.evaluations
    pushed = trace.count[(trace.kind == dbjax.trace.PUSH) & (trace.shard == 0)]
    assert pushed.sum() == portions * run.evaluations
    assert len(pushed) == info.portions.pushes
    kept = (trace.kind == dbjax.trace.COMPUTE) & (trace.status == dbjax.trace.TAKEN)
    assert kept.sum() == portions * run.evaluations
    assert info.method == {"skipped": 0, "damped": 0, "restarts": 0}
    assert info.resumed_at == 0
    norm = np.linalg.norm(
        flat(jax.grad(problems.squares_loss)(run.params, SQUARES.arrays))
    )
    np.testing.assert_allclose(info.gradient_norm, norm, 1e-3)
    trace.save(tmp_path / "trace.npz")
    again = dbjax.Trace.load(tmp_path / "trace.npz")
    assert trace.diff(again) is None and again.evaluations == trace.evaluations
    trace.to_perfetto(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_an_emulated_run_says_what_each_strategy_would_take():
    cluster = dbjax.Cluster(step_time=1.0, slow=dbjax.Slow(0.2, 10.0))
    keywords = {"iterations": 5, "portion_size": 1, "replicas": 8, "tolerance": 0}
    runs = {
        strategy: minimize(
            strategy=strategy, runtime=dbjax.Emulated(cluster, seed=2), **keywords
        )
        for strategy in ("backups", "portions", "static")
    }
    seconds = runs["backups"].info.seconds_per_iteration
    assert set(seconds) == set(runs)
    assert seconds["backups"] <= seconds["portions"] <= seconds["static"]
    for strategy, run in runs.items():
        mine = run.info.seconds_per_iteration
        assert mine == pytest.approx(seconds)
        per_iteration = run.trace.evaluations[-1]["time"] / run.iterations
        assert mine[strategy] == pytest.approx(per_iteration)


@pytest.mark.parametrize("method", CONSTRAINED)
def test_a_seed_gives_the_same_trace_and_the_same_bits(method):
    cluster = dbjax.Cluster(failures=dbjax.Failures(uptime=6.0, downtime=1.0))
    first, second = (
        minimize(
            method=CONSTRAINED[method], iterations=6, replicas=4, shards=2,
            push_every=2, portion_size=3, runtime=dbjax.Emulated(cluster, seed=5),
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.trace.diff(second.trace) is None
    assert first.trace.evaluations == second.trace.evaluations
    assert first.trace.header == second.trace.header
    assert first.info == second.info
    assert_same_bits(first.params, second.params)


def test_headers_name_no_address():
    """They are the same in every process."""
    from dbjax.optim.linesearch import backtracking

    method = dbjax.LBFGS(5, linesearch=backtracking(decrease=0.1))
    run = minimize(method=method, iterations=1)
    assert " at 0x" not in json.dumps(run.trace.header)


def test_a_warm_start_goes_on_from_downpour():
    before = dbjax.downpour.train(
        SQUARES.loss_fn, PARAMS, dbjax.from_arrays(SQUARES.arrays, batch_size=4),
        optimizer=dbjax.adagrad(0.2), replicas=2, steps=60,
    )  # fmt: skip
    run = minimize(params=before.params, iterations=40)
    start = run.trace.evaluations[0]["value"]
    assert start < 0.5 * value_at(SQUARES, PARAMS)
    np.testing.assert_allclose(run.value, least_squares()[1], 1e-4)


def warm(rate, steps):
    return dbjax.downpour.train(
        SQUARES.loss_fn, PARAMS, dbjax.from_arrays(SQUARES.arrays, batch_size=4),
        optimizer=optax.sgd(rate), replicas=2, steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize("method", CONSTRAINED)
def test_a_warm_start_that_goes_nowhere_is_none_to_the_bit(method):
    """Nothing but the values of the parameters goes from one to the other."""
    keywords = {"method": CONSTRAINED[method], "iterations": 5, "replicas": 2}
    alone = minimize(**keywords)
    run = minimize(params=warm(rate=0.0, steps=7).params, **keywords)
    assert_same_bits(run.params, alone.params)
    assert run.value == alone.value and run.evaluations == alone.evaluations


@pytest.mark.parametrize("steps", [1, 10, 40])
@pytest.mark.parametrize("method", METHODS)
def test_after_a_warm_start_the_value_is_not_worse(method, steps):
    before = warm(rate=0.1, steps=steps).params
    run = minimize(params=before, method=METHODS[method], iterations=3)
    start = run.trace.evaluations[0]["value"]
    np.testing.assert_allclose(start, value_at(SQUARES, before), 1e-5)
    assert run.value < start < value_at(SQUARES, PARAMS)
