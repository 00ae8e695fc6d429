"""The coordinator: iterations of any batch method, as a state machine without I/O.

`begin` and `advance` give requests, to be carried out in order: commands to the shards,
`Evaluate`, and `Reached` for whoever keeps the record. The reply to the last of them,
inner products or `Evaluated`, is what `advance` takes next. The state between two
messages is a plain value, and scalars are all that it holds (the paper, section 4.2).

An iteration, in the order of its requests::

    Evaluate x+                     once per step tried
    look: s+, y+, inner products    one round; the search judges the step
    [Evaluate more at x+, look]     where the batch grows
    Swap x x+, Swap g g+            the step is taken
    d, then x+ = x + t d            one combination each
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dbjax.optim.linesearch import LineSearch, words
from dbjax.optim.status import Status
from dbjax.sandblaster.batches import Batches, mean
from dbjax.sandblaster.messages import (
    Copy,
    Dots,
    Elementwise,
    Evaluate,
    Evaluated,
    Reached,
    Swap,
)
from dbjax.sandblaster.methods.base import Command, Direction, Method, Products
from dbjax.sandblaster.scalars import exactly

Request: TypeAlias = Command | Evaluate | Reached
Requests: TypeAlias = list[Request]

PATIENCE = 20  # iterations without a new best value before the run ends

_SQUARE = ("g+", "g+")

# What the evaluation under way is for.
_TRYING, _GROWING, _ENDING = range(3)


class CoordinatorState(NamedTuple):
    """Between two messages.

    Attributes:
      status: RUNNING until the end.
      method: the method's own.
      batches: the batch's own.
      search: of the step under way; None before the first.
      stage: what the evaluation under way is for.
      seen: by it: the value for the search, and the batch's.
      products: the last round's, by pair.
      here: those at `x`.
      fresh: whether the direction is the gradient for want of a better one.
      slope: of the search at `x`.
      step: that led to `x`; 0 at the start.
      value: at `x`, of what the search sees.
      batch: at `x`, of the batch; at the end, of all portions.
      penalty: at `x`, what these hold beside the loss.
      size: at `x`, the square of the gradient.
      outcome: the status to end with, once all portions are evaluated at `x`.
      best: the smallest `batch` so far.
      stalled: iterations since then.
      iterations: steps taken.
      evaluations: of a batch, of whatever size.
      portions: evaluated in them together.
    """

    status: Status
    method: Any
    batches: Any
    search: Any = None
    stage: int = _TRYING
    seen: tuple[float, float] = (math.inf, math.inf)
    products: Products = {}
    here: Products = {}
    fresh: bool = True
    slope: float = 0.0
    step: float = 0.0
    value: float = math.inf
    batch: float = math.inf
    penalty: float = 0.0
    size: float = math.inf
    outcome: Status = Status.RUNNING
    best: float = math.inf
    stalled: int = 0
    iterations: int = 0
    evaluations: int = 0
    portions: int = 0


class Coordinator:
    """Runs a method on batches until it has converged, or nothing more can be gained.

    Args:
      method: what makes directions.
      batches: which portions an iteration sees.
      portions: how many there are.
      iterations: at most.
      tolerance: the run has converged when the gradient's norm is not above this.
      value_rtol: how far losses of equal points may differ by rounding, relatively.
    """

    def __init__(
        self,
        method: Method,
        batches: Batches,
        portions: int,
        *,
        iterations: int,
        tolerance: float,
        value_rtol: float,
    ) -> None:
        self.method, self.batches, self.portions = method, batches, portions
        self.iterations, self.tolerance = iterations, tolerance
        self.value_rtol = value_rtol
        self.search: LineSearch = method.search(value_rtol)

    def begin(self) -> tuple[CoordinatorState, Requests]:
        """Begin at the vector `x`."""
        state = CoordinatorState(
            Status.RUNNING, self.method.init(), self.batches.init(self.portions)
        )
        zeros = [Elementwise(name, "zero", ("x",)) for name in ("g", "d", "y+")]
        own = [*self.method.begin(), *self.batches.begin()]
        return state, [*zeros, *own, Copy("x+", "x"), self._evaluate(state)]

    def advance(
        self, state: CoordinatorState, reply: Evaluated | np.ndarray
    ) -> tuple[CoordinatorState, Requests]:
        """Take the reply to the last request.

        Args:
          state: as `begin` or `advance` gave it, with requests that are done.
          reply: to the last of them.

        Returns:
          The state, and requests; if the run has ended they are the last.
        """
        if isinstance(reply, Evaluated):
            return self._evaluated(state, reply)
        pairs = list(state.products)
        products = dict(zip(pairs, map(float, reply), strict=True))
        state = state._replace(products=products)
        if state.stage == _GROWING:
            return self._arrive(state)
        if state.search is not None:
            return self._judge(state)
        # The start, or a new batch where nothing was found: there it has to grow.
        return self._grow(state, enough=state.iterations == 0)

    def resume(
        self, state: CoordinatorState, rest: Sequence[Request]
    ) -> tuple[CoordinatorState, Sequence[Request]]:
        """Go on from a `Reached`; there may be another limit of iterations by now.

        Args:
          state: as it was then.
          rest: the requests that came after it.

        Returns:
          The state, and the requests that come next.
        """
        limited = Status.LIMIT in (state.status, state.outcome)
        if limited and state.iterations < self.iterations:
            going = Status.RUNNING
            state = state._replace(status=going, outcome=going, stage=_TRYING)
            direction = self.method.direct(state.method, state.here, state.step)
            return self._go(state, direction, ())
        if state.iterations >= self.iterations and not limited:
            if state.status == Status.RUNNING == state.outcome:
                return self._end(state, Status.LIMIT, ())
        return state, rest

    # Replies.

    def _evaluated(
        self, state: CoordinatorState, reply: Evaluated
    ) -> tuple[CoordinatorState, Requests]:
        """The loss is there: ask for inner products."""
        count = len(reply.values)
        state = state._replace(
            evaluations=state.evaluations + 1, portions=state.portions + count
        )
        if state.stage == _ENDING:
            batch = mean(reply.examples, reply.values) + state.penalty
            return state._replace(status=state.outcome, batch=batch), []
        take_in = self.batches.see if state.stage == _TRYING else self.batches.grown
        own, seen = take_in(state.batches, reply)
        commands, pairs = self.method.look(state.method, self.batches.apart)
        if self.batches.squares and _SQUARE not in pairs:
            pairs = [*pairs, _SQUARE]
        state = state._replace(
            batches=own,
            seen=(seen.value, seen.batch),
            products=dict.fromkeys(pairs, math.nan),
        )
        return state, [*seen.commands, *commands, Dots(tuple(pairs))]

    def _judge(self, state: CoordinatorState) -> tuple[CoordinatorState, Requests]:
        """Let the search judge the step tried."""
        value = state.seen[0] + self.method.penalty(state.products)
        slope = self.method.slope(state.products, float(state.search.trial))
        search = exactly(self.search.step)(state.search, value, slope)
        if search.trial == 0 and not search.done:  # what is there, is known
            search = exactly(self.search.step)(search, state.value, state.slope)
        state = state._replace(search=search)
        if not search.done:
            return state, self._try(state)
        if search.trial == 0:
            return self._nothing_found(state)
        return self._grow(state)

    # From one iteration to the next.

    def _grow(
        self, state: CoordinatorState, enough: bool = True
    ) -> tuple[CoordinatorState, Requests]:
        """Evaluate more at the point accepted, if its batch is too small."""
        size = self.method.size(state.products) if enough else 0.0
        square = state.products.get(_SQUARE, math.nan)
        groups = self.batches.grow(state.batches, square, size)
        if not groups:
            return self._arrive(state)
        state = state._replace(stage=_GROWING)
        return state, [Evaluate("x+", groups, self.batches.squares)]

    def _arrive(self, state: CoordinatorState) -> tuple[CoordinatorState, Requests]:
        """The step is taken: judge where it leads, and choose a direction."""
        products, moved = state.products, state.search is not None
        own, value, commands = self.batches.take(state.batches)
        penalty, size = self.method.penalty(products), self.method.size(products)
        batch = state.seen[1] + penalty
        falls = batch < state.best
        state = state._replace(
            batches=own,
            stage=_TRYING,
            here=products,
            fresh=not moved,
            step=float(state.search.trial) if moved else 0.0,
            value=value + penalty,
            batch=batch,
            penalty=penalty,
            size=size,
            best=min(batch, state.best),
            stalled=0 if falls else state.stalled + 1,
            iterations=state.iterations + moved,
        )
        reached = Reached(state.iterations)
        taken = [Swap("x", "x+"), Swap("g", "g+"), *commands, reached]
        outcome = self._outcome(state)
        if outcome != Status.RUNNING:
            return self._end(state, outcome, taken)
        direction = self.method.direct(state.method, products, state.step)
        return self._go(state, direction, taken)

    def _outcome(self, state: CoordinatorState) -> Status:
        """Why to stop at `x`, if there is a reason."""
        if not math.isfinite(state.batch) or not math.isfinite(state.size):
            return Status.NOT_FINITE
        if self.batches.whole(state.batches):
            if math.sqrt(state.size) <= self.tolerance:
                return Status.CONVERGED
            if state.stalled >= PATIENCE:
                return Status.SMALL_STEP
        if state.iterations >= self.iterations:
            return Status.LIMIT
        return Status.RUNNING

    def _go(
        self, state: CoordinatorState, direction: Direction, before: Sequence[Request]
    ) -> tuple[CoordinatorState, Requests]:
        """Begin the search along a direction."""
        start = state.value, direction.slope, direction.step
        state = state._replace(
            method=direction.state,
            slope=direction.slope,
            search=exactly(self.search.init)(*map(np.float64, start)),
        )
        if state.search.done:
            state, after = self._nothing_found(state)
            return state, [*before, *direction.commands, *after]
        return state, [*before, *direction.commands, *self._try(state)]

    def _nothing_found(
        self, state: CoordinatorState
    ) -> tuple[CoordinatorState, Requests]:
        """Try the gradient, then a new batch, then give up."""
        if not state.fresh:
            direction = self.method.steepest(state.method, state.here)
            return self._go(state._replace(fresh=True), direction, ())
        if self.batches.whole(state.batches):
            return self._end(state, self._failure(state), ())
        if state.iterations >= self.iterations:
            return self._end(state, Status.LIMIT, ())
        state = state._replace(search=None, iterations=state.iterations + 1)
        return state, [Copy("x+", "x"), self._evaluate(state)]

    def _failure(self, state: CoordinatorState) -> Status:
        """Say why nothing is found along the gradient."""
        status = int(state.search.status)
        if status == words.INCONSISTENT:
            return Status.INCONSISTENT
        if status == words.NOT_FINITE:
            return Status.NOT_FINITE
        hidden = -state.slope <= self.value_rtol * abs(state.value)
        lost = status == words.LOST or hidden
        return Status.SMALL_STEP if lost else Status.SEARCH_FAILED

    def _end(
        self, state: CoordinatorState, outcome: Status, before: Sequence[Request]
    ) -> tuple[CoordinatorState, Requests]:
        """Stop at `x`, with the value of all portions there."""
        if self.batches.whole(state.batches):
            return state._replace(status=outcome), list(before)
        state = state._replace(stage=_ENDING, outcome=outcome)
        everything = (("g+", tuple(range(self.portions))),)
        return state, [*before, Evaluate("x", everything)]

    # Requests.

    def _try(self, state: CoordinatorState) -> Requests:
        step = float(state.search.trial)
        return [*self.method.move(step), self._evaluate(state)]

    def _evaluate(self, state: CoordinatorState) -> Evaluate:
        groups = self.batches.trial(state.batches)
        return Evaluate("x+", groups, self.batches.squares)
