"""The whole batch at every step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from dbjax.sandblaster.batches.base import Groups, Seen, Settled, change, mean
from dbjax.sandblaster.messages import Evaluated
from dbjax.sandblaster.methods.base import Command


class FullBatchState(NamedTuple):
    """How many portions there are, and the value at `x+`."""

    portions: int
    value: float = math.inf


@dataclasses.dataclass(frozen=True)
class FullBatch(Settled):
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
