"""L-BFGS as dbjax, optax, jaxopt and scipy run it best, up to the same loss."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

import dbjax
from experiments.bench_lbfgs_problems import Problem

LIMIT = 2_000  # iterations


class Outcome(NamedTuple):
    """Where a run ended.

    Attributes:
      value: the loss.
      iterations: steps taken.
      evaluations: of loss and gradient together.
    """

    value: Any
    iterations: Any
    evaluations: Any


Solver: TypeAlias = Callable[[], Outcome]


def of_dbjax(problem: Problem, memory_size: int) -> Solver:
    """One compiled loop."""
    rule = dbjax.lbfgs(memory_size=memory_size)
    return _optax_loop(
        problem, rule, lambda state: optax.tree.get(state, "evaluations")
    )


def of_optax(problem: Problem, memory_size: int) -> Solver:
    """The same loop; a loop in Python around a compiled step is no faster."""
    rule = optax.lbfgs(memory_size=memory_size)
    return _optax_loop(
        problem, rule, lambda state: optax.tree.get(state, "num_linesearch_steps")
    )


def _optax_loop(
    problem: Problem, rule: Any, spent: Callable[[Any], jax.Array]
) -> Solver:
    value_and_grad = optax.value_and_grad_from_state(problem.loss)

    def step(carry: Any) -> Any:
        params, state, outcome = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = rule.update(
            *(grad, state, params),
            **{"value": value, "grad": grad, "value_fn": problem.loss},
        )
        outcome = Outcome(
            optax.tree.get(state, "value"),
            outcome.iterations + 1,
            outcome.evaluations + spent(state),
        )
        return optax.apply_updates(params, updates), state, outcome

    def goes_on(carry: Any) -> jax.Array:
        outcome = carry[2]
        return (outcome.value > problem.target) & (outcome.iterations < LIMIT)

    @jax.jit
    def run(params: Any) -> Any:
        start = Outcome(jnp.asarray(jnp.inf), jnp.int32(0), jnp.int32(1))
        carry = params, rule.init(params), start
        params, _, outcome = jax.lax.while_loop(goes_on, step, carry)
        return params, outcome

    return lambda: run(problem.params)[1]


def of_jaxopt(problem: Problem, memory_size: int) -> Solver:
    """Its own compiled loop, which cannot stop at a loss: how long is found before."""

    def solver(limit: int) -> Any:
        return jaxopt.LBFGS(
            problem.loss, history_size=memory_size, maxiter=limit, tol=0.0,
            implicit_diff=False,
        )  # fmt: skip

    stepwise, params = solver(LIMIT), problem.params
    update, state = jax.jit(stepwise.update), jax.jit(stepwise.init_state)(params)
    while state.value > problem.target and state.iter_num < LIMIT:
        params, state = update(params, state)
    run = jax.jit(solver(int(state.iter_num)).run)

    def solve() -> Outcome:
        state = run(problem.params).state
        return Outcome(state.value, state.iter_num, state.num_fun_eval)

    return solve


def of_scipy(problem: Problem, memory_size: int) -> Solver:
    """L-BFGS-B, in float64 as it must be, with loss and gradient compiled."""
    start, tree_of = ravel_pytree(problem.params)
    evaluate = jax.jit(jax.value_and_grad(lambda x: problem.loss(tree_of(x))))

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = evaluate(x.astype(np.float32))
        return float(value), np.asarray(grad, np.float64)

    def stop(intermediate_result: Any) -> None:
        if intermediate_result.fun <= problem.target:
            raise StopIteration

    def solve() -> Outcome:
        found = scipy.optimize.minimize(
            value_and_grad, np.asarray(start, np.float64), jac=True, callback=stop,
            method="L-BFGS-B",
            options={
                "maxcor": memory_size, "maxiter": LIMIT, "maxfun": 10 * LIMIT,
                "ftol": 0, "gtol": 0,
            },
        )  # fmt: skip
        return Outcome(found.fun, found.nit, found.nfev)

    return solve


SIDES = {
    make.__name__.removeprefix("of_"): make
    for make in (of_dbjax, of_optax, of_jaxopt, of_scipy)
}
