import argparse

import jax
import numpy as np
import pytest

from experiments import bench_classic
from experiments.classic_problems import PROBLEMS, tau_of, value_at

# From the source: the value at the standard start (of those that are stated, or follow
# by hand), and a minimiser where there is a simple one.
AT_START = {1: 24.2, 4: 999998000003.0, 13: 215.0, 14: 19192.0, 20: 30.0, 21: 242.0}
AT_START |= {2: 400.5, 5: 14.203125, 7: 2500.0, 22: 1075.0, 25: 2198551.1625}
AT_START |= {23: 148032.56535, 30: 21.0, 31: 360.0, 32: 50.0, 33: 8658670.0}
MINIMISERS = {
    1: [1, 1],
    2: [5, 4],
    3: [1.098159329699759e-5, 9.106146739867318],
    4: [1e6, 2e-6],
    5: [3, 0.5],
    7: [1, 0, 0],
    11: [50, 25, 1.5],
    12: [1, 10, 1],
    13: [0] * 4,
    14: [1] * 4,
    18: [1, 10, 1, 5, 4, 3],
    21: [1] * 20,
    22: [0] * 20,
    25: [1] * 10,
    26: [0] * 10,
    27: [1] * 10,
    32: [-1] * 10,
}
# The minima as published, six digits each.
PUBLISHED = {
    2: 48.9842,
    6: 124.362,
    8: 8.21487e-3,
    9: 1.12793e-8,
    10: 87.9458,
    15: 3.07505e-4,
    16: 85822.2,
    17: 5.46489e-5,
    18: 5.65565e-3,
    19: 4.01377e-2,
    20: 2.28767e-3,
    23: 7.08765e-5,
    24: 2.93660e-4,
    26: 2.79506e-5,
    35: 3.51687e-3,
}
by_number = {problem.number: problem for problem in PROBLEMS}


def test_all_problems_of_the_source_in_its_order():
    assert list(by_number) == list(range(1, 36))
    for problem in PROBLEMS:
        assert list(problem.minima) == sorted(problem.minima)
    for number, low in PUBLISHED.items():  # rounded, or cut off
        gap = np.abs(np.array(by_number[number].minima) - low).min()
        assert gap <= 5e-6 * low


@pytest.mark.parametrize("number", AT_START)
def test_value_at_the_start(number):
    problem = by_number[number]
    value = value_at(problem, problem.start)
    np.testing.assert_allclose(value, AT_START[number], rtol=1e-9)


@pytest.mark.parametrize("number", MINIMISERS)
def test_value_at_a_known_minimiser(number):
    problem = by_number[number]
    assert len(MINIMISERS[number]) == len(problem.start)
    value = value_at(problem, tuple(MINIMISERS[number]))
    np.testing.assert_allclose(value, problem.minima[0], rtol=1e-12, atol=1e-20)
    assert problem.solved(value, tau_of("float64", strict=True))


def test_solved_is_measured_from_the_nearest_minimum():
    problem = by_number[2]
    low = problem.minima[1]
    assert problem.solved(1e-9, 1e-8) and not problem.solved(1e-7, 1e-8)
    assert problem.solved(low, 1e-8)
    assert not problem.solved(low * (1 - 1e-4), 1e-8)
    assert not problem.solved(low * (1 + 1e-4), 1e-8)
    assert not problem.solved(np.nan, 1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_keep_the_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        for problem in PROBLEMS:
            start = jax.ShapeDtypeStruct((len(problem.start),), dtype)
            value, grad = jax.eval_shape(jax.value_and_grad(problem.fun), start)
            assert (value.dtype, value.shape) == (dtype, ())
            assert (grad.dtype, grad.shape) == (start.dtype, start.shape)


def counts(outcomes):
    return sum(x.solved for x in outcomes), sum(x.strictly for x in outcomes)


def test_in_float64_all_are_solved_and_scipy_solves_no_more():
    found = bench_classic.compare("float64", ["dbjax", "scipy"])
    assert counts(found["dbjax"]) == (35, 35)
    assert counts(found["scipy"]) <= (35, 35)
    pairs = zip(found["dbjax"], found["scipy"], strict=True)
    needed = [(a.evaluations, b.evaluations) for a, b in pairs if b.solved]
    mine, theirs = map(sum, zip(*needed, strict=True))
    assert mine <= 1.02 * theirs


def test_in_float32_all_but_one_are_solved():
    """Meyer's values drown in rounding, whoever minimises them."""
    outcomes = bench_classic.compare("float32", ["dbjax"])["dbjax"]
    missed = [p.name for p, x in zip(PROBLEMS, outcomes, strict=True) if not x.solved]
    assert missed in ([], ["Meyer"])
    assert counts(outcomes)[1] >= 34


def test_the_section_counts_and_names_every_problem(monkeypatch):
    monkeypatch.setattr(bench_classic, "PEERS", {"float64": ("scipy",)})
    rows = bench_classic.problems(argparse.Namespace(quick=True))
    assert len(rows) == 1 + 3
    assert rows[0].value == "3 solved, 3 strictly"
    assert rows[0].baseline.startswith("scipy: ")
    assert all(row.baseline.startswith("scipy ") for row in rows[1:])
    assert all(len(row.cells) == 7 for row in rows)
