"""A line search as an optax transformation: the step along the updates it is given."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbjax import trees
from dbjax.optim.linesearch import words
from dbjax.optim.linesearch.words import LineSearch
from dbjax.typing import Gradients, Params


class ScaleByLineSearchState(NamedTuple):
    """What the last search found.

    Attributes:
        learning_rate: the step taken; 0 if the search found none.
        value: the value after the step, inf at first; with `grad` for
            `optax.value_and_grad_from_state`.
        grad: the gradient after the step.
        aux: the auxiliary output of the last evaluation; None without one.
        status: int32, a constant of `dbjax.optim.linesearch.words`.
        evaluations: int32, evaluations of the last search.
    """

    learning_rate: jax.Array
    value: jax.Array
    grad: Gradients
    aux: Any
    status: jax.Array
    evaluations: jax.Array


def scale_by_line_search(
    search: LineSearch, *, aux: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Scale the updates by the step that a line search finds.

    `update` needs `params`, and as keywords `value`, `grad` and `value_fn`, the value
    and the gradient at the parameters and the function that gave them; what else it
    takes by name is handed on from `update`'s keywords. The first step tried is 1. If
    none is found the updates are zero, and `status` says why.

    Inside jit the search is a `while_loop`; outside it is a Python loop that calls
    `value_fn` as often as needed and compiles nothing.

    Args:
        search: such as `more_thuente()`.
        aux: the auxiliary output that `value_fn` returns beside the value, or anything
          of its structure, shapes and dtypes; None if it returns the value alone.

    Returns:
        An optax transformation with state `ScaleByLineSearchState`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from dbjax.optim.linesearch import more_thuente, scale_by_line_search
        >>> f = lambda x: jnp.sum((x - 3.0) ** 2)
        >>> rule = optax.chain(optax.sgd(0.5), scale_by_line_search(more_thuente()))
        >>> params = jnp.zeros(2)
        >>> value, grad = jax.value_and_grad(f)(params)
        >>> updates, state = rule.update(
        ...     grad, rule.init(params), params, value=value, grad=grad, value_fn=f
        ... )
        >>> print(optax.apply_updates(params, updates), optax.tree.get(state, "value"))
        [3. 3.] 0.0
    """
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), aux)

    def init(params: Params) -> ScaleByLineSearchState:
        small = _value_dtype(params)
        return ScaleByLineSearchState(
            learning_rate=trees.replicated(params, 1.0, small),
            value=trees.replicated(params, jnp.inf, small),
            grad=jax.tree.map(trees.zeros_like, params),
            aux=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template),
            status=trees.replicated(params, words.SEARCHING, jnp.int32),
            evaluations=trees.replicated(params, 0, jnp.int32),
        )

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = None,
        grad: Gradients | None = None,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, ScaleByLineSearchState]:
        for name, given in (
            ("params", params),
            ("value", value),
            ("grad", grad),
            ("value_fn", value_fn),
        ):
            if given is None:
                raise ValueError(f"a line search needs {name}=: pass it to update")
        assert value_fn is not None
        extra_args = _accepted(value_fn, extra_args)
        evaluate = jax.value_and_grad(value_fn, has_aux=aux is not None)
        value = jnp.asarray(value)

        def at(step: jax.Array) -> tuple[jax.Array, Any, Gradients, jax.Array]:
            moved = jax.tree.map(
                lambda p, u: p + u.astype(p.dtype), params, scaled(step)
            )
            value_now, grad_now = evaluate(moved, **extra_args)
            value_now, aux_now = value_now if aux is not None else (value_now, None)
            value_now = jnp.asarray(value_now, value.dtype)
            return value_now, aux_now, grad_now, trees.vdot(updates, grad_now)

        def scaled(step: jax.Array) -> Gradients:
            return jax.tree.map(
                lambda u: jnp.where(step == 0, 0, step.astype(_real(u)) * u), updates
            )

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            line = carry[0]
            value_now, aux_now, grad_now, slope = at(line.trial)
            return search.step(line, value_now, slope), value_now, aux_now, grad_now

        carry = search.init(value, trees.vdot(updates, grad), 1.0), value, state.aux
        carry = *carry, jax.tree.map(jnp.asarray, grad)
        if isinstance(jnp.zeros([]), jax.core.Tracer) or _traced((carry, params)):
            carry = jax.lax.while_loop(lambda c: ~c[0].done, body, carry)
        else:
            while not carry[0].done:
                carry = body(carry)
        line, value, aux_now, grad = carry
        after = ScaleByLineSearchState(
            line.trial, value, grad, aux_now, line.status, line.evaluations
        )
        after = jax.tree.map(lambda x, old: x.astype(old.dtype), after, state)
        return scaled(line.trial), after

    return optax.GradientTransformationExtraArgs(init, update)


def _value_dtype(params: Params) -> jnp.dtype:
    leaves = jax.tree.leaves(params)
    return jnp.finfo(jnp.result_type(*leaves) if leaves else jnp.float32).dtype


def _real(x: jax.Array) -> jnp.dtype:
    return jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).dtype


def _accepted(value_fn: Any, extra_args: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the function takes."""
    parameters = inspect.signature(value_fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return extra_args
    names = {p.name for p in parameters}
    return {name: x for name, x in extra_args.items() if name in names}


def _traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
