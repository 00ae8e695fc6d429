"""Nonlinear conjugate gradients of Hager and Zhang."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dbjax.optim.linesearch import LineSearch, more_thuente
from dbjax.sandblaster.messages import combination
from dbjax.sandblaster.methods.base import (
    Command,
    Direction,
    Pair,
    Products,
    Straight,
    downhill,
)


class ConjugateGradientState(NamedTuple):
    """Of the step under way.

    Attributes:
      slope: at its start; 0 before the first.
      restarts: how often the direction was the gradient instead, after the first.
    """

    slope: float = 0.0
    restarts: int = 0


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Straight):
    r"""Directions that keep some of the one before.

    .. math::
      d \leftarrow -g + \bar\beta d, \quad
      \beta = \frac{1}{d^\top y} \Big(y - 2 d \frac{y^\top y}{d^\top y}\Big)^\top g,
      \quad \bar\beta = \max\Big(\beta, \frac{-1}{|d| \min(\eta, |g|)}\Big)

    with `g` the newest gradient and `y` its change. Such a direction descends whatever
    the line search does; where rounding or changing batches say otherwise it is the
    gradient again.

    Attributes:
      eta: of the lower bound on beta.
      linesearch: one of `dbjax.optim.linesearch`; Moré and Thuente's with a curvature
        condition of 0.1 if not given.

    References:
      Hager and Zhang, A new conjugate gradient method with guaranteed descent and an
      efficient line search, SIAM J. Optim. 16 (2005), equations 1.3 and 1.5 to 1.7.
    """

    eta: float = 0.01
    linesearch: LineSearch | None = None

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta={self.eta}: allowed are positive numbers")

    def search(self, value_rtol: float) -> LineSearch:
        """See `Method`, as for all that follow."""
        return self.linesearch or more_thuente(curvature=0.1, value_rtol=value_rtol)

    def init(self) -> ConjugateGradientState:
        """No direction yet."""
        return ConjugateGradientState()

    def begin(self) -> Sequence[Command]:
        """All its vectors are everybody's."""
        return ()

    def look(
        self, state: ConjugateGradientState, apart: bool
    ) -> tuple[Sequence[Command], Sequence[Pair]]:
        """Ask for six products."""
        del state, apart
        with_g = [("d", "g+"), ("g+", "g+"), ("y+", "g+")]
        return (), [*with_g, ("d", "y+"), ("y+", "y+"), ("d", "d")]

    def direct(
        self, state: ConjugateGradientState, products: Products, step: float
    ) -> Direction:
        """Bend the gradient towards the direction before."""
        gg, dg = products["g+", "g+"], products["d", "g+"]
        dy, yy = products["d", "y+"], products["y+", "y+"]
        if not step:
            return self.steepest(state, products)
        if not dy > 0:
            return self._restart(state, products)
        beta = (products["y+", "g+"] - 2 * dg * yy / dy) / dy
        least = -1 / (products["d", "d"] ** 0.5 * min(self.eta, gg**0.5))
        beta = max(beta, least)
        slope = -gg + beta * dg
        if not slope < -1e-8 * gg:
            return self._restart(state, products)
        # The change of the value is taken to be what the last step's was.
        first = step * state.slope / slope
        after = state._replace(slope=slope)
        return Direction(
            after, [combination("d", {"g": -1.0, "d": beta})], slope, first
        )

    def steepest(self, state: ConjugateGradientState, products: Products) -> Direction:
        """The gradient itself."""
        square = products["g+", "g+"]
        return downhill(state._replace(slope=-square), square)

    def _restart(self, state: ConjugateGradientState, products: Products) -> Direction:
        return self.steepest(state._replace(restarts=state.restarts + 1), products)
