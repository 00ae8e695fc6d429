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
            (value, grad), spent = evaluate(params), 1
            failed, verdict = jnp.zeros([], bool), RUNNING
        else:
            value, grad, spent = search.value, search.grad, search.evaluations
            value = value.astype(loop.value.dtype)
            failed = search.learning_rate == 0
            verdict = _verdict(search, state, loop.value)
        size = _largest(grad)
        finite = jnp.isfinite(value) & jnp.isfinite(size)
        closed = finite & (size <= gradient_tolerance)
        floor = jnp.maximum(value_tolerance, 10 * jnp.finfo(value.dtype).eps)
        falls = finite & (value < loop.fallen - floor * jnp.abs(loop.fallen))
        stalled = jnp.where(falls, 0, loop.stalled + spent)
        flatter = (value == loop.best[1]) & (size < loop.best[2])
        better = closed | finite & ((value < loop.best[1]) | flatter)
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
                (failed & loop.failed, verdict),
                (stalled >= PATIENCE, SMALL_STEP),
                (iterations >= max_iterations, LIMIT),
            ),
            iterations=iterations,
            evaluations=loop.evaluations + spent,
            fallen=jnp.where(falls, value, loop.fallen),
            stalled=stalled,
            failed=failed | jnp.asarray(no_history),
        )

    params = jax.tree.map(jnp.asarray, params)
    value, grad = evaluate(params)
    size = _largest(grad)
    first = state is None  # the first direction is then the gradient
    state = optimizer.init(params) if first else state
    no_history = _found(state, ScaleByLBFGSState) is None
    start = _Loop(
        params=params,
        value=value,
        grad=grad,
        best=(params, value, size),
        state=state,
        status=_first(
            (~(jnp.isfinite(value) & jnp.isfinite(size)), NOT_FINITE),
            (size <= gradient_tolerance, CONVERGED),
            (jnp.asarray(max_iterations) <= 0, LIMIT),
        ),
        iterations=jnp.zeros([], jnp.int32),
        evaluations=jnp.ones([], jnp.int32),
        fallen=value,
        stalled=jnp.zeros([], jnp.int32),
        failed=jnp.asarray(first or no_history),
    )
    end = jax.lax.while_loop(lambda loop: loop.status == RUNNING, body, start)
    return MinimizeResult(
        *end.best, end.status, end.iterations, end.evaluations, end.state
    )


def _found(state: Any, kind: type) -> Any:
    """The one part of a state that is of this kind, else None."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    return found[0] if len(found) == 1 else None


def _verdict(search: ScaleByLineSearchState, state: Any, value: jax.Array) -> jax.Array:
    """The status to end with if this search has found nothing along the gradient."""
    direction = _found(state, ScaleByLBFGSState)
    promise = jnp.inf if direction is None else direction.products.slope
    lost = promise <= words.noise(value)
    return _first(
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
