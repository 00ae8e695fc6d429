"""Small problems that every batch method must solve, and ways to run them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dbjax
from dbjax.sandblaster import running
from dbjax.sandblaster.problem import make_problem
from tests.problems import flat

# Made once: what is compiled for a method's search serves all that are equal.
METHODS = {
    "gradient descent": dbjax.GradientDescent(),
    "conjugate gradient": dbjax.ConjugateGradient(),
    "lbfgs": dbjax.LBFGS(memory_size=5),
    "owlqn": dbjax.OWLQN(0.0, memory_size=5),
    "box": dbjax.BoxLBFGS(memory_size=5),
}
L1 = dbjax.OWLQN({"b": 0.0, "w": 0.03}, memory_size=5)
BOX = dbjax.BoxLBFGS({"b": -np.inf, "w": -0.3}, {"b": 0.1, "w": 0.4}, memory_size=5)
CONSTRAINED = METHODS | {"l1": L1, "bounds": BOX}


class Problem(NamedTuple):
    """A loss on examples, and what is known of its minimum.

    Attributes:
      loss_fn: the mean over a batch.
      params: where to begin.
      arrays: the examples.
      lowest: the loss at the minimum.
      enough: what a good method reaches soon, above `lowest`.
    """

    loss_fn: Any
    params: Any
    arrays: Any
    lowest: float
    enough: float

    def data(self, portion_size=7):
        return dbjax.from_arrays(self.arrays, batch_size=1, portion_size=portion_size)


# A sum of squares, as in `tests.problems`, but of one matrix with noise on the labels.
INPUTS, OUTPUTS, EXAMPLES = 5, 2, 24
_random = np.random.default_rng(0)
X = _random.standard_normal((EXAMPLES, INPUTS)).astype(np.float32)
Y = X @ _random.standard_normal((INPUTS, OUTPUTS)) + 0.5
Y = (Y + 0.3 * _random.standard_normal(Y.shape)).astype(np.float32)
PARAMS = {
    "b": np.zeros(OUTPUTS, np.float32),
    "w": np.zeros((INPUTS, OUTPUTS), np.float32),
}


def squares_loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def least_squares():
    """The solution in float64: `{"b": [O], "w": [I, O]}` and its mean square."""
    design = np.concatenate([np.ones((EXAMPLES, 1)), X], 1).astype(float)
    solution = np.linalg.lstsq(design, Y.astype(float), rcond=None)[0]
    value = np.mean((design @ solution - Y) ** 2)
    return {"b": solution[0], "w": solution[1:]}, float(value)


def logistic_loss(params, batch):
    scores = batch["x"] @ params["w"] + params["b"]
    signs = jnp.sign(batch["y"])
    penalty = 0.05 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    return jnp.mean(jnp.logaddexp(0, -signs * scores)) + penalty


def rosenbrock_loss(params, batch):
    """A term for each neighbour: `100 (x' - x^2)^2 + (1 - x)^2`, all 0 at ones."""
    x = jnp.concatenate([params["b"], params["w"].ravel()])
    x, after = x[batch["i"]], x[batch["i"] + 1]
    return jnp.mean(100 * (after - x**2) ** 2 + (1 - x) ** 2)


def network_loss(params, batch):
    """Three sigmoid units on exclusive or, with two inputs that are noise."""
    hidden = jax.nn.sigmoid(3 * batch["x"][:, :INPUTS] @ params["w"] + params["b"])
    scores = 6 * (hidden[:, 0] - hidden[:, 1])
    return jnp.mean(jnp.logaddexp(0, -batch["sign"] * scores))


_size = OUTPUTS + INPUTS * OUTPUTS
_start = jax.tree.map(lambda x: np.full_like(x, -0.5), PARAMS)
_bent = {"b": PARAMS["b"], "w": 0.1 * _random.standard_normal((INPUTS, OUTPUTS))}
_bent["w"] = _bent["w"].astype(np.float32)

PROBLEMS = {
    "squares": Problem(
        squares_loss, PARAMS, {"x": X, "y": Y}, least_squares()[1], 1e-6
    ),
    "logistic": Problem(
        logistic_loss, PARAMS, {"x": X, "y": Y}, 0.452437055, 1e-5
    ),
    "rosenbrock": Problem(
        rosenbrock_loss, _start, {"i": np.arange(_size - 1)}, 0.0, 1e-6
    ),
    "network": Problem(
        network_loss, _bent, {"x": X, "sign": np.sign(X[:, 0] + 0.5)}, 0.0, 0.05
    ),
}  # fmt: skip

SQUARES = PROBLEMS["squares"]


def minimize(problem=SQUARES, portion_size=7, **keywords):
    """`sandblaster.minimize` on a problem, whose parts keywords may replace."""
    loss_fn = keywords.pop("loss_fn", problem.loss_fn)
    params = keywords.pop("params", problem.params)
    data = keywords.pop("data", None) or problem.data(portion_size)
    return dbjax.sandblaster.minimize(loss_fn, params, data, **keywords)


def value_at(problem, params, method=None):
    """The function at a point, in float64 numpy where the loss allows it."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        value = float(problem.loss_fn(wide, problem.arrays))
    if isinstance(method, dbjax.OWLQN):
        weights = jax.tree.map(
            lambda weight, x: weight * np.abs(x).sum(), method.l1, params
        )
        value += float(sum(jax.tree.leaves(weights)))
    return value


def assert_close(got, want, tolerance):
    """Trees are equal but for a share of the largest coefficient."""
    got, want = flat(got), flat(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


class Wrapped:
    """Data whose `before(portion)` is called first, which may raise."""

    def __init__(self, before, data=None):
        self.before = before
        self.data = SQUARES.data() if data is None else data
        self.num_portions = self.data.num_portions

    def portion(self, i):
        self.before(i)
        return self.data.portion(i)


_made: dict[Any, Any] = {}


def compile_once(monkeypatch):
    """Let all runs of one loss share what `make_problem` compiles, whatever the data."""

    def shared(loss_fn, params, data, **keywords):
        key = loss_fn, *sorted(keywords.items()), jax.config.jax_enable_x64
        made = make_problem(loss_fn, params, data, **keywords)
        kept = _made.setdefault(key, made)
        return dataclasses.replace(kept, data=data, examples=made.examples)

    monkeypatch.setattr(running, "make_problem", shared)
