"""Protocols decide order: who may begin and push, and whose push is taken.

A protocol is a few pure questions over the replicas' `Clocks`; a new one takes four
lines. It never sees a value, so the order of a run does not depend on values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dbjax.downpour.clocks import Clocks, SharedRounds
from dbjax.whole import whole


class Protocol(NamedTuple):
    """A protocol by name and its questions.

    Attributes:
      name: what the Trace's header says.
      may_begin: `(clocks, replica) -> bool`, asked before each minibatch and again
        whenever a replica finishes one.
      takes: `(clocks, replica, missed) -> bool`, asked by each shard of every push;
        `missed` counts the pushes that the shard has taken since the version that its
        oldest gradient was computed on. A push that is not taken counts a version,
        leaves the parameters, and is counted as dropped. None: all are taken.
      free_running: whether `may_begin` always says yes and there is no `may_push`, so
        that nobody ever waits; `takes` is then asked without clocks.
      by_slowest: whether, of what others do, `may_begin` looks at `clocks.begins_on`
        only, and `may_push` at `clocks.pushes_on`: the slowest one's round, and the
        last one's begun minibatches. Nobody who waits is asked again before that moves.
      may_push: `(clocks, replica) -> bool`, asked before each push and again whenever
        a replica begins a minibatch; None: always.
      clocks: makes the clocks that these are asked about.
      by_push: whether it needs a push after each minibatch: `n_push = 1`, no `overlap`.
    """

    name: str
    may_begin: Callable[[Any, int], bool]
    takes: Callable[[Any, int, int], bool] | None = None
    free_running: bool = False
    by_slowest: bool = False
    may_push: Callable[[Any, int], bool] | None = None
    clocks: Callable[[], Clocks] = Clocks
    by_push: bool = False


def _always(*_: Any) -> bool:
    return True


def asynchronous() -> Protocol:
    """Nobody waits and every push is taken: the paper's Downpour SGD (section 4.1).

    Returns:
      The protocol.

    >>> asynchronous().free_running
    True
    """
    return Protocol(
        "asynchronous",
        may_begin=_always,
        free_running=True,
    )


def synchronous(every: int = 1, backups: int = 0) -> Protocol:
    """A barrier: a round begins when every live replica has finished the last one.

    Nobody pushes before everybody has the parameters for the round, so all of them
    have the same. With plain SGD and `n_push = every` a round is then one step on the
    summed gradient, to rounding. Whoever joins after a round's first push waits for
    the next one.

    With `backups`, a round is over when all but so many have pushed. The gradients of
    those who come later are dropped, and they go on with the next round that they find
    open.

    Args:
      every: minibatches of each replica in a round.
      backups: replicas that a round does not wait for; needs `n_push = 1` and no
        `overlap`.

    Returns:
      The protocol.

    Raises:
      ValueError: `every` is below 1, `backups` below 0, or both are above that.

    Source: Chen and others 2016 (arXiv 1604.00981) for the backups; there a round's
    gradients are averaged and applied at once, which `softsync` does.

    >>> synchronous().name, synchronous(backups=2).name
    ('synchronous', 'synchronous(backups=2)')
    """
    every, backups = whole("every", every, 1), whole("backups", backups, 0)
    if backups:
        if every > 1:
            raise ValueError(
                f"every={every} and backups={backups}: allowed is one of them, since "
                "whoever is late is so with a single minibatch"
            )
        return Protocol(
            f"synchronous(backups={backups})",
            may_begin=lambda clocks, replica: clocks.may_begin(replica),
            takes=lambda clocks, replica, missed: replica not in clocks.late,
            by_slowest=True,
            may_push=lambda clocks, replica: clocks.may_push(replica),
            clocks=lambda: SharedRounds(backups),
            by_push=True,
        )
    return Protocol(
        "synchronous" if every == 1 else f"synchronous(every={every})",
        may_begin=lambda clocks, replica: (
            clocks.rounds[replica] // every <= clocks.slowest // every
        ),
        by_slowest=True,
        may_push=lambda clocks, replica: (
            (clocks.begun[replica] - 1) // every <= (clocks.last - 1) // every
        ),
    )


def delay_threshold(threshold: float) -> Protocol:
    """Nobody waits, but gradients that have missed too many updates are dropped.

    Args:
      threshold: a push is taken if the shard has taken fewer than so many pushes since
        the version that its oldest gradient was computed on; `math.inf` is
        `asynchronous`.

    Returns:
      The protocol.

    Raises:
      ValueError: `threshold` is below 1, or neither an integer nor infinite.

    Source: Maranjyan and others 2025 (Ringmaster ASGD, algorithm 1; with several shards
    each decides on its own part).

    >>> delay_threshold(4).name
    'delay_threshold(4)'
    """
    if threshold == math.inf:
        return asynchronous()._replace(name="delay_threshold(inf)")
    most = whole("threshold", threshold, 1)
    return Protocol(
        f"delay_threshold({most})",
        may_begin=_always,
        takes=lambda clocks, replica, missed: missed < most,
        free_running=True,
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
    if bound == math.inf:
        return asynchronous()._replace(name="ssp(inf)")
    bound = whole("bound", bound, 0)
    if bound == 0:
        return synchronous()._replace(name="ssp(0)")
    return Protocol(
        f"ssp({bound})",
        may_begin=lambda clocks, replica: (
            clocks.rounds[replica] <= clocks.slowest + bound
        ),
        by_slowest=True,
    )
