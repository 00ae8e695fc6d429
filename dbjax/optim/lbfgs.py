"""L-BFGS as an optax transformation: faster, guarded, and at home on sharded arrays.

The vectors are here, their scalars in `vector_free`. One update makes one round of
inner products (the whole history with one vector, so two matrix-vector products, and
five single ones), writes one row, and makes one combination. On sharded parameters the
round is one all-reduce.
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from dbjax import trees
from dbjax.optim import vector_free
from dbjax.optim.linesearch import (
    LineSearch,
    ScaleByLineSearchState,
    more_thuente,
    scale_by_line_search,
)
from dbjax.optim.vector_free import Products
from dbjax.typing import Gradients, Params

Scaling: TypeAlias = Literal["leaf", "whole"]


class ScaleByLBFGSState(NamedTuple):
    """What L-BFGS remembers; `m` is the memory size.

    Attributes:
        count: int32, updates so far.
        params: the parameters of the last update.
        updates: its gradient.
        s_history: leaves `[m, ...]`, differences of parameters; row `products.next`
            is the oldest.
        y_history: leaves `[m, ...]`, differences of gradients.
        products: all inner products of these that the next direction needs, and counts
            of pairs skipped and damped and of restarts.
    """

    count: jax.Array
    params: Params
    updates: Gradients
    s_history: Params
    y_history: Gradients
    products: Products


class LBFGSState(NamedTuple):
    """What `lbfgs(linesearch=None)` carries; see `ScaleByLBFGSState`.

    Attributes:
        count: int32, updates so far.
        value: always inf, as no value is known at the newest parameters.
        params: the parameters of the last update.
        grad: its gradient.
        s_history: leaves `[m, ...]`.
        y_history: leaves `[m, ...]`.
        products: the inner products.
    """

    count: jax.Array
    value: jax.Array
    params: Params
    grad: Gradients
    s_history: Params
    y_history: Gradients
    products: Products


def scale_by_lbfgs(
    memory_size: int = 10,
    scale_init_precond: bool = True,
    *,
    history_dtype: Any = None,
    scaling: Scaling = "whole",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the gradient by the L-BFGS approximation of the inverse Hessian.

    .. math::
      H_{j+1} = V_j^\top H_j V_j + \rho_j s_j s_j^\top, \quad
      V_j = I - \rho_j y_j s_j^\top, \quad \rho_j = 1 / s_j^\top y_j

    over the last `memory_size` pairs `s = w' - w` and `y = g' - g`, from `gamma I`, or
    from `gamma` times a number for each leaf (`vector_free` has which). A drop-in for
    `optax.scale_by_lbfgs`, with the same direction on the same pairs. A pair with too
    little curvature is damped or skipped and a direction that does not descend is
    replaced by the gradient, all counted in `state.products`; a gradient that is not
    finite passes through and never enters the history.

    Differences from float32 gradients are kept in float32; their inner products
    accumulate there too, the coefficients made from them in float64 where x64 is on.

    Args:
        memory_size: pairs to keep, at least 1.
        scale_init_precond: whether `gamma` is `s y / y y` of the newest pair (and
          `min(1, 1 / |g|)` before there is one); else it is 1.
        history_dtype: the dtype of the pairs, such as `jnp.bfloat16` for half the
          memory; that of the parameters (float32 for float16) if not given.
        scaling: `"whole"` for `gamma I`, as optax has it, or `"leaf"`, which suits
          networks and whatever else has leaves of very different scale.

    Returns:
        An optax transformation with state `ScaleByLBFGSState`. Its update needs
        `params`.

    Raises:
        ValueError: `memory_size` is not positive, or `history_dtype` not of floats.
        TypeError: `memory_size` is not an integer.

    References:
        Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4 and procedure
        18.2; see `dbjax.optim.vector_free`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dbjax import scale_by_lbfgs
        >>> grad = jax.grad(lambda w: 2.0 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> rule, params = scale_by_lbfgs(), jnp.array([0.5, 0.0])
        >>> state = rule.init(params)
        >>> for _ in range(2):
        ...     direction, state = rule.update(grad(params), state, params)
        ...     params = params - direction
        ...     print(params.tolist())
        [-0.5, 0.0]
        [0.0, 0.0]
    """
    _check(memory_size, scaling)
    by_leaf = scaling == "leaf" and scale_init_precond
    if history_dtype is not None and not jnp.issubdtype(history_dtype, jnp.floating):
        raise ValueError(f"history_dtype={history_dtype}: allowed are float dtypes")

    def row_dtype(leaf: jax.Array) -> jnp.dtype:
        if history_dtype is not None and not jnp.iscomplexobj(leaf):
            return jnp.dtype(history_dtype)
        return jnp.promote_types(leaf.dtype, jnp.bfloat16)

    def init(params: Params) -> ScaleByLBFGSState:
        params = jax.tree.map(jnp.asarray, params)

        def rows(leaf: jax.Array) -> jax.Array:
            return trees.zeros_like(leaf, row_dtype(leaf), memory_size)

        products = vector_free.no_products(
            memory_size,
            trees.scalar_dtype(),
            len(jax.tree.leaves(params)) if by_leaf else None,
        )
        return ScaleByLBFGSState(
            count=trees.replicated(params, 0, jnp.int32),
            params=jax.tree.map(trees.zeros_like, params),
            updates=jax.tree.map(trees.zeros_like, params),
            s_history=jax.tree.map(rows, params),
            y_history=jax.tree.map(rows, params),
            products=jax.tree.map(
                lambda x: trees.replicated(params, x, x.dtype), products
            ),
        )

    @jax.jit
    def update(
        updates: Gradients, state: ScaleByLBFGSState, params: Params
    ) -> tuple[Gradients, ScaleByLBFGSState]:
        new = _round(state, params, updates, by_leaf)
        products, pair = vector_free.absorb(state.products, new)
        # Made again as they are written: what two readers share, XLA keeps in memory.
        s_history = trees.set_row(
            *(state.s_history, pair.row, (params, state.params), pair.accepted),
            make=_difference,
        )
        y_history = trees.set_row(
            *(state.y_history, pair.row, (updates, state.updates), pair.accepted),
            make=lambda g, g_before, row: _damped(
                _difference(g, g_before, row), g_before, pair.theta, pair.tau
            ),
        )
        found, products = vector_free.coefficients(products, scale_init_precond)
        direction = jax.tree.map(
            _direction,
            trees.split(found.gamma, updates),
            updates,
            trees.combine(found.s, s_history),
            trees.combine(found.y, y_history),
        )
        return direction, ScaleByLBFGSState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            params=jax.tree.map(
                lambda p, old: p.astype(old.dtype), params, state.params
            ),
            updates=jax.tree.map(
                lambda g, old: g.astype(old.dtype), updates, state.updates
            ),
            s_history=s_history,
            y_history=y_history,
            products=products,
        )

    def checked(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, ScaleByLBFGSState]:
        del extra_args
        if params is None:
            raise ValueError("L-BFGS takes their differences: call update with params=")
        return update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, checked)


def lbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: LineSearch | optax.GradientTransformation | None = more_thuente(),  # noqa: B008
    *,
    history_dtype: Any = None,
    scaling: Scaling | None = None,
    aux: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Minimise with L-BFGS and a line search; a drop-in for `optax.lbfgs`.

    .. math::
      w \leftarrow w - t \, \eta \, H g

    with `H` of `scale_by_lbfgs`, `eta` the learning rate (1 if not given) and `t` what
    the line search finds, which tries 1 first. After a search that found nothing the
    history is dropped, so that the next direction is the gradient.

    Args:
        learning_rate: a number or a schedule of the number of updates.
        memory_size: pairs to keep, at least 1.
        scale_init_precond: see `scale_by_lbfgs`.
        linesearch: one of `dbjax.optim.linesearch`; an optax transformation such as
          `optax.scale_by_zoom_linesearch(20)`; or None for the step `eta`, which needs
          no value.
        history_dtype: see `scale_by_lbfgs`.
        scaling: see `scale_by_lbfgs`. By default `"leaf"` with a search of dbjax's own,
          else `"whole"`, so that a step by an optax search, or by none, is as optax
          would take it. There is no difference where the parameters are one leaf.
        aux: what `value_fn` returns beside the value, or anything of its structure,
          shapes and dtypes, if it does; `optax.tree.get(state, "aux")` then gives that
          of the newest parameters.

    Returns:
        An optax transformation. Its update is `update(grads, state, params, value=,
        grad=, value_fn=, **what value_fn takes)`, and `optax.tree.get(state, name)`
        finds `value` (inf at first), `grad` and `count`.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: `memory_size` is not an integer, or `linesearch` is no search.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> import dbjax
        >>> f = lambda w: jnp.sum((w - jnp.array([1.0, 2.0])) ** 2)
        >>> rule, params = dbjax.lbfgs(), jnp.zeros(2)
        >>> state = rule.init(params)
        >>> value_and_grad = optax.value_and_grad_from_state(f)
        >>> for _ in range(2):
        ...     value, grad = value_and_grad(params, state=state)
        ...     updates, state = rule.update(
        ...         grad, state, params, value=value, grad=grad, value_fn=f
        ...     )
        ...     params = optax.apply_updates(params, updates)
        >>> print(params, optax.tree.get(state, "value"))
        [1. 2.] 0.0
    """
    own = isinstance(linesearch, LineSearch)
    direct = scale_by_lbfgs(
        memory_size,
        scale_init_precond,
        history_dtype=history_dtype,
        scaling=scaling or ("leaf" if own else "whole"),
    )
    rate = 1.0 if learning_rate is None else learning_rate
    if linesearch is None:
        return _plain(direct, rate)
    if isinstance(linesearch, LineSearch):
        search = scale_by_line_search(linesearch, aux=aux)
    elif isinstance(linesearch, optax.GradientTransformation):
        search = optax.with_extra_args_support(linesearch)
    else:
        raise TypeError(
            f"linesearch={linesearch!r}: allowed are one of dbjax.optim.linesearch, an "
            "optax transformation and None"
        )

    def init(params: Params) -> tuple[Any, Any]:
        return direct.init(params), search.init(params)

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, tuple[ScaleByLBFGSState, Any]]:
        updates, direction = _step(direct, rate, updates, state[0], params)
        updates, line = search.update(updates, state[1], params, **extra_args)
        if isinstance(line, ScaleByLineSearchState):
            kept, fresh = direction.products, vector_free.restart(direction.products)
            products = trees.where(line.learning_rate == 0, fresh, kept)
            direction = direction._replace(products=products)
        return updates, (direction, line)

    return optax.GradientTransformationExtraArgs(init, update)


def _plain(
    direct: optax.GradientTransformationExtraArgs, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction times the learning rate, with `value` and `grad` in its state."""

    def wrapped(state: ScaleByLBFGSState, value: jax.Array) -> LBFGSState:
        count, params, grad, *rest = state
        return LBFGSState(count, value, params, grad, *rest)

    def init(params: Params) -> LBFGSState:
        dtype = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).dtype
        state: Any = direct.init(params)
        return wrapped(state, trees.replicated(params, jnp.inf, dtype))

    def update(
        updates: Gradients,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Gradients, LBFGSState]:
        del extra_args
        count, value, *rest = state
        before = ScaleByLBFGSState(count, *rest)
        updates, after = _step(direct, rate, updates, before, params)
        return updates, wrapped(after, value)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    direct: optax.GradientTransformationExtraArgs,
    rate: Any,
    updates: Gradients,
    state: Any,
    params: Params | None,
) -> tuple[Gradients, Any]:
    """The direction downhill times the learning rate."""
    eta = rate(state.count) if callable(rate) else rate
    direction, state = direct.update(updates, state, params)
    return jax.tree.map(lambda d: jnp.asarray(-eta, d.dtype) * d, direction), state


def _check(memory_size: int, scaling: str) -> None:
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling={scaling!r}: allowed are 'leaf' and 'whole'")
    if isinstance(memory_size, bool) or not hasattr(memory_size, "__index__"):
        raise TypeError(f"memory_size={memory_size!r}: allowed are integers from 1")
    if memory_size < 1:
        raise ValueError(f"memory_size={memory_size}: allowed are integers from 1")


def _round(
    state: ScaleByLBFGSState, p: Params, g: Gradients, by_leaf: bool
) -> vector_free.Round:
    """The inner products of the newest pair, and of the history with the gradient."""
    p_before, g_before = state.params, state.updates
    s_rows, y_rows = state.s_history, state.y_history

    def minus(new: Params, old: Params, rows: Params) -> Params:
        return jax.tree.map(_difference, new, old, rows)

    # Every product makes its differences in a way of its own, exact up to the sign:
    # what two of them shared XLA would keep in memory, which costs more than all.
    less_p, less_p_before, less_g, less_g_before = (
        jax.tree.map(jnp.negative, tree) for tree in (p, p_before, g, g_before)
    )
    y_once = minus(g_before, g, y_rows)
    y_again = minus(less_g, less_g_before, y_rows)
    s_again = minus(less_p, less_p_before, s_rows)
    kept = (lambda x: x) if by_leaf else (lambda x: jnp.sum(x, 0))
    return vector_free.Round(
        rows_sg=trees.rows_vdot(s_rows, g),
        rows_yg=kept(trees.leaf_rows_vdots(y_rows, g)),
        sy=trees.vdot(minus(p, p_before, s_rows), minus(g, g_before, y_rows)),
        yy=kept(trees.leaf_vdots(y_once, y_once)),
        sg=-trees.vdot(minus(p_before, p, s_rows), g),
        yg=kept(trees.leaf_vdots(y_again, less_g)),
        gg=kept(trees.leaf_vdots(g, g)),
        ss=trees.leaf_vdots(s_again, s_again) if by_leaf else None,
    )


def _difference(new: jax.Array, old: jax.Array, row: jax.Array) -> jax.Array:
    wide = jnp.promote_types(new.dtype, jnp.float32)
    return (new.astype(wide) - old.astype(wide)).astype(row.dtype)


def _damped(
    y: jax.Array, g_before: jax.Array, theta: jax.Array, tau: jax.Array
) -> jax.Array:
    wide = jnp.promote_types(y.dtype, jnp.float32)
    real = jnp.finfo(wide).dtype
    damped = theta.astype(real) * y.astype(wide) - tau.astype(real) * g_before
    # Where nothing is damped `y` must stay to the bit, whatever the gradient was.
    return jnp.where(tau == 0, y, damped.astype(y.dtype))


def _direction(gamma: jax.Array, g: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    wide = jnp.promote_types(g.dtype, jnp.float32)
    total = gamma.astype(jnp.finfo(wide).dtype) * g.astype(wide)
    return (total + s.astype(wide) + y.astype(wide)).astype(g.dtype)
