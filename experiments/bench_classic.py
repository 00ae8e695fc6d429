"""The classic test problems: who solves how many, and with how many evaluations.

A section of `bench_lbfgs`. Every solver runs with its defaults and without a tolerance,
until it stops by itself, up to 1,000 iterations; those that never stop, until the
gradient is zero or 2,000 evaluations are spent. An evaluation is one of value and
gradient together. All are counted in the same way, where the function is called, and a
problem is solved if the returned point is good (`classic_problems` says when), and was
found within 2,000 evaluations.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from dbjax.optim import minimize
from experiments.bench_table import Options, Row
from experiments.classic_problems import PROBLEMS, Problem, tau_of

ITERATIONS, EVALUATIONS, BLOCK = 1000, 2000, 256
PEERS = {"float64": ("scipy",), "float32": ("optax", "jaxopt")}

Solver = Callable[[np.ndarray, int], Any]  # (start, index of the problem) -> the point


class Outcome(NamedTuple):
    """How one solver fared on one problem.

    Attributes:
      solved: to half of the digits.
      strictly: to three quarters.
      evaluations: until the first point that is good to half of the digits; None if
        there was none.
      spent: evaluations until the end.
      value: in float64, at the end.
    """

    solved: bool
    strictly: bool
    evaluations: int | None
    spent: int
    value: float


class Course:
    """The problems as one function, so that a solver compiles once for all of them.

    Points are padded with zeros to one length, which changes a solver's steps by no
    more than rounding.
    """

    def __init__(self, dtype: str, problems: Sequence[Problem] = PROBLEMS):
        """Lay it out in a dtype."""
        self.dtype, self.problems = dtype, problems
        self.size = max(len(problem.start) for problem in problems)
        self.visited: list[np.ndarray] = []
        self._exact = jax.jit(
            lambda points, i: jax.lax.map(lambda x: self.fun(x, i), points)
        )

    def fun(self, x: jax.Array, index: Any) -> jax.Array:
        """The value."""
        branches = [
            lambda x, problem=problem: problem.fun(x[: len(problem.start)])
            for problem in self.problems
        ]
        return jax.lax.switch(index, branches, x)

    def counted(self, x: jax.Array, index: Any) -> jax.Array:
        """The value, noting down where it was asked for."""
        # As bytes: the callback's thread may not have x64 on, and would round.
        raw = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint8)
        jax.experimental.io_callback(self.note, None, raw, ordered=True)
        return self.fun(x, index)

    def note(self, raw: Any) -> None:
        """Note down an evaluation at a point, given as bytes."""
        self.visited.append(np.array(raw).reshape(-1).view(self.dtype))

    def run(self, solver: Solver, index: int) -> Outcome:
        """Send a solver through one problem, and judge it in float64."""
        problem = self.problems[index]
        start = np.zeros(self.size, self.dtype)
        start[: len(problem.start)] = problem.start
        self.visited.clear()
        end = np.asarray(solver(start, index))
        jax.effects_barrier()
        value, *values = self._in_float64([end, *self.visited], index)
        values = values[:EVALUATIONS]
        half, more = tau_of(self.dtype), tau_of(self.dtype, strict=True)

        def first(tau: float) -> int | None:
            good = (k for k, v in enumerate(values, 1) if problem.solved(v, tau))
            return next(good, None)

        return Outcome(
            solved=problem.solved(value, half) and first(half) is not None,
            strictly=problem.solved(value, more) and first(more) is not None,
            evaluations=first(half),
            spent=len(self.visited),
            value=value,
        )

    def _in_float64(self, points: list[np.ndarray], index: int) -> list[float]:
        """The values, a block at a time, so that one program does for all."""
        blocks = np.zeros((-(-len(points) // BLOCK), BLOCK, self.size))
        blocks.reshape(-1, self.size)[: len(points)] = points
        with jax.enable_x64(True):
            values = [np.asarray(self._exact(block, index)) for block in blocks]
        return np.concatenate(values)[: len(points)].tolist()


def ours(course: Course) -> Solver:
    """`dbjax.optim.minimize`."""

    @jax.jit
    def solve(x: jax.Array, index: jax.Array) -> jax.Array:
        return minimize(
            *(course.counted, x, index),
            **dict(max_iterations=ITERATIONS, gradient_tolerance=0.0),
        ).params

    return solve


def of_scipy(course: Course) -> Solver:
    """L-BFGS-B, unbounded, which works in float64 whatever it is given."""
    value_and_grad = jax.jit(jax.value_and_grad(course.fun))
    limits = dict(maxiter=ITERATIONS, maxfun=EVALUATIONS, ftol=0, gtol=0)

    def solve(x: np.ndarray, index: int) -> np.ndarray:
        n = len(course.problems[index].start)

        def fun(some: np.ndarray) -> tuple[float, np.ndarray]:
            at = np.zeros_like(x)
            at[:n] = some
            course.note(at.view(np.uint8))
            value, grad = value_and_grad(at, index)
            return float(value), np.asarray(grad, np.float64)[:n]

        found = scipy.optimize.minimize(
            fun, x[:n], jac=True, method="L-BFGS-B", options=limits
        )
        return np.pad(found.x, (0, course.size - n))

    return solve


def of_optax(course: Course) -> Solver:
    """`optax.lbfgs()` in the loop of its documentation."""
    rule = optax.lbfgs()

    def step(x: Any, state: Any, index: Any) -> tuple[Any, ...]:
        def fun(x: jax.Array) -> jax.Array:
            return course.counted(x, index)

        value, grad = optax.value_and_grad_from_state(fun)(x, state=state)
        updates, state = rule.update(
            grad, state, x, value=value, grad=grad, value_fn=fun
        )
        found = [optax.tree.get(state, name) for name in ("value", "grad")]
        spent = optax.tree.get(state, "num_linesearch_steps")
        return optax.apply_updates(x, updates), state, *found, spent

    return _best_iterate(step, lambda x, index: rule.init(x))


def of_jaxopt(course: Course) -> Solver:
    """`jaxopt.LBFGS`, step by step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is no longer maintained
        import jaxopt
    solver = jaxopt.LBFGS(course.counted, maxiter=ITERATIONS, tol=0.0)

    def step(x: Any, state: Any, index: Any) -> tuple[Any, ...]:
        before = state.num_fun_eval
        x, state = solver.update(x, state, index)
        return x, state, state.value, state.grad, state.num_fun_eval - before

    return _best_iterate(step, solver.init_state)


def _best_iterate(step: Callable[..., Any], init: Callable[..., Any]) -> Solver:
    """A loop for solvers without an end of their own; the best iterate is returned."""

    @jax.jit
    def solve(x: jax.Array, index: jax.Array) -> jax.Array:
        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            x, state, best, value, _, iterations, spent = carry
            x, state, now, grad, more = step(x, state, index)
            best = jnp.where(now < value, x, best)
            value = jnp.where(now < value, now, value)
            return x, state, best, value, grad, iterations + 1, spent + more

        def goes_on(carry: tuple[Any, ...]) -> jax.Array:
            *_, grad, iterations, spent = carry
            within = (iterations < ITERATIONS) & (spent < EVALUATIONS)
            return within & jnp.any(grad != 0)

        high = jnp.asarray(jnp.inf, x.dtype)
        carry = x, init(x, index), x, high, jnp.ones_like(x), 0, 1
        return jax.lax.while_loop(goes_on, body, carry)[2]

    return solve


SOLVERS = {
    "dbjax": ours,
    "scipy": of_scipy,
    "optax": of_optax,
    "jaxopt": of_jaxopt,
}


def compare(
    dtype: str, names: Sequence[str], problems: Sequence[Problem] = PROBLEMS
) -> dict[str, list[Outcome]]:
    """Give what each solver makes of each problem."""
    found, course = {}, Course(dtype, problems)
    for name in names:
        with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
            if name == "jaxopt":
                warnings.simplefilter("ignore")
            solver = SOLVERS[name](course)
            found[name] = [course.run(solver, i) for i in range(len(problems))]
    return found


def problems(options: Options) -> list[Row]:
    """The counts, then the evaluations side by side."""
    chosen = PROBLEMS[:3] if options.quick else PROBLEMS
    rows, details = [], []
    for dtype, peers in PEERS.items():
        there = [name for name in peers if importlib.util.find_spec(name)]
        found = compare(dtype, ["dbjax", *there], chosen)
        rows += [_count(dtype, chosen, found, peer) for peer in there]
        details += _side_by_side(dtype, chosen, found)
    return rows + details


def _count(
    dtype: str, chosen: Sequence[Problem], found: dict[str, list[Outcome]], peer: str
) -> Row:
    mine, theirs = found["dbjax"], found[peer]
    pairs = [
        (a.evaluations, b.evaluations)
        for a, b in zip(mine, theirs, strict=True)
        if a.solved and b.solved
    ]
    needed = [sum(counts) for counts in zip(*pairs, strict=True)] or [0, 1]

    def solved(outcomes: list[Outcome]) -> str:
        half, more = (sum(column) for column in list(zip(*outcomes, strict=True))[:2])
        return f"{half} solved, {more} strictly"

    missed = {
        who: ", ".join(
            problem.name
            for problem, outcome in zip(chosen, found[who], strict=True)
            if not outcome.solved
        )
        for who in ("dbjax", peer)
    }
    notes = "; ".join(f"{who} misses {names}" for who, names in missed.items() if names)
    return Row(
        *("problems", f"{len(chosen)} classic problems, {dtype}", solved(mine)),
        baseline=f"{peer}: {solved(theirs)}",
        ratio=needed[0] / needed[1],
        notes=f"ratio: {needed[0]:,} to {needed[1]:,} evaluations on the {len(pairs)} "
        f"that both solve; {notes}".rstrip("; "),
    )


def _side_by_side(
    dtype: str, chosen: Sequence[Problem], found: dict[str, list[Outcome]]
) -> list[Row]:
    def text(outcome: Outcome) -> str:
        count = (
            outcome.evaluations if outcome.solved else f"unsolved, {outcome.value:.3g}"
        )
        return str(count)

    return [
        Row(
            *("problems", f"{problem.number}. {problem.name}, {dtype}"),
            value=f"{text(found['dbjax'][i])}",
            baseline=", ".join(
                f"{name} {text(outcomes[i])}"
                for name, outcomes in found.items()
                if name != "dbjax"
            ),
            notes="evaluations",
        )
        for i, problem in enumerate(chosen)
    ]
