"""What a batch method is: pure functions of scalars that write commands for vectors.

A method never sees a vector. It knows them by name:

  x   the parameters        x+  those tried
  g   the gradient there    g+  the gradient there
  d   the direction         y+  `g+ - g`, or what stands for it where batches change

and may have more of its own. `Coordinator` runs every method in the same way: after
each evaluation at `x+` come the method's `look` commands and one round of inner
products; if the step is taken, `x` and `x+` exchange their names, as do `g` and `g+`,
and the method writes the next direction.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from dbjax.optim.linesearch import LineSearch
from dbjax.sandblaster.messages import (
    Combine,
    Copy,
    Dots,
    Elementwise,
    Put,
    Swap,
    combination,
)
from dbjax.typing import Params

Command: TypeAlias = Combine | Copy | Dots | Elementwise | Put | Swap
Pair: TypeAlias = tuple[str, str]
Products: TypeAlias = Mapping[Pair, float]


class Direction(NamedTuple):
    """Where to go next.

    Attributes:
      state: the method's.
      commands: they make `d`.
      slope: of the function along `d`; negative, or the search will say so.
      step: the first to try.
    """

    state: Any
    commands: Sequence[Command]
    slope: float
    step: float = 1.0


class Method(Protocol):
    """A batch method; frozen settings, its state a plain value beside it."""

    def search(self, value_rtol: float) -> LineSearch:
        """Give the line search.

        Args:
          value_rtol: how far values of equal points may differ, relatively.

        Returns:
          What the user chose, or the method's own.
        """
        ...

    def constants(self, params: Params) -> dict[str, Params]:
        """Give vectors that stay as they are, by name, of the parameters' shapes."""
        ...

    def init(self) -> Any:
        """Give the state before the first gradient."""
        ...

    def begin(self) -> Sequence[Command]:
        """Prepare vectors of its own; `x` is there."""
        ...

    def move(self, step: float) -> Sequence[Command]:
        """Make `x+` from `x`, `d` and the step."""
        ...

    def look(self, state: Any, apart: bool) -> tuple[Sequence[Command], Sequence[Pair]]:
        """Say what is asked at a point tried.

        Args:
          state: the method's.
          apart: whether `y+` is something else than `g+ - g`.

        Returns:
          Commands that prepare vectors, and the pairs whose inner products are wanted.
        """
        ...

    def slope(self, products: Products, step: float) -> float:
        """Give the slope at the point tried, of the function along the search."""
        ...

    def size(self, products: Products) -> float:
        """Give the square of the (generalised) gradient there, 0 at an optimum."""
        ...

    def penalty(self, products: Products) -> float:
        """Give what the function has beside the loss there."""
        ...

    def direct(self, state: Any, products: Products, step: float) -> Direction:
        """Take the step and write the next direction.

        Args:
          state: the method's.
          products: at the point that `x` is now.
          step: that led there; 0 at the start.

        Returns:
          The direction.
        """
        ...

    def steepest(self, state: Any, products: Products) -> Direction:
        """Forget what was learned, after a search that found nothing.

        Args:
          state: the method's.
          products: at `x`, as `direct` had them.

        Returns:
          The direction of the gradient.
        """
        ...


class Straight:
    """Methods for a loss without anything beside it, searched along a line."""

    def constants(self, params: Params) -> dict[str, Params]:
        """None."""
        del params
        return {}

    def move(self, step: float) -> Sequence[Command]:
        """`x+ = x + step d`."""
        return [combination("x+", {"x": 1.0, "d": step})]

    def slope(self, products: Products, step: float) -> float:
        """`d g+`."""
        del step
        return products["d", "g+"]

    def size(self, products: Products) -> float:
        """`g+ g+`."""
        return products["g+", "g+"]

    def penalty(self, products: Products) -> float:
        """Nothing."""
        del products
        return 0.0


def downhill(state: Any, square: float, gradient: str = "g") -> Direction:
    """Go along the gradient, at first no further than 1.

    Args:
      state: the method's.
      square: `g g`.
      gradient: its name.

    Returns:
      The direction `-g`.
    """
    step = 1.0 if square <= 1 else square**-0.5
    return Direction(state, [combination("d", {gradient: -1.0})], -square, step)
