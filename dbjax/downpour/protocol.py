"""Protocols decide order: who may begin its next minibatch, and whose push is taken.

A protocol is two pure questions over the replicas' `Clocks`; a new one takes four
lines. It never sees a value, so the order of a run does not depend on values.
"""

from collections.abc import Callable
from typing import NamedTuple


class Clocks:
    """How many minibatches each live replica has finished, pushes included.

    Attributes:
      rounds: that number, by replica.
      slowest: the least of them; it stays where nobody is left.

    >>> clocks = Clocks()
    >>> clocks.enter(0), clocks.enter(1), clocks.tick(1)
    (None, None, None)
    >>> clocks.rounds, clocks.slowest
    ({0: 0, 1: 1}, 0)
    """

    def __init__(self) -> None:
        self.rounds: dict[int, int] = {}
        self._at: dict[int, int] = {}  # round -> how many live replicas are at it
        self.slowest = 0

    def enter(self, replica: int) -> None:
        """A replica joins, or comes back, at the slowest one's round."""
        self.rounds[replica] = self.slowest
        self._at[self.slowest] = self._at.get(self.slowest, 0) + 1

    def tick(self, replica: int) -> None:
        """A replica has finished a minibatch."""
        before = self.rounds[replica]
        self.rounds[replica] = after = before + 1
        self._at[after] = self._at.get(after, 0) + 1
        self._drop(before)

    def leave(self, replica: int) -> None:
        """A replica is gone: nobody waits for it any more."""
        self._drop(self.rounds.pop(replica))

    def _drop(self, round_: int) -> None:
        left = self._at[round_] - 1
        if left:
            self._at[round_] = left
            return
        del self._at[round_]
        if round_ == self.slowest and self._at:
            self.slowest = min(self._at)


class Protocol(NamedTuple):
    """A protocol by name and its two questions.

    Attributes:
      name: what the Trace's header says.
      may_begin: `(clocks, replica) -> bool`, asked before each minibatch and again
        whenever a replica finishes one.
      takes: `(clocks, replica, staleness) -> bool`, asked of every push; a push that is
        not taken counts a version, leaves the parameters, and is counted as dropped.
      free_running: whether both always say yes, so that nobody ever waits.
      by_slowest: whether `may_begin` looks at the replica's own round and the slowest
        one's only; nobody who waits is then asked again before the slowest one moves.
    """

    name: str
    may_begin: Callable[[Clocks, int], bool]
    takes: Callable[[Clocks, int, int], bool]
    free_running: bool = False
    by_slowest: bool = False


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

    With plain SGD and `n_push = 1` a round is then one step on the summed gradient, to
    rounding.

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
    )
