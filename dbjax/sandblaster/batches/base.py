"""What a rule for the batch is, and what rules share.

A rule is a frozen setting with a plain state beside it, and sees scalars only. Where it
changes the batch it says so before the next direction: a pair for L-BFGS must come from
portions that two points have in common, or the noise of the sample ends up in it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from dbjax.sandblaster.messages import Evaluated, combination
from dbjax.sandblaster.methods.base import Command

Groups: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


class Seen(NamedTuple):
    """What an evaluation says, for the search and for the record.

    Attributes:
      value: of the portions that both ends of the search have in common.
      batch: of all that were evaluated for this point.
      commands: they make `g+` and `y+`.
    """

    value: float
    batch: float
    commands: Sequence[Command]


class Batches(Protocol):
    """A rule for the batch; frozen settings, its state a plain value beside it."""

    @property
    def apart(self) -> bool:
        """Whether `y+` may be something else than `g+ - g`."""
        ...

    @property
    def squares(self) -> bool:
        """Whether it asks for the square of each portion's gradient."""
        ...

    def check(self, portions: int) -> None:
        """Raise if the rule cannot be followed with so many portions."""
        ...

    def init(self, portions: int) -> Any:
        """Give the state before the first evaluation."""
        ...

    def begin(self) -> Sequence[Command]:
        """Prepare vectors of its own; `x` is there."""
        ...

    def whole(self, state: Any) -> bool:
        """Say whether the batch is all portions: only then can a run converge."""
        ...

    def trial(self, state: Any) -> Groups:
        """Say what to evaluate at a point tried."""
        ...

    def see(self, state: Any, evaluated: Evaluated) -> tuple[Any, Seen]:
        """Take in an evaluation of `trial`."""
        ...

    def grow(self, state: Any, square: float, size: float) -> Groups:
        """Say what more to evaluate at `x+`, which was accepted.

        Args:
          state: the rule's.
          square: `g+ g+`, if the rule asks for squares.
          size: what the method says of the gradient there, see `Method.size`; 0 where
            nothing was found along it.
        """
        ...

    def grown(self, state: Any, evaluated: Evaluated) -> tuple[Any, Seen]:
        """Take in an evaluation of what `grow` asked for."""
        ...

    def take(self, state: Any) -> tuple[Any, float, Sequence[Command]]:
        """Go on to the next iteration: the point was accepted, `x+` is `x` now.

        Args:
          state: the rule's.

        Returns:
          The state; the value at `x` of what the next search sees; commands.
        """
        ...


def mean(examples: Sequence[int], values: Sequence[float]) -> float:
    """Give `sum_p n_p v_p / sum_p n_p`, rounded once: the same in any order.

    >>> mean([3, 1], [1.0, 5.0])
    2.0
    """
    terms = [n * v for n, v in zip(examples, values, strict=True)]
    total = math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
    return total / sum(examples)


def change(new: str = "g+", old: str = "g") -> Command:
    """Make `y+`, the change of a gradient."""
    return combination("y+", {new: 1.0, old: -1.0})


class Settled:
    """Batches that nothing is added to before the next iteration."""

    def grow(self, state: Any, square: float, size: float) -> Groups:
        """Nothing more."""
        del state, square, size
        return ()

    def grown(self, state: Any, evaluated: Evaluated) -> tuple[Any, Seen]:
        """It was not asked for."""
        raise AssertionError(f"nothing was asked for, got {evaluated}")


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, portions: int) -> np.ndarray:
    """Give the order of an epoch's portions, `[portions]`."""
    return np.random.default_rng([seed, epoch]).permutation(portions)
