"""Protocols decide order: who may begin and push, and whose push is taken.

A protocol is a few pure questions over the replicas' `Clocks`; a new one takes four
lines. It never sees a value, so the order of a run does not depend on values.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class _Counts:
    """A count for each live replica, and the least of them."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.least = 0
        self._at: dict[int, int] = {}  # count -> how many live replicas are at it

    def put(self, replica: int, count: int) -> None:
        if count < self.least or not self._at:
            self.least = count
        self._at[count] = self._at.get(count, 0) + 1
        before = self.of.get(replica)
        self.of[replica] = count
        if before is not None:
            self._drop(before)

    def remove(self, replica: int) -> None:
        self._drop(self.of.pop(replica))

    def _drop(self, count: int) -> None:
        left = self._at[count] - 1
        if left:
            self._at[count] = left
            return
        del self._at[count]
        if count == self.least and self._at:
            self.least = min(self._at)


class Clocks:
    """How many minibatches each live replica has begun and finished.

    One is begun when the replica has the parameters for it, and finished when its push
    is handled. What is begun is kept only for protocols with a `may_push`.

    Attributes:
      rounds: how many are finished, by replica.
      begun: how many are begun, by replica: as many, or one more.

    >>> clocks = Clocks()
    >>> clocks.enter(0), clocks.enter(1), clocks.begin(1), clocks.tick(1)
    (None, None, None, None)
    >>> clocks.rounds, clocks.slowest, clocks.begun, clocks.last
    ({0: 0, 1: 1}, 0, {0: 0, 1: 1}, 0)
    """

    def __init__(self) -> None:
        self._rounds, self._begun = _Counts(), _Counts()
        self.rounds, self.begun = self._rounds.of, self._begun.of
        self._closed = 0  # rounds that a push was sent in: it is too late to join them

    @property
    def slowest(self) -> int:
        """The least of `rounds`; it stays where nobody is left."""
        return self._rounds.least

    @property
    def last(self) -> int:
        """The least of `begun`."""
        return self._begun.least

    def enter(self, replica: int) -> None:
        """A replica joins, or comes back, at the slowest's round if it is open yet."""
        round_ = max(self.slowest, self._closed)
        self._rounds.put(replica, round_)
        self._begun.put(replica, round_)

    def begin(self, replica: int) -> None:
        """A replica has the parameters for its next minibatch."""
        self._begun.put(replica, self.rounds[replica] + 1)

    def push(self, replica: int) -> None:
        """A replica sends its push: whoever joins from now on is in a later round."""
        self._closed = max(self._closed, self.begun[replica])

    def tick(self, replica: int) -> None:
        """A replica has finished a minibatch."""
        self._rounds.put(replica, self.rounds[replica] + 1)

    def leave(self, replica: int) -> None:
        """A replica is gone: nobody waits for it any more."""
        self._rounds.remove(replica)
        self._begun.remove(replica)


class Protocol(NamedTuple):
    """A protocol by name and its questions.

    Attributes:
      name: what the Trace's header says.
      may_begin: `(clocks, replica) -> bool`, asked before each minibatch and again
        whenever a replica finishes one.
      takes: `(clocks, replica, staleness) -> bool`, asked of every push; a push that is
        not taken counts a version, leaves the parameters, and is counted as dropped.
      free_running: whether both always say yes, so that nobody ever waits.
      by_slowest: whether `may_begin` looks at the replica's own round and the slowest
        one's only, and `may_push` at its own begun minibatches and the last one's;
        nobody who waits is then asked again before that one moves.
      may_push: `(clocks, replica) -> bool`, asked before each push and again whenever
        a replica begins a minibatch; None: always.
    """

    name: str
    may_begin: Callable[[Clocks, int], bool]
    takes: Callable[[Clocks, int, int], bool]
    free_running: bool = False
    by_slowest: bool = False
    may_push: Callable[[Clocks, int], bool] | None = None


def asynchronous() -> Protocol:
    """Nobody waits and every push is taken: the paper's Downpour SGD (section 4.1).

    Returns:
      The protocol.

    >>> asynchronous().free_running
    True
    """
    return Protocol(
        "asynchronous",
        may_begin=lambda clocks, replica: True,
        takes=lambda clocks, replica, staleness: True,
        free_running=True,
    )


def synchronous() -> Protocol:
    """A barrier: a round begins when every live replica has finished the last one.

    Nobody pushes before everybody has the parameters for the round, so all of them
    have the same. With plain SGD and `n_push = 1` a round is then one step on the
    summed gradient, to rounding. Whoever joins after a round's first push waits for
    the next one.

    Returns:
      The protocol.

    >>> synchronous().name
    'synchronous'
    """
    return Protocol(
        "synchronous",
        may_begin=lambda clocks, replica: clocks.rounds[replica] <= clocks.slowest,
        takes=lambda clocks, replica, staleness: True,
        by_slowest=True,
        may_push=lambda clocks, replica: clocks.begun[replica] <= clocks.last,
    )


def ssp(bound: float) -> Protocol:
    """Stale synchronous parallel: nobody is more than `bound` minibatches ahead.

    A replica that has finished `p` minibatches begins the next one while
    `p - slowest <= bound`.

    Args:
      bound: minibatches; 0 is the barrier of `synchronous`, `math.inf` the order of
        `asynchronous`.

    Returns:
      The protocol.

    Raises:
      ValueError: `bound` is negative, or neither an integer nor infinite.

    Source: Ho and others 2013 (NIPS), whose replicas also see their own updates before
    the shards do: that is `local_optimizer`.

    >>> ssp(3).name
    'ssp(3)'
    """
    if not (bound >= 0 and (bound == math.inf or bound == int(bound))):
        raise ValueError(f"bound={bound}: allowed are integers from 0, and math.inf")
    if bound == 0:
        return synchronous()._replace(name="ssp(0)")
    if bound == math.inf:
        return asynchronous()._replace(name="ssp(inf)")
    return Protocol(
        f"ssp({int(bound)})",
        may_begin=lambda clocks, replica: (
            clocks.rounds[replica] <= clocks.slowest + bound
        ),
        takes=lambda clocks, replica, staleness: True,
        by_slowest=True,
    )
