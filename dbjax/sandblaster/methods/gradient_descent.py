"""Gradient descent with the step of Barzilai and Borwein, safeguarded by a search."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dbjax.optim.linesearch import LineSearch, backtracking
from dbjax.sandblaster.methods.base import (
    Command,
    Direction,
    Pair,
    Products,
    Straight,
    downhill,
)


class GradientDescentState(NamedTuple):
    """`g g` and the slope at the start of the step under way; 0 before the first."""

    square: float = 0.0
    slope: float = 0.0


@dataclasses.dataclass(frozen=True)
class GradientDescent(Straight):
    r"""Steps down the gradient.

    .. math::
      x \leftarrow x - t g, \quad t_0 = s^\top s / s^\top y

    The first step tried is that of Barzilai and Borwein, whose products follow from
    slopes, and `linesearch` shortens it until the value has decreased enough.

    Attributes:
      linesearch: one of `dbjax.optim.linesearch`; backtracking if not given.

    References:
      Barzilai and Borwein, Two-point step size gradient methods, IMA J. Numer. Anal. 8
      (1988).
    """

    linesearch: LineSearch | None = None

    def search(self, value_rtol: float) -> LineSearch:
        """See `Method`, as for all that follow."""
        return self.linesearch or backtracking(value_rtol=value_rtol)

    def init(self) -> GradientDescentState:
        """No step yet."""
        return GradientDescentState()

    def begin(self) -> Sequence[Command]:
        """It has no vectors of its own."""
        return ()

    def look(
        self, state: GradientDescentState, apart: bool
    ) -> tuple[Sequence[Command], Sequence[Pair]]:
        """Ask for two products."""
        del state, apart
        return (), [("d", "g+"), ("g+", "g+")]

    def direct(
        self, state: GradientDescentState, products: Products, step: float
    ) -> Direction:
        """Go down, as far as the curvature of the last step says."""
        square, change = products["g+", "g+"], products["d", "g+"] - state.slope
        after = GradientDescentState(square, -square)
        if step and change > 0:  # s s / s y, as s = step d
            return downhill(after, square)._replace(step=step * state.square / change)
        return downhill(after, square)

    def steepest(self, state: GradientDescentState, products: Products) -> Direction:
        """Go down, with a fresh first step."""
        del state
        square = products["g+", "g+"]
        return downhill(GradientDescentState(square, -square), square)
