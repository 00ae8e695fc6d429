"""A loop around an optax transformation, with a stopping rule and honest statuses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbjax import trees
from dbjax.optim.lbfgs import ScaleByLBFGSState, lbfgs
from dbjax.optim.linesearch import ScaleByLineSearchState, words
from dbjax.optim.status import (
    CONVERGED,
    INCONSISTENT,
    LIMIT,
    NOT_FINITE,
    RUNNING,
    SEARCH_FAILED,
    SMALL_STEP,
    status_of,
)
from dbjax.typing import Gradients, Params

PATIENCE = 30  # evaluations without a lower value before the loop gives up


class MinimizeResult(NamedTuple):
    """Where `minimize` ended.

    Attributes:
        params: the best found, the last if converged; never worse than the start.
        value: the value there.
        gradient_norm: the largest gradient entry there, in absolute value.
        status: int32, a code of `dbjax.optim.status`; see `message`.
        iterations: int32, steps taken.
        evaluations: int32, of value and gradient together, the first included.
        state: the optimizer's last state, to go on from.
    """

    params: Params
    value: jax.Array
    gradient_norm: jax.Array
    status: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    state: Any

    @property
    def message(self) -> str:
        """Why it ended, in words; for a single concrete result, not a batch."""
        return status_of(self.status).message


class _Loop(NamedTuple):
    params: Params
    value: jax.Array
    grad: Gradients
    best: tuple[Params, jax.Array, jax.Array]
    state: Any
    status: jax.Array
    iterations: jax.Array
    evaluations: jax.Array
    fallen: jax.Array  # the value when it last fell by more than rounding
    stalled: jax.Array  # evaluations since then
    failed: jax.Array  # whether the last search found nothing


class _Rule(NamedTuple):
    max_iterations: Any
    gradient_tolerance: Any
    value_tolerance: Any


def minimize(
    value_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    optimizer: optax.GradientTransformation | None = None,
    state: Any = None,
    max_iterations: int = 1000,
    gradient_tolerance: float = 1e-5,
    value_tolerance: float = 0.0,
) -> MinimizeResult:
    """Minimise a function until its gradient is small, or nothing more can be gained.

    The loop is one `while_loop`: call it inside `jax.jit` to compile it once for many
    starts, and under `vmap` for a batch of problems, where each ends on its own.

    Args:
        value_fn: `value_fn(params, *args) -> scalar`.
        params: where to start.
        *args: handed on to `value_fn`.
        optimizer: any optax transformation; `dbjax.lbfgs()` if not given.
        state: of the optimizer, as an earlier result has it, to go on from; its
          history is kept.
        max_iterations: steps at most.
        gradient_tolerance: stop when no gradient entry exceeds this.
        value_tolerance: a value counts as fallen only if it falls by more than this
          share of its absolute value, and by more than rounding; after 30 evaluations
          in which it has not, the loop stops.

    Returns:
        The best parameters found, and why the loop stopped.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax.optim import minimize
        >>> result = minimize(lambda w: jnp.sum((w - 1.0) ** 4), jnp.zeros(3))
        >>> print(result.params.round(1), result.message)
        [1. 1. 1.] converged: no gradient entry exceeds gradient_tolerance
    """
    for name, number in (
        ("max_iterations", max_iterations),
        ("gradient_tolerance", gradient_tolerance),
        ("value_tolerance", value_tolerance),
    ):
        if not isinstance(number, jax.core.Tracer) and not number >= 0:
            raise ValueError(f"{name}={number}: allowed are numbers from 0")
    rule = _Rule(max_iterations, gradient_tolerance, value_tolerance)
    optimizer = optax.with_extra_args_support(optimizer or lbfgs())

    def value_of(params: Params) -> jax.Array:
        return value_fn(params, *args)

    evaluate = jax.value_and_grad(value_of)

    def body(loop: _Loop) -> _Loop:
        updates, state = optimizer.update(
            loop.grad,
            loop.state,
            loop.params,
            value=loop.value,
            grad=loop.grad,
            value_fn=value_of,
        )
        params = optax.apply_updates(loop.params, updates)
        search = _found(state, ScaleByLineSearchState)
        if search is None:
            return _after(loop, rule, params, state, *evaluate(params))
        value = search.value.astype(loop.value.dtype)
        return _after(loop, rule, params, state, value, search.grad)

    params = jax.tree.map(jnp.asarray, params)
    start = _start(rule, params, *evaluate(params))
    if state is None:
        start = start._replace(state=optimizer.init(params))
    else:  # the first direction has a history, and the gradient is still to be tried
        start = start._replace(state=state, failed=jnp.zeros([], bool))
    end = jax.lax.while_loop(lambda loop: loop.status == RUNNING, body, start)
    return MinimizeResult(
        *end.best, end.status, end.iterations, end.evaluations, end.state
    )


def _start(rule: _Rule, params: Params, value: jax.Array, grad: Gradients) -> _Loop:
    size = _largest(grad)
    return _Loop(
        params=params,
        value=value,
        grad=grad,
        best=(params, value, size),
        state=None,
        status=_first(
            (~(jnp.isfinite(value) & jnp.isfinite(size)), NOT_FINITE),
            (size <= rule.gradient_tolerance, CONVERGED),
            (jnp.asarray(rule.max_iterations) <= 0, LIMIT),
        ),
        iterations=jnp.zeros([], jnp.int32),
        evaluations=jnp.ones([], jnp.int32),
        fallen=value,
        stalled=jnp.zeros([], jnp.int32),
        failed=jnp.ones([], bool),
    )


def _after(
    loop: _Loop,
    rule: _Rule,
    params: Params,
    state: Any,
    value: jax.Array,
    grad: Gradients,
) -> _Loop:
    """Take in where an update has led."""
    search = _found(state, ScaleByLineSearchState)
    spent = 1 if search is None else search.evaluations
    failed = jnp.zeros([], bool) if search is None else search.learning_rate == 0
    size = _largest(grad)
    finite = jnp.isfinite(value) & jnp.isfinite(size)
    closed = finite & (size <= rule.gradient_tolerance)
    floor = jnp.maximum(rule.value_tolerance, 10 * jnp.finfo(value.dtype).eps)
    falls = finite & (value < loop.fallen - floor * jnp.abs(loop.fallen))
    stalled = jnp.where(falls, 0, loop.stalled + spent)
    flatter = (value == loop.best[1]) & (size < loop.best[2])
    better = closed | finite & ((value < loop.best[1]) | flatter)
    verdict = jnp.asarray(_verdict(search, state, loop))
    iterations = loop.iterations + 1
    return _Loop(
        params=params,
        value=value,
        grad=grad,
        best=trees.where(better, (params, value, size), loop.best),
        state=state,
        status=_first(
            (closed, CONVERGED),
            (~finite, NOT_FINITE),
            (failed & (verdict != RUNNING), verdict),
            (stalled >= PATIENCE, SMALL_STEP),
            (iterations >= rule.max_iterations, LIMIT),
        ),
        iterations=iterations,
        evaluations=loop.evaluations + spent,
        fallen=jnp.where(falls, value, loop.fallen),
        stalled=stalled,
        failed=failed,
    )


def _found(state: Any, kind: type) -> Any:
    """The one part of a state that is of this kind, else None."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    return found[0] if len(found) == 1 else None


def _verdict(search: Any, state: Any, loop: _Loop) -> Any:
    """The status to end with, if any, once a search has found nothing."""
    if search is None:
        return RUNNING
    direction = _found(state, ScaleByLBFGSState)
    if direction is None:
        again, promise = jnp.zeros([], bool), jnp.inf
    else:  # after a direction with a history, the gradient is tried
        again, promise = ~loop.failed, direction.products.slope
    lost = promise <= words.noise(loop.value)
    return _first(
        (again, RUNNING),
        (search.status == words.INCONSISTENT, INCONSISTENT),
        (search.status == words.NOT_FINITE, NOT_FINITE),
        (lost | (search.status == words.LOST), SMALL_STEP),
        (jnp.ones([], bool), SEARCH_FAILED),
    )


def _first(*cases: tuple[jax.Array, Any]) -> jax.Array:
    """The status of the first condition that holds."""
    status = jnp.asarray(RUNNING, jnp.int32)
    for condition, constant in reversed(cases):
        status = jnp.where(condition, jnp.asarray(constant, jnp.int32), status)
    return status


def _largest(grad: Gradients) -> jax.Array:
    leaves = [jnp.max(jnp.abs(g), initial=0.0) for g in jax.tree.leaves(grad)]
    return jnp.max(jnp.stack([x.astype(trees.scalar_dtype()) for x in leaves]))
