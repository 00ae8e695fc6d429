"""L-BFGS where steps are projected: on orthants for L1 (OWL-QN), into a box for bounds.

Both replace the gradient by what descent can use of it, `v`; multiply that by `H`;
switch coefficients off that would not descend; and project every point tried. The
inverse Hessian is that of the loss alone, as pairs come from its gradients. `v H v` is
then at most the decrease that the direction promises, so a search that asks for a share
of it asks for no more than there is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.optim import vector_free
from dbjax.optim.linesearch import LineSearch, backtracking
from dbjax.sandblaster.messages import Elementwise, Swap, combination
from dbjax.sandblaster.methods import lbfgs
from dbjax.sandblaster.methods.base import Command, Direction, Pair, Products
from dbjax.typing import Params


class Geometry(NamedTuple):
    """What tells one projected method from another, as commands.

    Attributes:
      usable: they make `v+` from `x+` and `g+`.
      pair: they make of `y+` what belongs to `s+`.
      aim: they switch coefficients of `d` off, knowing `x`, `g` and `v`.
      back: they project `x+`.
      weigh: they make `p+`, whose product with `x+` is the penalty.
      start: they make of `x` a point that is allowed.
    """

    usable: Sequence[Command]
    pair: Sequence[Command] = ()
    aim: Sequence[Command] = ()
    back: Sequence[Command] = ()
    weigh: Sequence[Command] = ()
    start: Sequence[Command] = ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Projected:
    """What both have in common; they say their geometry and their constants."""

    memory_size: int = 10
    linesearch: LineSearch | None = None

    geometry: ClassVar[Geometry]

    def __post_init__(self) -> None:
        lbfgs.check_memory(self.memory_size)

    def search(self, value_rtol: float) -> LineSearch:
        """See `Method`, as for all that follow."""
        return self.linesearch or backtracking(value_rtol=value_rtol)

    def init(self) -> vector_free.Products:
        """No pairs yet."""
        return lbfgs.no_products(self.memory_size)

    def begin(self) -> Sequence[Command]:
        """Begin at a point that is allowed, with an empty history."""
        history = lbfgs.empty_history(self.memory_size, None)
        return [Elementwise("v", "zero", ("x",)), *history, *self.geometry.start]

    def move(self, step: float) -> Sequence[Command]:
        """Go along the direction, then back to where it is allowed."""
        return [combination("x+", {"x": 1.0, "d": step}), *self.geometry.back]

    def look(
        self, state: vector_free.Products, apart: bool
    ) -> tuple[Sequence[Command], Sequence[Pair]]:
        """Ask for the products of a round, with `v+`."""
        del state, apart  # the steps are projected, so pairs always stand apart
        geometry = self.geometry
        commands = [*lbfgs.newest_pair(None), *geometry.pair]
        pairs = lbfgs.round_pairs(self.memory_size, "v+", apart=True)
        if geometry.weigh:
            pairs.append(("x+", "p+"))
        return [*commands, *geometry.usable, *geometry.weigh], pairs

    def slope(self, products: Products, step: float) -> float:
        """`s+ v+ / t`, as the step need not be straight."""
        return products["s+", "v+"] / step

    def size(self, products: Products) -> float:
        """`v+ v+`."""
        return products["v+", "v+"]

    def penalty(self, products: Products) -> float:
        """What is weighed."""
        return products.get(("x+", "p+"), 0.0)

    def direct(
        self, state: vector_free.Products, products: Products, step: float
    ) -> Direction:
        """Take the newest pair, if it is good, and multiply `v` by H."""
        del step
        state, pair = lbfgs.absorb(state, products, "v+")
        found, state = lbfgs.coefficients(state, scale=True)
        d = lbfgs.minus(found, "v")
        commands = [Swap("v", "v+"), *lbfgs.store(pair), d, *self.geometry.aim]
        return Direction(state, commands, -float(state.slope))

    def steepest(self, state: vector_free.Products, products: Products) -> Direction:
        """Drop the history."""
        del products
        found, state = lbfgs.coefficients(lbfgs.forget(state), scale=True)
        commands = [lbfgs.minus(found, "v"), *self.geometry.aim]
        return Direction(state, commands, -float(state.slope))


@dataclasses.dataclass(frozen=True, eq=False)
class OWLQN(_Projected):
    r"""Orthant-wise L-BFGS: adds an L1 norm to the loss.

    .. math::
      f(w) + \sum_i \lambda_i |w_i|

    A step stays in the orthant that it begins in or descends into, so coefficients
    become exactly 0 and stay there.

    Attributes:
      l1: the weights, not negative: a number, or a tree like the parameters, or like
        the upper part of it, of numbers and arrays; 0 for what is not penalised.
      memory_size: pairs to keep, at least 1.
      linesearch: one of `dbjax.optim.linesearch`; backtracking if not given.

    References:
      Andrew and Gao, Scalable training of L1-regularized log-linear models, ICML 2007.
    """

    l1: Any

    geometry = Geometry(
        usable=[Elementwise("v+", "pseudo_gradient", ("x+", "g+", "l1"))],
        aim=[
            Elementwise("d", "align", ("d", "v", "l1")),
            Elementwise("o", "orthant", ("x", "v")),
        ],
        back=[Elementwise("x+", "project_orthant", ("x+", "o", "l1"))],
        weigh=[Elementwise("p+", "weigh", ("x+", "l1"))],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in jax.tree.leaves(self.l1):
            if not np.all(np.asarray(weight) >= 0):
                raise ValueError(f"l1={weight}: allowed are numbers from 0")

    def constants(self, params: Params) -> dict[str, Params]:
        """The weight of every coefficient."""
        return {"l1": spread("l1", self.l1, params)}


@dataclasses.dataclass(frozen=True, eq=False)
class BoxLBFGS(_Projected):
    r"""L-BFGS between bounds, `lower <= w <= upper`.

    No point outside the box is ever evaluated. A coefficient at a bound that descent
    would cross is held; the others are stepped by the inverse Hessian among themselves
    and cut off at their bounds.

    Attributes:
      lower: numbers, or a tree of numbers and arrays like the parameters, or like the
        upper part of it; None: no bounds on this side.
      upper: likewise.
      memory_size: pairs to keep, at least 1.
      linesearch: one of `dbjax.optim.linesearch`; backtracking if not given.

    References:
      Bertsekas, Projected Newton methods for optimization problems with simple
      constraints, SIAM J. Control Optim. 20 (1982).
    """

    lower: Any = None
    upper: Any = None

    geometry = Geometry(
        usable=[Elementwise("v+", "free_gradient", ("x+", "g+", "lower", "upper"))],
        pair=[Elementwise("y+", "where_moved", ("y+", "s+"))],
        aim=[Elementwise("d", "free_direction", ("d", "x", "g", "lower", "upper"))],
        back=[Elementwise("x+", "clip", ("x+", "lower", "upper"))],
        start=[Elementwise("x", "clip", ("x", "lower", "upper"))],
    )

    def constants(self, params: Params) -> dict[str, Params]:
        """Both bounds of every coefficient.

        Raises:
          ValueError: they cross, or are not numbers.
        """
        lower = spread("lower", -np.inf if self.lower is None else self.lower, params)
        upper = spread("upper", np.inf if self.upper is None else self.upper, params)
        for (path, low), high in zip(
            jax.tree_util.tree_leaves_with_path(lower),
            jax.tree.leaves(upper),
            strict=True,
        ):
            if not bool(jnp.all(low <= high)):
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"lower{name} is above upper{name} in places, or one of them is "
                    "not a number: bounds must not cross"
                )
        return {"lower": lower, "upper": upper}


def spread(name: str, prefix: Any, params: Params) -> Params:
    """Give every coefficient its constant.

    Args:
      name: of the argument, for the error.
      prefix: a number, or a tree that ends where `params` does or earlier.
      params: the parameters.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: the prefix does not fit.
    """

    def one(value: Any, part: Params) -> Params:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(jnp.asarray(value, leaf.dtype), leaf.shape),
            part,
        )

    try:
        return jax.tree.map(one, prefix, params)
    except ValueError as error:
        raise ValueError(f"{name} does not fit the parameters: {error}") from error
