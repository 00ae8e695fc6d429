"""Which portions an iteration sees: all of them, a changing sample, or a growing one.

A rule is a frozen setting with a plain state beside it, and sees scalars only. Where it
changes the batch it says so before the next direction: a pair for L-BFGS must come from
portions that two points have in common, or the noise of the sample ends up in it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from dbjax.data import checks
from dbjax.sandblaster.messages import Elementwise, Evaluated, Swap, combination
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


class _Settled:
    """Batches that nothing is added to before the next iteration."""

    def grow(self, state: Any, square: float, size: float) -> Groups:
        """Nothing more."""
        del state, square, size
        return ()

    def grown(self, state: Any, evaluated: Evaluated) -> tuple[Any, Seen]:
        """It was not asked for."""
        raise AssertionError(f"nothing was asked for, got {evaluated}")


class FullBatchState(NamedTuple):
    """How many portions there are, and the value at `x+`."""

    portions: int
    value: float = math.inf


@dataclasses.dataclass(frozen=True)
class FullBatch(_Settled):
    """Every evaluation is of all portions, as in the paper (section 4.2)."""

    apart = False
    squares = False

    def check(self, portions: int) -> None:
        """See `Batches`, as for all that follow."""

    def init(self, portions: int) -> FullBatchState:
        """Nothing was evaluated."""
        return FullBatchState(portions)

    def begin(self) -> Sequence[Command]:
        """It has no vectors of its own."""
        return ()

    def whole(self, state: FullBatchState) -> bool:
        """Always."""
        del state
        return True

    def trial(self, state: FullBatchState) -> Groups:
        """All."""
        return (("g+", tuple(range(state.portions))),)

    def see(
        self, state: FullBatchState, evaluated: Evaluated
    ) -> tuple[FullBatchState, Seen]:
        """The mean loss."""
        value = mean(evaluated.examples, evaluated.values)
        return state._replace(value=value), Seen(value, value, [change()])

    def take(
        self, state: FullBatchState
    ) -> tuple[FullBatchState, float, Sequence[Command]]:
        """The same again."""
        return state, state.value, ()


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
class MultiBatch(_Settled):
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
            portion = int(_permutation(self.seed, epoch, state.portions)[at])
            if portion not in state.shared:
                drawn[portion] = None
            place += 1
        return tuple(drawn), place


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
        order = _permutation(self.seed, 0, state.portions)[begin:end]
        return tuple(np.sort(order).tolist())


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, portions: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(portions)
