"""Which portions an iteration sees, and whose gradients a pair is made of."""

import itertools
import math

import numpy as np
import pytest

import dbjax
from dbjax.optim.status import Status
from dbjax.sandblaster.messages import Evaluate, Evaluated
from tests.sandblaster.driving import Driven, Portions

PLAIN_CODE = True

LBFGS = dbjax.LBFGS(memory_size=3)


def evaluated(rule, state):
    """Answer what the rule asks for with ones."""
    count = sum(len(group) for _, group in rule.trial(state))
    return Evaluated((1,) * count, (1.0,) * count, (1.0,) * count)


# All portions.


def test_the_full_batch_is_all_portions_every_time():
    rule = dbjax.FullBatch()
    state = rule.init(5)
    for _ in range(3):
        assert rule.trial(state) == (("g+", (0, 1, 2, 3, 4)),)
        state, seen = rule.see(state, Evaluated((3, 1, 1, 1, 2), (1.0, 5.0, 0, 0, 4.0)))
        assert seen.value == seen.batch == (3 + 5 + 8) / 8
        assert rule.grow(state, 0.0, 0.0) == () and rule.whole(state)
        state, value, _ = rule.take(state)
        assert value == 2.0


# Samples.


def samples(rule, portions, count):
    """The groups of successive samples, by name."""
    state = rule.init(portions)
    for _ in range(count):
        yield dict(rule.trial(state))
        state, _ = rule.see(state, evaluated(rule, state))
        state, _, _ = rule.take(state)


SIZES = [
    (2, 2, 0.5),
    (3, 2, 0.5),
    (4, 4, 0.25),
    (4, 4, 0.5),
    (5, 4, 0.5),
    (7, 5, 0.3),
    (12, 4, 0.25),
    (30, 8, 0.5),
    (31, 31, 0.1),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("portions", "size", "overlap"), SIZES)
def test_successive_samples_share_what_a_pair_is_made_of(portions, size, overlap, seed):
    """Also where one epoch ends and another begins, in the midst of a sample."""
    rule = dbjax.MultiBatch(size, overlap=overlap, seed=seed)
    shares = max(1, round(overlap * size))
    seen = list(samples(rule, portions, 60))
    assert "k-" not in seen[0]
    for sample in seen:
        listed = [p for group in sample.values() for p in group]
        assert len(listed) == len(set(listed)) == size, "no portion twice"
        assert set(listed) <= set(range(portions))
        assert len(sample["k+"]) == shares
    for before, after in itertools.pairwise(seen):
        assert after["k-"] == before["k+"]


@pytest.mark.parametrize(("portions", "size", "overlap"), SIZES)
def test_every_portion_is_drawn_epoch_by_epoch(portions, size, overlap):
    rule = dbjax.MultiBatch(size, overlap=overlap, seed=1)
    new = size - max(1, round(overlap * size))
    epochs = 2 * math.ceil(portions / new)  # first in one of them, last in the next
    seen = [set().union(*sample.values()) for sample in samples(rule, portions, 40)]
    for first in range(40 - epochs):
        assert set().union(*seen[first : first + epochs]) == set(range(portions))
    other = dbjax.MultiBatch(size, overlap=overlap, seed=2)
    if portions > 4:
        assert list(samples(other, portions, 9)) != list(samples(rule, portions, 9))


def test_a_pair_is_the_change_of_the_overlaps_gradient():
    """By hand: the portions' gradients in numpy, at both points, of the overlap only."""
    portions = Portions(portions=11)
    driven = Driven(portions, LBFGS, dbjax.MultiBatch(4, overlap=0.5, seed=4))
    checked = []

    def look(driven):
        request = [r for r in driven.requests if isinstance(r, Evaluate)][-1]
        groups = dict(request.groups)
        sample = [p for group in groups.values() for p in group]
        x, after = driven.get("x"), driven.get("x+")
        batch = portions.of(sample, after)[1]
        np.testing.assert_allclose(driven.get("g+"), batch, 1e-12)
        if "k-" in groups:
            want = portions.of(groups["k-"], after)[1] - portions.of(groups["k-"], x)[1]
            np.testing.assert_allclose(driven.get("y+"), want, 1e-9, 1e-12)
            checked.append(np.abs(want).max())

    driven.looks.append(look)
    driven.run()
    assert len(checked) >= 8 and min(checked) > 1e-3


def test_samples_get_down_to_the_noise_and_say_that_it_was_the_limit():
    """The value at the end is that of all portions."""
    portions = Portions(noise=0.05)
    driven = Driven(portions, LBFGS, dbjax.MultiBatch(6), iterations=30).run()
    assert driven.state.status == Status.LIMIT and driven.state.iterations == 30
    value = portions.loss(driven.path[-1])[0]
    np.testing.assert_allclose(driven.state.batch, value, 1e-12)
    full = Driven(portions, LBFGS, dbjax.FullBatch(), iterations=30).run()
    assert value < full.state.batch + 0.05 * (portions.loss(portions.start)[0])


# A growing batch.


def noise(portions, squares, examples, gradient_square, total):
    """`(1 - P/N) Var / P`, the variance with Bessel's correction."""
    mean_square = np.average(squares, weights=examples)
    variance = (mean_square - gradient_square) * portions / (portions - 1)
    return variance * (1 - portions / total) / portions


@pytest.mark.parametrize("theta", [0.3, 0.9, 3.0])
@pytest.mark.parametrize("noise_level", [0.1, 1.0])
def test_the_batch_grows_where_its_gradient_is_mostly_noise(theta, noise_level):
    """If and only if the test fails; to where it would hold, by no more than `growth`."""
    portions = Portions(portions=60, noise=noise_level)
    rule = dbjax.ProgressiveBatch(3, theta=theta, growth=2.5)
    driven = Driven(portions, LBFGS, rule, iterations=60, tolerance=1e-8)
    asked, grow = [], dbjax.ProgressiveBatch.grow

    def recording(state, square, size):
        assert square == size or not size, "nothing stands beside the loss here"
        groups = grow(rule, state, square, size)
        asked.append((state, size, groups))
        return groups

    object.__setattr__(rule, "grow", recording)
    driven.run()
    grown = 0
    for state, size, groups in asked:
        assert state.count == len(state.squares)
        if not size or state.count == 60:
            continue
        test = noise(state.count, state.squares, state.examples, size, 60)
        assert bool(groups) == (test > theta**2 * size)
        if groups:
            ((_, joined),) = groups
            end = state.count + len(joined)
            grown += 1
            variance = test * state.count / (1 - state.count / 60)
            holds = np.arange(1, 61)
            holds = holds[
                variance * (1 / holds - 1 / 60) <= theta**2 * size * (1 + 1e-9)
            ]
            most = min(60, math.floor(2.5 * state.count))
            assert end == max(state.count + 1, min(holds[0], most))
    assert grown, "or nothing is tested"
    counts = [state.count for state, _, _ in asked]
    assert counts == sorted(counts), "it never shrinks"
    assert driven.state.status == Status.CONVERGED, "which only the whole batch can"
    assert driven.state.batches.count == 60
    np.testing.assert_allclose(
        driven.state.batch, portions.loss(driven.path[-1])[0], 1e-12
    )
    assert np.linalg.norm(portions.loss(driven.path[-1])[1]) <= 1e-8


def test_what_has_joined_is_in_the_gradient_and_not_in_the_pair():
    """`y` is of the batch that both points have seen, `g` of the batch to come."""
    portions = Portions(portions=40)
    driven = Driven(portions, LBFGS, dbjax.ProgressiveBatch(4, seed=2), iterations=12)
    batch, joined = [], 0

    def look(driven):
        nonlocal batch, joined
        request = [r for r in driven.requests if isinstance(r, Evaluate)][-1]
        ((into, group),) = request.groups
        before, joins = list(batch), into == "f"
        batch = before + list(group) if joins else list(group)
        assert len(set(batch)) == len(batch)
        x, after = driven.get("x"), driven.get("x+")
        np.testing.assert_allclose(
            driven.get("g+"), portions.of(batch, after)[1], 1e-10, 1e-12
        )
        if driven.path:
            pair = before if joins else batch
            want = portions.of(pair, after)[1] - portions.of(pair, x)[1]
            np.testing.assert_allclose(driven.get("y+"), want, 1e-8, 1e-12)
            joined += joins

    driven.looks.append(look)
    driven.run()
    assert joined >= 2


def test_a_batch_without_noise_stays_small_until_there_is_nothing_left_to_learn():
    portions = Portions(portions=50, noise=0.0)
    portions.curvature[:] = portions.curvature[0]
    rule = dbjax.ProgressiveBatch(2)
    driven = Driven(portions, LBFGS, rule, iterations=6).run()
    assert driven.state.batches.count == 2
    driven = Driven(portions, LBFGS, rule, iterations=100, tolerance=1e-6).run()
    assert driven.state.status == Status.CONVERGED
