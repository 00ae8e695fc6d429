"""A new sample at every step, whose overlap with the last one makes the pairs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from dbjax.data import checks
from dbjax.sandblaster.batches.base import (
    Groups,
    Seen,
    Settled,
    change,
    mean,
    permutation,
)
from dbjax.sandblaster.messages import Elementwise, Evaluated, Swap, combination
from dbjax.sandblaster.methods.base import Command


class MultiBatchState(NamedTuple):
    """Of `MultiBatch`.

    Attributes:
      portions: how many there are.
      place: in the epochs' orders, laid end to end, where the next sample begins.
      shared: what it has in common with the sample before; nothing at first.
      value: at `x+`, of what the sample after it will share with it.
    """

    portions: int
    place: int = 0
    shared: tuple[int, ...] = ()
    value: float = math.inf


@dataclasses.dataclass(frozen=True)
class MultiBatch(Settled):
    r"""A new sample of the portions at every step, sharing some with the last one.

    .. math::
      y = g_O(x') - g_O(x), \quad O = S \cap S'

    Both gradients of a pair come from the overlap `O` of successive samples, so that
    no noise of the sample enters the history, and a step costs one evaluation of one
    sample. A step is shortened where the overlap's loss does not fall. Such a run ends
    at its limit of iterations: on a sample, nothing can be told to have converged.

    The overlap is all that judges a step and all that a pair is made from, so it must
    not be small itself: with a quarter of a small sample more steps are refused, at one
    evaluation each, than the portions seen twice would cost.

    Attributes:
      portions: in a sample; at least 2, at most all there are.
      overlap: the share of a sample that is in the next one too, up to a half; at
        least one portion. The paper's experiments, with large samples and steps of
        fixed length, use less.
      seed: of the order in which portions are drawn, epoch by epoch.

    References:
      Berahas, Nocedal and Takac, A multi-batch L-BFGS method for machine learning,
      NIPS 2016, section 3.
    """

    portions: int
    overlap: float = 0.5
    seed: int = 0

    apart = True
    squares = False

    def __post_init__(self) -> None:
        checks.positive("portions", self.portions)
        if self.portions < 2:
            raise ValueError(f"portions={self.portions}: allowed are integers from 2")
        if not 0 < self.overlap <= 0.5:
            raise ValueError(
                f"overlap={self.overlap}: allowed are numbers above 0, up to 0.5"
            )

    def check(self, portions: int) -> None:
        """See `Batches`, as for all that follow."""
        if self.portions > portions:
            raise ValueError(
                f"MultiBatch(portions={self.portions}): there are only {portions}"
            )

    def init(self, portions: int) -> MultiBatchState:
        """Nothing was evaluated."""
        return MultiBatchState(portions)

    def begin(self) -> Sequence[Command]:
        """The overlap's gradients, before and after."""
        return [Elementwise(name, "zero", ("x",)) for name in ("k", "k-")]

    def whole(self, state: MultiBatchState) -> bool:
        """Never."""
        del state
        return False

    def trial(self, state: MultiBatchState) -> Groups:
        """What the last sample shares, new portions, and those that the next shares."""
        drawn, _ = self._draw(state)
        cut = len(drawn) - self._overlaps
        groups = ("k-", state.shared), ("r", drawn[:cut]), ("k+", drawn[cut:])
        return tuple((name, portions) for name, portions in groups if portions)

    def see(
        self, state: MultiBatchState, evaluated: Evaluated
    ) -> tuple[MultiBatchState, Seen]:
        """Put the sample's gradient together, and the overlap's change."""
        parts, terms = {}, {}
        begin, total = 0, sum(evaluated.examples)
        for name, portions in self.trial(state):
            at = slice(begin, begin + len(portions))
            parts[name] = mean(evaluated.examples[at], evaluated.values[at])
            terms[name] = sum(evaluated.examples[at]) / total
            begin = at.stop
        batch = mean(evaluated.examples, evaluated.values)
        both = change("k-", "k") if "k-" in parts else change()
        commands = [combination("g+", terms), both]
        seen = Seen(parts.get("k-", batch), batch, commands)
        return state._replace(value=parts["k+"]), seen

    def take(
        self, state: MultiBatchState
    ) -> tuple[MultiBatchState, float, Sequence[Command]]:
        """Draw the next sample."""
        drawn, place = self._draw(state)
        after = state._replace(place=place, shared=drawn[-self._overlaps :])
        return after, state.value, [Swap("k", "k+")]

    @property
    def _overlaps(self) -> int:
        return max(1, round(self.overlap * self.portions))

    def _draw(self, state: MultiBatchState) -> tuple[tuple[int, ...], int]:
        """The portions that are new in the sample, and the place after the last.

        Where two epochs meet, one that the sample holds already may come up: it is
        passed over, as it was seen just before.
        """
        drawn: dict[int, None] = {}
        place = state.place
        while len(drawn) < self.portions - len(state.shared):
            epoch, at = divmod(place, state.portions)
            portion = int(permutation(self.seed, epoch, state.portions)[at])
            if portion not in state.shared:
                drawn[portion] = None
            place += 1
        return tuple(drawn), place
