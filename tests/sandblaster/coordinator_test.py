"""The coordinator walks the textbook's path, on scalars, which can be saved any time."""

import json

import jax
import numpy as np
import pytest

import dbjax
from dbjax.optim.linesearch import backtracking, more_thuente
from dbjax.optim.status import Status
from dbjax.sandblaster.messages import Combine, Dots, Evaluate, Reached
from dbjax.sandblaster.plain import decode, encode
from dbjax.sandblaster.scalars import exactly
from tests import textbook
from tests.sandblaster.driving import Driven, Portions

PORTIONS = Portions()
MIXED = Portions(seed=1, mixed=0.5)  # OWL-QN switches coefficients off here
L1 = np.array([0.0, 0.5, 0.5, 2.0, 4.0, 0.5])
METHODS = {
    "gradient descent": dbjax.GradientDescent(),
    "conjugate gradient": dbjax.ConjugateGradient(),
    "lbfgs": dbjax.LBFGS(memory_size=3),
    "owlqn": dbjax.OWLQN(L1, memory_size=3),
    "box": dbjax.BoxLBFGS(0.2, 1.1, memory_size=3),
}
BATCHES = {
    "full": dbjax.FullBatch(),
    "multi": dbjax.MultiBatch(4),
    "progressive": dbjax.ProgressiveBatch(2),
}


def search_of(machine):
    """A line search as a function."""

    def search(phi, value, slope, step):
        state = exactly(machine.init)(np.float64(value), np.float64(slope), step)
        while not state.done:
            assert state.trial > 0, "the textbook knows no failure"
            state = exactly(machine.step)(state, *phi(float(state.trial)))
        return float(state.trial)

    return search


def textbook_path(method, iterations):
    wolfe, armijo = more_thuente, backtracking
    arguments = MIXED.loss, MIXED.start
    if method == "lbfgs":
        search = search_of(wolfe(value_rtol=2e-15))
        return textbook.lbfgs_path(*arguments, search, 3, iterations)
    if method == "owlqn":
        search = search_of(armijo(value_rtol=2e-15))
        return textbook.owlqn_path(*arguments, search, L1, 3, iterations)
    if method == "gradient descent":
        search = search_of(armijo(value_rtol=2e-15))
        return textbook.barzilai_borwein_path(*arguments, search, iterations)
    search = search_of(wolfe(curvature=0.1, value_rtol=2e-15))
    return textbook.conjugate_gradient_path(*arguments, search, iterations)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "box"])
def test_walks_the_path_of_the_textbook(method):
    iterations = 7
    driven = Driven(
        MIXED, METHODS[method], dbjax.FullBatch(), iterations=iterations
    ).run()
    want = textbook_path(method, iterations)
    assert driven.state.iterations == iterations
    np.testing.assert_allclose(driven.path, want, rtol=1e-8, atol=1e-10)
    moved = np.abs(np.diff(want, axis=0)).max(1)
    assert moved.min() > 1e-6, "or nothing is compared"
    if method == "owlqn":
        assert (want[-1] == 0).any() and (
            (want[-1] == 0) == (driven.path[-1] == 0)
        ).all()


def drive(method, batches, **keywords):
    return Driven(PORTIONS, METHODS[method], BATCHES[batches], **keywords).run()


def through_json(state):
    """Save and restore, as a checkpoint does."""
    return decode(json.loads(json.dumps(encode(state))))


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_saved_between_any_two_messages_it_makes_the_same_requests(method, batches):
    plain = drive(method, batches)
    saved = drive(method, batches, between=through_json)
    assert saved.requests == plain.requests
    assert json.dumps(encode(saved.state)) == json.dumps(encode(plain.state))
    np.testing.assert_array_equal(saved.path, plain.path)
    assert through_json(tuple(plain.requests)) == tuple(plain.requests)


def leaves(value):
    """All that a state holds, whatever it is nested in."""
    if isinstance(value, dict):
        return [
            leaf for item in value.items() for part in item for leaf in leaves(part)
        ]
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_its_state_holds_scalars_only(method, batches):
    """Fewer than a vector of 600 has coefficients."""

    def look(state):
        held = leaves(state)
        assert not any(isinstance(leaf, jax.Array) for leaf in held)
        assert sum(np.size(leaf) for leaf in held) < 300
        return state

    of = dbjax.OWLQN(0.5, memory_size=3) if method == "owlqn" else METHODS[method]
    portions = Portions(size=600)
    Driven(portions, of, BATCHES[batches], between=look, iterations=4).run()


@pytest.mark.parametrize("batches", ["full", "multi"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_costs_one_round_and_one_combination(method, batches):
    """A round of inner products and an evaluation for each step tried, `d` once."""
    driven = drive(method, batches, tolerance=0.0, iterations=6)
    kinds = []
    for request in driven.requests:
        if isinstance(request, Reached):
            kinds.append("reached")
        elif isinstance(request, Combine) and request.into in ("d", "x+"):
            kinds.append(request.into)
        elif isinstance(request, Evaluate | Dots):
            kinds.append(type(request).__name__)
    if batches != "full":
        assert kinds.pop() == "Evaluate", "all portions, at the end"
    # Where the last trial was not the best one it is evaluated once more.
    text = " ".join(kinds).split("reached")
    assert text[0].split() == ["Evaluate", "Dots"]
    assert len(text) == driven.state.iterations + 2 and not text[-1].strip()
    for iteration in text[1:-1]:
        first, *rest = iteration.split()
        assert first == "d"
        assert len(rest) % 3 == 0 and rest == ["x+", "Evaluate", "Dots"] * (
            len(rest) // 3
        )
    rounds = [request for request in driven.requests if isinstance(request, Dots)]
    assert len({request.pairs for request in rounds}) == 1, "compiled once"
    m = 3
    most = {"gradient descent": 2, "conjugate gradient": 6}.get(method, 4 * m + 8)
    if (method, batches) == ("lbfgs", "full"):
        most = 2 * m + 6
    assert len(rounds[0].pairs) <= most


def test_an_inner_product_that_is_not_finite_never_enters_the_history():
    """The first steps tried lie beyond a wall; only what is finite is learned from."""

    class Walled(Portions):
        def one(self, p, x):
            value, g = super().one(p, x)
            if np.abs(x - self.start).max() > 0.25:
                return np.nan, np.full_like(g, np.nan)
            return value, g

    portions = Walled()
    driven = Driven(portions, METHODS["lbfgs"], dbjax.FullBatch(), iterations=5).run()
    assert all(np.isfinite(leaf).all() for leaf in leaves(driven.state.method))
    assert np.isfinite(driven.path).all()
    assert portions.loss(driven.path[-1])[0] < portions.loss(portions.start)[0]
    rows = [
        driven.get(name)
        for name in driven.vectors.names()
        if name[0] in "sy" and name[1:].isdigit()
    ]
    assert len(rows) == 6 and np.isfinite(rows).all()


def test_a_direction_that_does_not_descend_is_the_gradient_instead():
    """A history that lies is dropped, and the drop counted."""
    lies = iter([False, False, True] + [False] * 100)

    class Lying(Driven):
        def carry_out(self, request):
            reply = super().carry_out(request)
            if isinstance(request, Dots) and next(lies):
                pairs = list(request.pairs)
                reply[pairs.index(("s+", "y+"))] = 1e-9  # while yy is not small
                reply[pairs.index(("s+", "g+"))] *= -1e6
            return reply

    driven = Lying(PORTIONS, METHODS["lbfgs"], dbjax.FullBatch(), iterations=40).run()
    assert (
        driven.state.method.restarts
        + driven.state.method.damped
        + driven.state.method.skipped
        >= 1
    )
    best = PORTIONS.loss(driven.path[-1])
    assert np.linalg.norm(best[1]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_has_come_to_rest_stops(method):
    """No tolerance is small enough for rounding, so what stops it is the value."""
    driven = drive(method, "full", iterations=400)
    assert driven.state.status in (Status.SMALL_STEP, Status.CONVERGED)
    assert driven.state.iterations < 200
    values = [PORTIONS.loss(x)[0] for x in driven.path]
    if method != "owlqn":
        assert values[-1] <= min(values) * (1 + 1e-14)


def test_what_cannot_be_saved_is_an_error():
    with pytest.raises(TypeError, match="cannot be saved"):
        encode({"a": object()})
