"""A batch that grows when its gradient is mostly noise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbjax.data import checks
from dbjax.sandblaster.batches.base import Groups, Seen, change, mean, permutation
from dbjax.sandblaster.messages import Evaluated, combination
from dbjax.sandblaster.methods.base import Command


class ProgressiveBatchState(NamedTuple):
    """Of `ProgressiveBatch`.

    Attributes:
      portions: how many there are.
      count: how many the batch holds.
      value: at `x+`.
      examples: `[count]` of each portion.
      squares: `[count]` of each portion's gradient there.
    """

    portions: int
    count: int
    value: float = math.inf
    examples: tuple[int, ...] = ()
    squares: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ProgressiveBatch:
    r"""A batch that grows as soon as its gradient is mostly noise.

    .. math::
      \frac{1}{P} \Big(1 - \frac{P}{N}\Big) \mathrm{Var}_p(g_p) \le \theta^2 |g|^2

    with `P` portions in the batch, out of `N`, and the variance estimated from their
    gradients' squares, which replicas report as scalars. Where the test fails the batch
    grows to where it would hold; what is there stays, so a pair for L-BFGS comes from
    the batch that both of its points have seen. A full batch is a full batch.

    The later paper's test of the inner products `g_p g` allows smaller batches, but no
    replica can report them: it would have to know `g` while `g` is being computed.

    Attributes:
      portions: in the first batch; at least 2, of which the variance can be told but
        poorly.
      theta: how much noise is allowed, relative to the gradient; positive.
      growth: the batch grows by this factor at once, at most; above 1.
      seed: of the order in which portions join.

    References:
      Byrd, Chin, Nocedal and Wu, Sample size selection in optimization methods for
      machine learning, Math. Program. 134 (2012), section 3 (the test); Bollapragada,
      Mudigere, Nocedal, Shi and Tang, A progressive batching L-BFGS method for machine
      learning, ICML 2018.
    """

    portions: int = 2
    theta: float = 0.7
    growth: float = 4.0
    seed: int = 0

    apart = True
    squares = True

    def __post_init__(self) -> None:
        if checks.positive("portions", self.portions) < 2:
            raise ValueError(f"portions={self.portions}: allowed are integers from 2")
        if not self.theta > 0:
            raise ValueError(f"theta={self.theta}: allowed are positive numbers")
        if not self.growth > 1:
            raise ValueError(f"growth={self.growth}: allowed are numbers above 1")

    def check(self, portions: int) -> None:
        """See `Batches`, as for all that follow."""
        if self.portions > portions:
            raise ValueError(
                f"ProgressiveBatch(portions={self.portions}): there are only {portions}"
            )

    def init(self, portions: int) -> ProgressiveBatchState:
        """The first batch."""
        return ProgressiveBatchState(portions, self.portions)

    def begin(self) -> Sequence[Command]:
        """What joins has its gradient in a vector that is zeroed when it is needed."""
        return ()

    def whole(self, state: ProgressiveBatchState) -> bool:
        """In the end."""
        return state.count == state.portions

    def trial(self, state: ProgressiveBatchState) -> Groups:
        """The batch."""
        return (("g+", self._order(state, 0, state.count)),)

    def see(
        self, state: ProgressiveBatchState, evaluated: Evaluated
    ) -> tuple[ProgressiveBatchState, Seen]:
        """The mean loss, and how far portions differ."""
        value = mean(evaluated.examples, evaluated.values)
        after = state._replace(
            value=value, examples=evaluated.examples, squares=evaluated.squares
        )
        return after, Seen(value, value, [change()])

    def grow(self, state: ProgressiveBatchState, square: float, size: float) -> Groups:
        """More portions, where what is there is too noisy."""
        p, n = state.count, state.portions
        spread = max(0.0, mean(state.examples, state.squares) - square) * p / (p - 1)
        allowed = self.theta**2 * size
        # A gradient of 0 says that this batch has nothing more to say.
        if p == n or size != 0 and not spread * (1 / p - 1 / n) > allowed:
            return ()
        # The test, solved for `p`.
        wanted = math.ceil(1 / (allowed / spread + 1 / n)) if size else n
        end = min(n, max(p + 1, min(wanted, math.floor(self.growth * p))))
        return (("f", self._order(state, p, end)),)

    def grown(
        self, state: ProgressiveBatchState, evaluated: Evaluated
    ) -> tuple[ProgressiveBatchState, Seen]:
        """Add them to the gradient; the pair's change is that of the smaller batch."""
        before, more = sum(state.examples), sum(evaluated.examples)
        share = more / (before + more)
        new = mean(evaluated.examples, evaluated.values)
        value = (1 - share) * state.value + share * new
        after = ProgressiveBatchState(
            state.portions,
            state.count + len(evaluated.examples),
            value,
            state.examples + evaluated.examples,
            state.squares + evaluated.squares,
        )
        commands = [combination("g+", {"g+": 1 - share, "f": share})]
        return after, Seen(value, value, commands)

    def take(
        self, state: ProgressiveBatchState
    ) -> tuple[ProgressiveBatchState, float, Sequence[Command]]:
        """The same batch again."""
        return state, state.value, ()

    def _order(
        self, state: ProgressiveBatchState, begin: int, end: int
    ) -> tuple[int, ...]:
        order = permutation(self.seed, 0, state.portions)[begin:end]
        return tuple(np.sort(order).tolist())
