"""L-BFGS on named vectors: the scalars are `dbjax.optim.vector_free`'s."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.optim import vector_free
from dbjax.optim.linesearch import LineSearch, more_thuente
from dbjax.sandblaster.messages import Copy, Elementwise, Swap, combination
from dbjax.sandblaster.methods.base import (
    Command,
    Direction,
    Pair,
    Products,
    Straight,
)
from dbjax.sandblaster.scalars import exactly


@dataclasses.dataclass(frozen=True)
class LBFGS(Straight):
    r"""Limited-memory BFGS in vector-free form.

    .. math::
      d = -H g = -\gamma g - \sum_i (c_i s_i + e_i y_i)

    A trial costs one round of inner products (of the newest gradient with all of the
    history, and a few more), a step one combination. Pairs with too little curvature
    are damped or skipped, and a direction that does not descend is replaced by the
    gradient; both are counted. The history stays on the shards.

    Attributes:
      memory_size: pairs to keep, at least 1.
      scale_init_precond: whether `gamma` is `s y / y y` of the newest pair; else 1.
      history_dtype: of the pairs, such as `jnp.bfloat16`; that of parameters if None.
      linesearch: one of `dbjax.optim.linesearch`; Moré and Thuente's if not given.

    References:
      The paper, section 4.2 and appendix, algorithm 1.2; see `vector_free` for more.
    """

    memory_size: int = 10
    scale_init_precond: bool = True
    history_dtype: Any = None
    linesearch: LineSearch | None = None

    def __post_init__(self) -> None:
        check_memory(self.memory_size)
        if self.history_dtype is not None and not jnp.issubdtype(
            self.history_dtype, jnp.floating
        ):
            raise ValueError(
                f"history_dtype={self.history_dtype}: allowed are float dtypes"
            )

    def search(self, value_rtol: float) -> LineSearch:
        """See `Method`, as for all that follow."""
        return self.linesearch or more_thuente(value_rtol=value_rtol)

    def init(self) -> vector_free.Products:
        """No pairs yet."""
        return no_products(self.memory_size)

    def begin(self) -> Sequence[Command]:
        """An empty history."""
        return empty_history(self.memory_size, self.history_dtype)

    def look(
        self, state: vector_free.Products, apart: bool
    ) -> tuple[Sequence[Command], Sequence[Pair]]:
        """Ask for the products of a round."""
        del state
        commands = newest_pair(self.history_dtype)
        return commands, [("d", "g+"), *round_pairs(self.memory_size, "g+", apart)]

    def direct(
        self, state: vector_free.Products, products: Products, step: float
    ) -> Direction:
        """Take the newest pair, if it is good, and multiply the gradient by H."""
        state, pair = absorb(state, products)
        found, state = coefficients(state, self.scale_init_precond)
        d = minus(found, "g")
        return Direction(state, [*store(pair), d], -float(state.slope))

    def steepest(self, state: vector_free.Products, products: Products) -> Direction:
        """Drop the history."""
        del products
        found, state = coefficients(forget(state), self.scale_init_precond)
        return Direction(state, [minus(found, "g")], -float(state.slope))


# What every method with such a history shares.


def check_memory(memory_size: int) -> None:
    """Raise unless there is room for a pair."""
    if isinstance(memory_size, bool) or not isinstance(memory_size, int | np.integer):
        raise TypeError(f"memory_size={memory_size!r}: allowed are integers from 1")
    if memory_size < 1:
        raise ValueError(f"memory_size={memory_size}: allowed are integers from 1")


def no_products(memory_size: int) -> vector_free.Products:
    """Nothing is known yet."""
    return exactly(_no_products)(memory_size)


def empty_history(memory_size: int, dtype: Any) -> list[Command]:
    """Make all rows zero: an inner product may be asked of each from the start on."""
    rows = [f"{kind}{row}" for kind in "sy" for row in range(memory_size)]
    return [
        Elementwise("s+", "zero", ("x",)),
        *[Copy(row, "s+", dtype) for row in rows],
    ]


def newest_pair(dtype: Any) -> list[Command]:
    """Make `s+ = x+ - x`, and `y+` what a row of the history would hold."""
    commands: list[Command] = [combination("s+", {"x+": 1.0, "x": -1.0}, dtype)]
    if dtype is not None:
        commands.append(Copy("y+", "y+", dtype))
    return commands


def round_pairs(memory_size: int, gradient: str, apart: bool) -> list[Pair]:
    """Name the inner products that `absorb` takes.

    Args:
      memory_size: `m`.
      gradient: the vector that the direction is made from.
      apart: whether `y+` is something else than the change of that vector.

    Returns:
      `2 m + 5` pairs, or `4 m + 6`.
    """
    rows = [f"{kind}{row}" for kind in "sy" for row in range(memory_size)]
    newest = [("s+", "y+"), ("y+", "y+"), ("s+", gradient), ("y+", gradient)]
    pairs = [*[(row, gradient) for row in rows], *newest, (gradient, gradient)]
    if apart:
        pairs += [*[(row, "y+") for row in rows], ("s+", "s+")]
    return list(dict.fromkeys(pairs))


def absorb(
    state: vector_free.Products, products: Products, gradient: str = "g+"
) -> tuple[vector_free.Products, vector_free.Pair]:
    """Hand a round's products to `vector_free`."""
    m = len(state.sg)

    def rows(kind: str, v: str) -> Any:
        return np.array([products[f"{kind}{row}", v] for row in range(m)])

    def one(a: str, b: str) -> Any:
        return np.float64(products[a, b])

    new = vector_free.Round(
        rows_sg=rows("s", gradient),
        rows_yg=rows("y", gradient),
        sy=one("s+", "y+"),
        yy=one("y+", "y+"),
        sg=one("s+", gradient),
        yg=one("y+", gradient),
        gg=one(gradient, gradient),
    )
    if ("s+", "s+") not in products:
        return exactly(_absorb)(state, new)
    more = rows("s", "y+"), rows("y", "y+"), one("s+", "s+")
    return exactly(_absorb_apart)(state, new, *more)


def coefficients(
    state: vector_free.Products, scale: bool
) -> tuple[vector_free.Coefficients, vector_free.Products]:
    """Solve for the coefficients of the direction."""
    return exactly(_coefficients)(state, scale)


def forget(state: vector_free.Products) -> vector_free.Products:
    """Drop all pairs; the restart is counted."""
    state = exactly(_restart)(state)
    return state._replace(restarts=state.restarts + 1)


def store(pair: vector_free.Pair) -> list[Command]:
    """Put the newest pair into its row, which costs nothing unless it is damped."""
    if not pair.accepted:
        return []
    row, theta, tau = int(pair.row), float(pair.theta), float(pair.tau)
    commands: list[Command] = [Swap("s+", f"s{row}")]
    if tau:  # by now the gradient before has the name g+
        commands.append(combination("y+", {"y+": theta, "g+": -tau}))
    return [*commands, Swap("y+", f"y{row}")]


def minus(found: vector_free.Coefficients, gradient: str) -> Command:
    """Make `d` the negative of what the coefficients say."""
    terms = {gradient: -float(found.gamma)}
    terms |= {f"s{row}": -float(c) for row, c in enumerate(found.s)}
    terms |= {f"y{row}": -float(c) for row, c in enumerate(found.y)}
    return combination("d", terms)


def _no_products(memory_size: int) -> vector_free.Products:
    return vector_free.no_products(memory_size, jnp.dtype(np.float64))


_absorb = jax.jit(vector_free.absorb)
_absorb_apart = jax.jit(vector_free.absorb_apart)
_coefficients = jax.jit(vector_free.coefficients, static_argnums=1)
_restart = jax.jit(vector_free.restart)
