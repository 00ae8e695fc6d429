"""The Downpour replica: the paper's client algorithm as a sans-I/O state machine.

It decides what happens next and knows no array, thread or clock: a runtime carries out
what it asks for and answers. Its state is a plain value that can be saved between any
two messages. Source: the paper's appendix, algorithm 1.1, with one deviation on
purpose: a push follows every `n_push` gradients (the paper's pseudocode also pushes
after the first) and once more for the last partial window.
"""

from typing import NamedTuple

TICKET, FETCH, COMPUTE, PUSH, STOP = "ticket", "fetch", "compute", "push", "stop"


class Periods(NamedTuple):
    """How often a replica fetches and pushes, and whether it waits for either.

    Attributes:
      n_fetch: it fetches before every `n_fetch`-th of its minibatches.
      n_push: it pushes after every `n_push`-th.
      overlap: whether both run beside the next minibatch.
    """

    n_fetch: int = 1
    n_push: int = 1
    overlap: bool = False


class ReplicaState(NamedTuple):
    """Where a replica stands.

    Attributes:
      asked: the request under way.
      batch: minibatches it has begun (so the next one's index).
      step: the ticket in hand.
      accrued: gradients since its last push.
      fresh: whether it holds no parameters yet (at the start, after a failure).
    """

    asked: str = STOP
    batch: int = 0
    step: int = -1
    accrued: int = 0
    fresh: bool = True


_NEW = ReplicaState()


def begin(state: ReplicaState = _NEW) -> ReplicaState:
    """Start, or start again after a failure: accrued gradients are gone."""
    return ReplicaState(TICKET, state.batch)


def advance(
    state: ReplicaState, periods: Periods, ticket: int | None = None
) -> ReplicaState:
    """Go on after the request in `state.asked` was carried out.

    Args:
      state: the replica's state; `state.asked` says what was asked for.
      periods: `n_fetch`, `n_push`, `overlap`.
      ticket: the answer to `TICKET`: the step it may take, None if there are none left.

    Returns:
      The next state, whose `asked` is the next request: `TICKET` (may I take another
      minibatch?), `FETCH` (all shards; with `overlap` it lands later, except the
      first), `COMPUTE` (the gradient of minibatch `batch`, added to the accrued
      gradients, and the local step), `PUSH` (the accrued gradients, then zero them),
      or `STOP`.

    >>> state, asked = begin(), []
    >>> for ticket in (0, None, None, None, None):
    ...     asked.append(state.asked)
    ...     state = advance(state, Periods(), ticket)
    >>> asked, state.asked
    (['ticket', 'fetch', 'compute', 'push', 'ticket'], 'stop')
    """
    asked, batch, step, accrued, fresh = state
    if asked == TICKET:
        if ticket is None:  # no minibatch is left: the last, partial push
            return ReplicaState(PUSH if accrued else STOP, batch, -1, accrued, fresh)
        if fresh or batch % periods.n_fetch == 0:
            return ReplicaState(FETCH, batch, ticket, accrued, fresh)
        return ReplicaState(COMPUTE, batch, ticket, accrued, False)
    if asked == FETCH:
        return ReplicaState(COMPUTE, batch, step, accrued, False)
    if asked == COMPUTE:
        batch, accrued = batch + 1, accrued + 1
        asked = PUSH if accrued == periods.n_push else TICKET
        return ReplicaState(asked, batch, step, accrued, False)
    if asked == PUSH:
        return ReplicaState(STOP if step < 0 else TICKET, batch, step, 0, fresh)
    return state
